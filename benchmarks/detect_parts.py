"""Measures the cost of post-processing in detection, and checks that it equals plain greedy NMS.

  python benchmarks/detect_parts.py --json

Uses PPN at 300 px with 90 classes. At each batch size, three programs are timed alternately: the
network alone, the network with post-processing in one program (`Detector.detect`), and
post-processing alone. `share` is (detect - network) / detect in each round; its median, lowest and
highest value are printed. `share_alone` is alone / (network + alone) of the medians, which is more
reliable on a busy machine than a difference of two large times.
The time of post-processing depends on its input, so detection is measured with each of

  network    outputs of random weights;
  trained    outputs as of a trained network: ten objects per image, whose anchors agree on class
             and box, among low scores that are close together;
  close      thousands of nearly equal scores, and boxes around few centres;
  ties       all scores equal, the worst case for a selection.

Except for `network`, the class logits and box codes are added to those of the network (times 1e-9)
within the program, so that it still has to wait for the network.

The same outputs are then processed as in the reference: a greedy loop over the best box of each
class, and a merge. Its time is printed, and its detections must be equal bit for bit, otherwise the
exit code is 1. With --json the last line is JSON.
"""

import argparse
import json

import hardware
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from train_step import blocking, in_turns

from ppn_jax.config import base_config
from ppn_jax.detection import boxes as box_ops
from ppn_jax.detection.structures import Outputs
from ppn_jax.run import build_detector
from ppn_jax.telemetry.host_memory import keep_freed_memory

KINDS = ('network', 'trained', 'close', 'ties')


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
  parser.add_argument('--batches', type=int, nargs='+', default=[1, 8])
  parser.add_argument('--num_classes', type=int, default=90)
  parser.add_argument('--dtype', default='float32', choices=('float32', 'bfloat16'))
  parser.add_argument('--rounds', type=int, default=30)
  parser.add_argument('--json', action='store_true', help='print JSON as the last line')
  args = parser.parse_args()
  if args.rounds < 1 or args.num_classes < 1 or min(args.batches) < 1:
    parser.error('--batches, --num_classes and --rounds must be at least 1')

  keep_freed_memory()
  config = base_config()
  config.model.num_classes = args.num_classes
  config.model.layers.dtype = args.dtype
  detector = build_detector(config)
  variables = jax.jit(detector.init)(jax.random.key(0))
  results = {str(b): measure(detector, variables, config.postprocess, b, args.rounds)
             for b in args.batches}
  result = {'benchmark': 'detect_parts', 'dtype': args.dtype, 'num_classes': args.num_classes,
            'rounds': args.rounds, 'batches': results,
            'equal': all(kind['equal'] for r in results.values() for kind in r.values()),
            **hardware.describe()}
  print_table(results)
  if args.json:
    print(json.dumps(result))
  if not result['equal']:
    raise SystemExit(1)


def measure(detector, variables, options, batch: int, rounds: int) -> dict:
  """Returns the results for each kind of outputs at a batch size."""
  rng = np.random.default_rng(0)
  images = jax.device_put(rng.integers(0, 256, (batch, *[detector.image_size] * 2, 3), np.uint8))
  forward = jax.jit(detector.forward)

  @jax.jit
  def detect(variables, images, added):
    outputs = detector.forward(variables, images)
    mixed = Outputs(*(1e-9 * o.astype(a.dtype) + a for o, a in zip(outputs, added, strict=True)))
    return detector.postprocess(mixed, detector.anchors)

  postprocess = jax.jit(lambda o: detector.postprocess(o, detector.anchors))
  greedy = jax.jit(lambda o: plain_greedy(detector, o, options))
  inputs = {kind: draw(kind, detector, batch, rng) for kind in KINDS[1:]}
  inputs['network'] = forward(variables, images)
  runs = {'forward': blocking(forward, variables, images)}
  for kind in KINDS:
    runs[kind, 'detect'] = (blocking(jax.jit(detector.detect), variables, images)
                            if kind == 'network' else
                            blocking(detect, variables, images, inputs[kind]))
    runs[kind, 'postprocess'] = blocking(postprocess, inputs[kind])
  times = in_turns(runs, rounds)
  found = {}
  for kind in KINDS:
    few = in_turns({'plain': blocking(greedy, inputs[kind])}, min(rounds, 3))
    whole, alone = np.array(times[kind, 'detect']), np.array(times['forward'])
    post = times[kind, 'postprocess']
    found[kind] = {
        'forward_ms': summary(alone), 'detect_ms': summary(whole),
        'postprocess_ms': summary(post),
        'share_alone': round(float(np.median(post) / (np.median(alone) + np.median(post))), 4),
        'plain_greedy_ms': summary(few['plain']), 'share': summary((whole - alone) / whole),
        'detections': int(postprocess(inputs[kind]).valid.sum()),
        'equal': equal(postprocess(inputs[kind]), greedy(inputs[kind]))}
  return found


def summary(values) -> dict[str, float]:
  """Returns median, lowest and highest value."""
  return {name: round(float(f(values)), 4)
          for name, f in (('median', np.median), ('lowest', np.min), ('highest', np.max))}


def draw(kind: str, detector, batch: int, rng: np.random.Generator) -> Outputs:
  """Returns random outputs of a kind; see the top of this file."""
  anchors, classes = detector.anchors.boxes, detector.class_spec.num_logits
  shape = (batch, len(anchors), classes)
  codes = rng.normal(0, 0.5, (*shape[:2], 4)).astype(np.float32)
  if kind == 'ties':
    return jax.device_put(Outputs(codes, np.zeros(shape, np.float32)))
  if kind == 'close':
    centres = rng.uniform(0.1, 0.7, (5, 2))[rng.integers(0, 5, shape[:2])]
    boxes = np.concatenate([centres, centres + 0.2], -1) + rng.normal(0, 0.02, (*shape[:2], 4))
    codes = np.asarray(box_ops.encode(_ordered(boxes), anchors))
    logits = 1e-4 * rng.normal(0, 1, shape)
    return jax.device_put(Outputs(codes, logits.astype(np.float32)))
  logits = rng.normal(-6, 1, shape)
  for image in range(batch):
    for _ in range(10):
      corner, side = rng.uniform(0, 0.6, 2), rng.uniform(0.1, 0.4, 2)
      ground_truth = np.concatenate([corner, corner + side]).astype(np.float32)
      overlap = np.asarray(box_ops.iou(ground_truth[None], anchors))[0]
      near = np.flatnonzero(overlap > min(0.4, 0.9 * overlap.max()))
      found = ground_truth + rng.normal(0, 0.03, (len(near), 4)) * side.mean()
      codes[image, near] = box_ops.encode(_ordered(found), anchors[near])
      label = rng.integers(0, classes)
      logits[image, near, label] = rng.normal(1, 1.5, len(near))
      # A second class that looks similar.
      logits[image, near, (label + 1) % classes] = rng.normal(-1.5, 1, len(near))
  return jax.device_put(Outputs(codes, logits.astype(np.float32)))


def _ordered(boxes: np.ndarray) -> np.ndarray:
  low, high = boxes[..., :2], boxes[..., 2:]
  return np.concatenate([low, np.maximum(high, low + 1e-3)], -1).astype(np.float32)


def plain_greedy(detector, outputs: Outputs, options):
  """Runs NMS by a loop over the classes, as the reference does; the fields are as in Detections."""
  anchors = detector.anchors
  scores = detector.class_spec.scores(outputs.class_logits.astype(jnp.float32))
  boxes = box_ops.decode(outputs.box_codes.astype(jnp.float32), jnp.asarray(anchors.boxes))

  def of_class(boxes, left):
    def select_best(left, _):
      best = jnp.argmax(left)
      score = left[best]
      overlapping = box_ops.iou(boxes[best][None], boxes)[0] > options.iou_threshold
      suppressed = overlapping | (jnp.arange(left.size) == best)
      return jnp.where(suppressed & (score > -1), -1.0, left), (best, score)
    return lax.scan(select_best, left, length=options.max_per_class)[1]

  def of_image(boxes, scores):
    is_candidate = (scores > options.score_threshold) & jnp.isfinite(boxes).all(-1, keepdims=True)
    at, score = lax.map(lambda s: of_class(boxes, s), jnp.where(is_candidate, scores, -1.0).T)
    label = jnp.broadcast_to(jnp.arange(len(at))[:, None], at.shape)
    at, score, label = at.ravel(), score.ravel(), label.ravel()
    clipped = box_ops.clip(boxes)
    score = jnp.where(box_ops.area(clipped)[at] > 0, score, -1.0)
    first = jnp.lexsort((label, at, -score))[:options.max_detections]
    valid = score[first] > -1
    return tuple(jnp.where(valid.reshape(-1, *[1] * (x.ndim - 1)), x, 0) for x in (
        clipped[at[first]], score[first], label[first], jnp.asarray(anchors.level)[at[first]],
        valid))

  return lax.map(lambda pair: of_image(*pair), (boxes, scores))


def equal(found, plain) -> bool:
  """Returns whether two sets of detections are equal bit for bit."""
  return all(np.array_equal(np.asarray(a), np.asarray(b))
             for a, b in zip(found, plain, strict=True))


def print_table(results: dict) -> None:
  for batch, kinds in results.items():
    for kind, f in kinds.items():
      network, detect, alone, plain = (f[f'{part}_ms']['median'] for part in (
          'forward', 'detect', 'postprocess', 'plain_greedy'))
      share = f['share']
      print(f'batch {batch:>3} {kind:8} network {network:8.2f} ms  detect {detect:8.2f} ms  share '
            f'{share["median"]:5.1%} ({share["lowest"]:.1%} to {share["highest"]:.1%})  alone '
            f'{alone:6.2f} ms, {f["share_alone"]:.1%}  plain {plain:8.1f} ms  '
            f'{"equal" if f["equal"] else "NOT EQUAL"}')


if __name__ == '__main__':
  main()
