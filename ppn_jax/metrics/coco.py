"""COCO's twelve metrics and average precision by class, from detections and ground truth.

Two libraries compute the matching: hotcoco (fast) and pycocotools (the reference). Their
precision and recall arrays are equal bit for bit, and the metrics are read from these arrays here,
by the same code for both.
"""

import contextlib
import io
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from ppn_jax import storage
from ppn_jax.detection.structures import Array, Category, Detections
from ppn_jax.errors import InputError, did_you_mean

SCORERS = ('hotcoco', 'pycocotools')
IOUS, SIZES = np.arange(50, 100, 5) / 100, ('all', 'small', 'medium', 'large')
# COCO's value in arrays where there is no ground truth to score; metrics are None there.
NO_GROUND_TRUTH = -1.0

# Indices of the metrics in COCO's arrays, whose axes are IoU, 0.50:0.05:0.95; recall; class; area:
# all, small (< 32^2 px), medium, large (>= 96^2); and at most 1, 10, 100 detections per image.
_PRECISION = {  # [T, R, K, areas, limits].
    'AP': np.s_[:, :, :, 0, 2], 'AP50': np.s_[:1, :, :, 0, 2], 'AP75': np.s_[5:6, :, :, 0, 2],
    'AP_small': np.s_[:, :, :, 1, 2], 'AP_medium': np.s_[:, :, :, 2, 2],
    'AP_large': np.s_[:, :, :, 3, 2]}
_RECALL = {  # [T, K, areas, limits].
    'AR1': np.s_[:, :, 0, 0], 'AR10': np.s_[:, :, 0, 1], 'AR100': np.s_[:, :, 0, 2],
    'AR_small': np.s_[:, :, 1, 2], 'AR_medium': np.s_[:, :, 2, 2],
    'AR_large': np.s_[:, :, 3, 2]}
DESCRIPTIONS = {
    'AP': 'mean over IoU 0.50:0.95', 'AP50': 'IoU 0.50', 'AP75': 'IoU 0.75',
    'AP_small': 'area below 32^2 px', 'AP_medium': '32^2 to 96^2 px',
    'AP_large': 'above 96^2 px', 'AR1': '1 detection an image', 'AR10': '10 detections',
    'AR100': '100 detections', 'AR_small': 'area below 32^2 px',
    'AR_medium': '32^2 to 96^2 px', 'AR_large': 'above 96^2 px'}


class ClassScore(NamedTuple):
  """Average precision of one class, 0 to 1, or None if the ground truth has no such object."""
  name: str
  ap: float | None  # Mean over IoU 0.50:0.95.
  ap50: float | None
  num_boxes: int  # Ground-truth boxes, crowds not counted.


class Scores(NamedTuple):
  """COCO's metrics of a set of detections."""
  # All twelve in COCO's order, AP to AR_large; 0 to 1, None where there is no such ground truth.
  metrics: dict[str, float | None]
  per_class: tuple[ClassScore, ...]  # In order of category id, which is that of labels.
  num_images: int
  num_detections: int


def to_rows(detections: Detections, image_id: Array, size: Array, valid: Array,
            categories: Sequence[Category]) -> list[dict[str, Any]]:
  """Converts the detections of a batch to rows of COCO's results format.

  Args:
    detections: on the host, [B, K]; entries that are not valid are left out.
    image_id: i64 [B].
    size: [B, 2], (height, width) of the original images in pixels.
    valid: bool [B], False for images that only pad the batch.
    categories: of the data set, in order of label.

  Returns:
    Rows of image_id, category_id, bbox [x, y, width, height] in pixels of the original
    image, score, and level, which COCO's tools ignore; all plain Python numbers.
  """
  boxes, scores, labels, levels, found = (np.asarray(x) for x in detections)
  rows = []
  for b, k in np.argwhere(found & np.asarray(valid)[:, None]):
    height, width = (float(side) for side in size[b])
    ymin, xmin, ymax, xmax = boxes[b, k].tolist()
    rows.append({
        'image_id': int(image_id[b]),
        'category_id': int(categories[labels[b, k]].id),
        'bbox': [xmin * width, ymin * height, (xmax - xmin) * width, (ymax - ymin) * height],
        'score': float(scores[b, k]), 'level': int(levels[b, k])})
  return rows


def score(ground_truth: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], *,
          scorer: str = 'hotcoco') -> Scores:
  """Computes COCO's metrics over all images of the ground truth, with or without rows or boxes.

  Args:
    ground_truth: contents of a COCO instances file: images, annotations, categories. A missing
      `area` is that of the box, a missing `iscrowd` is 0.
    rows: results as `to_rows` returns them, in any order; they are not modified.
    scorer: 'hotcoco', or 'pycocotools' for the reference implementation.

  Raises:
    InputError: If the scorer is unknown, or a row has an image or category that the ground truth
      lacks.
  """
  dataset = _minimal(ground_truth)
  precision, recall = _accumulate(dataset, rows, scorer)
  metrics = {name: _mean(precision[at]) for name, at in _PRECISION.items()}
  metrics |= {name: _mean(recall[at]) for name, at in _RECALL.items()}
  counts = Counter(a['category_id'] for a in dataset['annotations'] if not a['iscrowd'])
  per_class = tuple(
      ClassScore(c['name'], _mean(precision[:, :, k, 0, 2]), _mean(precision[0, :, k, 0, 2]),
                 counts[c['id']])
      for k, c in enumerate(dataset['categories']))
  return Scores(metrics, per_class, len(dataset['images']), len(rows))


def precision_table(ground_truth: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], *,
                    scorer: str = 'hotcoco') -> np.ndarray:
  """Returns the table of precision that average precision is the mean of.

  The arguments are those of `score`.

  Returns:
    f64 [10, 101, C, 4], precision from 0 to 1, NO_GROUND_TRUTH where there is none. Axes: IoU,
    `IOUS`; recall from 0 to 1; class in order of category id; size of the ground truth, `SIZES`.
  """
  return _accumulate(_minimal(ground_truth), rows, scorer)[0][..., 2]


def tide_errors(ground_truth: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], *,
                min_iou: float, background_iou: float) -> dict[str, Any]:
  """Returns hotcoco's decomposition of errors; see `hotcoco.COCOeval.tide_errors`.

  Args:
    ground_truth, rows: see `score`.
    min_iou: IoU from which on a detection is correct.
    background_iou: IoU below which a detection is background.
  """
  evaluation = _evaluate(_minimal(ground_truth), rows, 'hotcoco')
  return evaluation.tide_errors(pos_thr=min_iou, bg_thr=background_iou)  # pyright: ignore


def format_table(scores: Scores) -> str:
  """Formats the twelve metrics and the classes as aligned text; '-' where nothing was scored."""
  lines = [f'{scores.num_images:,} images, {scores.num_detections:,} detections', '']
  lines += [f'{name:<10} {_show(value)}  {DESCRIPTIONS[name]}'
            for name, value in scores.metrics.items()]
  width = max([len('class'), *(len(c.name) for c in scores.per_class)])
  lines += ['', f'{"class":<{width}}     AP   AP50    boxes']
  lines += [f'{c.name:<{width}}  {_show(c.ap)}  {_show(c.ap50)}  {c.num_boxes:>7,}'
            for c in scores.per_class]
  return '\n'.join(lines)


def format_headline(metrics: Mapping[str, float | None]) -> str:
  """Returns a line such as 'AP 0.2500  AP50 0.5000  AP75 -', with '-' for None."""
  return '  '.join(f'{name} {format_metric(metrics[name], 4)}' for name in ('AP', 'AP50', 'AP75'))


def format_metric(value: float | None, digits: int = 3) -> str:
  """Returns a metric with `digits` decimals, '-' for None."""
  return '-' if value is None else f'{value:.{digits}f}'


def renumber(rows: Sequence[Mapping[str, Any]], ids: Mapping[int, int]) -> list[dict[str, Any]]:
  """Returns rows with category ids replaced by `ids`, for files that number classes differently."""
  return [{**row, 'category_id': ids.get(row['category_id'], row['category_id'])} for row in rows]


def write_results(path: storage.Path, rows: Sequence[Mapping[str, Any]]) -> None:
  """Writes rows as a COCO results file, atomically."""
  storage.write_text(path, json.dumps(list(rows), allow_nan=False))


def write_scores(path: storage.Path, scores: Scores, scored: Mapping[str, Any]) -> None:
  """Writes the metrics and the per-class table as JSON, atomically; None becomes null.

  Args:
    path: of the file.
    scores: to write.
    scored: describes the checkpoint and data that were scored; see `retention.Record.about`.
  """
  storage.write_text(path, json.dumps({
      'figures': scores.metrics, 'per_class': scores.per_class,
      'num_images': scores.num_images, 'num_detections': scores.num_detections,
      'scored': scored}, indent=2, allow_nan=False) + '\n')


def _minimal(ground_truth: Mapping[str, Any]) -> dict[str, list[dict[str, Any]]]:
  """Returns a copy with only the fields that scoring boxes needs.

  Annotations are numbered from 1, since COCO's matching takes id 0 for "no match".
  """
  annotations = [{
      'id': i, 'image_id': a['image_id'], 'category_id': a['category_id'],
      'bbox': list(a['bbox']), 'area': a.get('area', a['bbox'][2] * a['bbox'][3]),
      'iscrowd': int(a.get('iscrowd', 0))
  } for i, a in enumerate(ground_truth['annotations'], start=1)]
  categories = sorted(ground_truth['categories'], key=lambda c: c['id'])
  return {
      'images': [{k: image[k] for k in ('id', 'height', 'width') if k in image}
                 for image in ground_truth['images']],
      'categories': [{'id': c['id'], 'name': str(c.get('name', c['id']))} for c in categories],
      'annotations': annotations}


def _check_rows(dataset: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> None:
  """Raises InputError unless the ground truth has the images and categories of all rows."""
  for key, table in (('image_id', 'images'), ('category_id', 'categories')):
    known = {entry['id'] for entry in dataset[table]}
    for i, row in enumerate(rows):
      if row[key] not in known:
        raise InputError(f'result {i} has {key} {row[key]!r}, which is not among the '
                         f'{len(known)} {table} of the annotations')


def _accumulate(dataset: dict[str, Any], rows: Sequence[Mapping[str, Any]],
                scorer: str) -> tuple[np.ndarray, np.ndarray]:
  """Returns precision [10, 101, C, 4, 3] and recall [10, C, 4, 3]."""
  evaluation = _evaluate(dataset, rows, scorer)
  with contextlib.redirect_stdout(io.StringIO()):
    evaluation.accumulate()
  return np.asarray(evaluation.eval['precision']), np.asarray(evaluation.eval['recall'])


def _evaluate(dataset: dict[str, Any], rows: Sequence[Mapping[str, Any]], scorer: str):
  """Returns the scorer's `COCOeval` after `evaluate()`."""
  if scorer not in SCORERS:
    raise InputError(f'unknown scorer {scorer!r}; {did_you_mean(str(scorer), SCORERS)}')
  _check_rows(dataset, rows)
  if scorer == 'hotcoco':
    from hotcoco import COCO, COCOeval
  else:
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval
  detections = [{
      'id': i, 'image_id': r['image_id'], 'category_id': r['category_id'],
      'bbox': list(r['bbox']), 'score': r['score'], 'area': r['bbox'][2] * r['bbox'][3],
      'iscrowd': 0} for i, r in enumerate(rows, start=1)]
  # Not loadRes: that of pycocotools fails without rows and modifies those it is given.
  with contextlib.redirect_stdout(io.StringIO()):
    evaluation = COCOeval(*(_index(COCO, dataset | {'annotations': annotations})
                            for annotations in (dataset['annotations'], detections)), 'bbox')
    evaluation.evaluate()
  return evaluation


def _index(coco: type, dataset: dict[str, Any]):
  """Returns a `COCO` of either library that holds `dataset`."""
  index = coco()
  index.dataset = dataset
  index.createIndex()
  return index


def _mean(values: np.ndarray) -> float | None:
  scored = values[values > NO_GROUND_TRUTH]
  return float(np.mean(scored)) if scored.size else None


def _show(value: float | None) -> str:
  return f'{format_metric(value):>5}'
