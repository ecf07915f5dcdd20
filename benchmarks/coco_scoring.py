"""Times COCO's scoring by hotcoco and by pycocotools, and checks that their metrics are equal.

  python benchmarks/coco_scoring.py --json

The default size is that of COCO's validation split: 5,000 images with 100 detections each, 80
classes and 7 boxes per image on average. Some detections are ground truth moved by up to a fifth of
its size, most are random boxes. The whole of `coco.score` is timed, alternating between the two.
Equal means bit for bit in every metric, also per class. With --json the last line is JSON.
"""

import argparse
import json
import statistics
import time

import hardware
import numpy as np

from ppn_jax.metrics import coco

SIDE = 640  # Pixels of an image.


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
  parser.add_argument('--images', type=int, default=5000)
  parser.add_argument('--detections', type=int, default=100, help='per image')
  parser.add_argument('--classes', type=int, default=80)
  parser.add_argument('--rounds', type=int, default=1)
  parser.add_argument('--json', action='store_true', help='print JSON as the last line')
  args = parser.parse_args()

  truth, rows = problem(args.images, args.detections, args.classes)
  seconds, scores = {scorer: [] for scorer in coco.SCORERS}, {}
  for _ in range(args.rounds):
    for scorer in coco.SCORERS:
      start = time.perf_counter()
      scores[scorer] = coco.score(truth, rows, scorer=scorer)
      seconds[scorer].append(round(time.perf_counter() - start, 2))
  fast, slow = (scores[s] for s in ('hotcoco', 'pycocotools'))
  medians = {scorer: statistics.median(s) for scorer, s in seconds.items()}
  result = {
      'benchmark': 'coco_scoring', 'images': args.images, 'detections': len(rows),
      'boxes': len(truth['annotations']), 'classes': args.classes, 'seconds': medians,
      'all_seconds': seconds, 'times_faster': round(medians['pycocotools'] / medians['hotcoco'], 1),
      'equal': fast == slow, 'AP': fast.metrics['AP'], **hardware.describe()}
  for scorer, s in medians.items():
    print(f'{scorer:12} {s:8.2f} s')
  print(f'metrics {"equal bit for bit" if result["equal"] else "DIFFER"}, AP {result["AP"]:.4f}')
  if args.json:
    print(json.dumps(result))
  if not result['equal']:
    raise SystemExit(1)


def problem(images: int, detections: int, classes: int) -> tuple[dict, list[dict]]:
  """Returns COCO ground truth, with crowds and empty images, and detections; both deterministic."""
  rng = np.random.default_rng(0)
  annotations, rows = [], []
  for image_id in range(1, images + 1):
    boxes = random_boxes(rng, rng.poisson(7))
    labels = rng.integers(1, classes + 1, len(boxes))
    for box, label in zip(boxes.tolist(), labels.tolist(), strict=True):
      annotations.append({
          'id': len(annotations) + 1, 'image_id': image_id, 'category_id': label, 'bbox': box,
          'area': box[2] * box[3], 'iscrowd': int(rng.random() < 0.01)})
    found = random_boxes(rng, detections)
    found_labels = rng.integers(1, classes + 1, detections)
    scores = rng.beta(1, 6, detections).astype(np.float32)
    near = min(3 * len(boxes), detections)
    of = np.arange(near) % max(len(boxes), 1)
    found[:near] = boxes[of] + rng.uniform(-0.2, 0.2, (near, 4)) * boxes[of][:, [2, 3, 2, 3]]
    found_labels[:near] = labels[of]
    scores[:near] = rng.beta(3, 2, near)
    rows += [{'image_id': image_id, 'category_id': label, 'bbox': box, 'score': score}
             for box, label, score in zip(found.tolist(), found_labels.tolist(), scores.tolist(),
                                          strict=True)]
  return {'images': [{'id': i, 'height': SIDE, 'width': SIDE} for i in range(1, images + 1)],
          'categories': [{'id': i, 'name': str(i)} for i in range(1, classes + 1)],
          'annotations': annotations}, rows


def random_boxes(rng: np.random.Generator, count: int) -> np.ndarray:
  """Returns boxes [count, 4] as x, y, width, height in pixels, log-uniform from 8 to 400 a side."""
  sides = np.exp(rng.uniform(np.log(8), np.log(400), (count, 2)))
  return np.concatenate([rng.uniform(0, 1, (count, 2)) * (SIDE - sides), sides], axis=1)


if __name__ == '__main__':
  main()
