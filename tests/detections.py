"""Ground truth and detections for tests of metrics."""

import numpy as np


def to_truth(boxes, images=2):
  """Returns ground truth of two classes; boxes of the first: (image, bbox, iscrowd)."""
  return {'images': [{'id': i, 'width': 100, 'height': 100} for i in range(images)],
          'categories': [{'id': 3, 'name': 'cat'}, {'id': 7, 'name': 'dog'}],
          'annotations': [{'id': k, 'image_id': i, 'category_id': 3, 'bbox': box, 'iscrowd': hard,
                           'area': box[2] * box[3]} for k, (i, box, hard) in enumerate(boxes)]}


def to_rows(found):
  """Returns detections of the first class: (image, bbox, score)."""
  return [{'image_id': i, 'category_id': 3, 'bbox': box, 'score': score, 'level': 0}
          for i, box, score in found]


def random_problem(seed, images=40):
  """Returns ground truth, and detections of two qualities on several levels."""
  rng = np.random.default_rng(seed)
  boxes = [(i, [*rng.uniform(0, 60, 2), *rng.uniform(10, 40, 2)], int(rng.random() < 0.2))
           for i in range(images) for _ in range(rng.integers(1, 4))]
  truth = to_truth(boxes, images)
  found = [(i, (np.array(box) * rng.normal(1, 0.1, 4)).tolist(), float(rng.beta(5, 2)))
           for i, box, _ in boxes if rng.random() < 0.8]
  found += [(int(rng.integers(images)), [*rng.uniform(0, 60, 2), *rng.uniform(5, 40, 2)],
             float(rng.beta(2, 4))) for _ in range(4 * images)]
  rows = to_rows(found)
  return truth, [r | {'level': k % 3} for k, r in enumerate(rows)]
