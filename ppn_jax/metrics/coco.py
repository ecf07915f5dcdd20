"""COCO's twelve figures and average precision by class, from detections and the original truth.

Two libraries compute the matching: hotcoco (fast) and pycocotools (the reference). Their
precision and recall arrays are equal bit for bit, and what is read from the arrays is read
here, by the same lines for both.
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
NOTHING = -1.0  # COCO's value in arrays where there is no truth to score; metrics are None there.

# Where the figures lie: IoU 0.50:0.05:0.95 first; all, small (< 32^2 px), medium, large
# (>= 96^2); at most 1, 10, 100 detections an image.
_PRECISION = {  # [T, R, K, areas, limits].
    'AP': np.s_[:, :, :, 0, 2], 'AP50': np.s_[:1, :, :, 0, 2], 'AP75': np.s_[5:6, :, :, 0, 2],
    'AP_small': np.s_[:, :, :, 1, 2], 'AP_medium': np.s_[:, :, :, 2, 2],
    'AP_large': np.s_[:, :, :, 3, 2]}
_RECALL = {  # [T, K, areas, limits].
    'AR1': np.s_[:, :, 0, 0], 'AR10': np.s_[:, :, 0, 1], 'AR100': np.s_[:, :, 0, 2],
    'AR_small': np.s_[:, :, 1, 2], 'AR_medium': np.s_[:, :, 2, 2],
    'AR_large': np.s_[:, :, 3, 2]}
MEANING = {
    'AP': 'mean over IoU 0.50:0.95', 'AP50': 'IoU 0.50', 'AP75': 'IoU 0.75',
    'AP_small': 'area below 32^2 px', 'AP_medium': '32^2 to 96^2 px',
    'AP_large': 'above 96^2 px', 'AR1': '1 detection an image', 'AR10': '10 detections',
    'AR100': '100 detections', 'AR_small': 'area below 32^2 px',
    'AR_medium': '32^2 to 96^2 px', 'AR_large': 'above 96^2 px'}


class ClassScore(NamedTuple):
  """Average precision of one class, 0 to 1, or None if the truth has none of it."""
  name: str
  ap: float | None  # Mean over IoU 0.50:0.95.
  ap50: float | None
  num_boxes: int  # Truth boxes, crowds not counted.


class Scores(NamedTuple):
  """What a set of detections is worth."""
  # COCO's twelve in COCO's order, AP to AR_large; 0 to 1, None where there is no such truth.
  metrics: dict[str, float | None]
  per_class: tuple[ClassScore, ...]  # In order of category id, which is that of labels.
  num_images: int
  num_detections: int


def to_rows(detections: Detections, image_id: Array, size: Array, valid: Array,
            categories: Sequence[Category]) -> list[dict[str, Any]]:
  """Detections of a batch as rows of COCO's results format.

  Args:
    detections: on the host, [B, K]; entries that are not valid are left out.
    image_id: [B].
    size: [B, 2], (height, width) of the original images in pixels.
    valid: bool [B], False for images that only fill the batch.
    categories: of the data set, in order of label.

  Returns:
    Rows of image_id, category_id, bbox [x, y, width, height] in pixels of the original
    image, score, and level, which COCO's tools pass over; all plain Python numbers.
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
  """Scores rows against all images of the truth, those without rows or boxes included.

  Args:
    ground_truth: a COCO instances file as read: images, annotations, categories. A missing
      `area` is taken from the box, a missing `iscrowd` is 0.
    rows: results as `to_rows` makes them, in any order; not changed.
    scorer: 'hotcoco', or 'pycocotools' for the reference.

  Raises:
    InputError: an unknown scorer, or a row of an image or category that the truth lacks.
  """
  if scorer not in SCORERS:
    raise InputError(f'unknown scorer {scorer!r}; {did_you_mean(str(scorer), SCORERS)}')
  truth = _plain(ground_truth)
  _check_rows(truth, rows)
  precision, recall = _match(truth, rows, scorer)
  figures = {name: _mean(precision[at]) for name, at in _PRECISION.items()}
  figures |= {name: _mean(recall[at]) for name, at in _RECALL.items()}
  counts = Counter(a['category_id'] for a in truth['annotations'] if not a['iscrowd'])
  per_class = tuple(
      ClassScore(c['name'], _mean(precision[:, :, k, 0, 2]), _mean(precision[0, :, k, 0, 2]),
                 counts[c['id']])
      for k, c in enumerate(truth['categories']))
  return Scores(figures, per_class, len(truth['images']), len(rows))


def precision_table(ground_truth: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], *,
                    scorer: str = 'hotcoco') -> np.ndarray:
  """What average precision is the mean of, f64 [10, 101, C, 4]; arguments as of `score`.

  Axes: IoU `IOUS`, recall 0 to 1, class in order of category id, and size of the truth, `SIZES`.
  Precision is 0 to 1, NOTHING where there is no such truth.
  """
  truth = _plain(ground_truth)
  _check_rows(truth, rows)
  return _match(truth, rows, scorer)[0][..., 2]


def format_table(scores: Scores) -> str:
  """The twelve figures and the classes as aligned plain text; '-' where nothing was scored."""
  lines = [f'{scores.num_images:,} images, {scores.num_detections:,} detections', '']
  lines += [f'{name:<10} {_show(value)}  {MEANING[name]}'
            for name, value in scores.metrics.items()]
  width = max([len('class'), *(len(c.name) for c in scores.per_class)])
  lines += ['', f'{"class":<{width}}     AP   AP50    boxes']
  lines += [f'{c.name:<{width}}  {_show(c.ap)}  {_show(c.ap50)}  {c.num_boxes:>7,}'
            for c in scores.per_class]
  return '\n'.join(lines)


def format_headline(figures: Mapping[str, float | None]) -> str:
  """Returns 'AP 0.2500  AP50 0.5000  AP75 -', with '-' for what does not exist."""
  return '  '.join(f'{name} {format_metric(figures[name], 4)}' for name in ('AP', 'AP50', 'AP75'))


def format_metric(value: float | None, digits: int = 3) -> str:
  """Returns a metric with so many decimals, '-' for one that does not exist."""
  return '-' if value is None else f'{value:.{digits}f}'


def renumber(rows: Sequence[Mapping[str, Any]], ids: Mapping[int, int]) -> list[dict[str, Any]]:
  """Returns rows with category ids replaced by `ids`, for a file that numbers classes otherwise."""
  return [{**row, 'category_id': ids.get(row['category_id'], row['category_id'])} for row in rows]


def write_results(path: storage.Path, rows: Sequence[Mapping[str, Any]]) -> None:
  """Writes rows as a COCO results file, whole or not at all."""
  storage.write_text(path, json.dumps(list(rows), allow_nan=False))


def write_scores(path: storage.Path, scores: Scores, scored: Mapping[str, Any]) -> None:
  """Writes the metrics and the per-class table as JSON, whole or not at all; null for None.

  Args:
    path: of the file.
    scores: to write.
    scored: what they are the scores of; see `retention.Record`.
  """
  storage.write_text(path, json.dumps({
      'figures': scores.metrics, 'per_class': scores.per_class,
      'num_images': scores.num_images, 'num_detections': scores.num_detections,
      'scored': scored}, indent=2, allow_nan=False) + '\n')


def _plain(ground_truth: Mapping[str, Any]) -> dict[str, list[dict[str, Any]]]:
  """A copy with what scoring boxes needs and nothing else.

  Annotations are numbered from 1: COCO's matching takes id 0 for "no match".
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


def _check_rows(truth: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> None:
  for key, table in (('image_id', 'images'), ('category_id', 'categories')):
    known = {entry['id'] for entry in truth[table]}
    for i, row in enumerate(rows):
      if row[key] not in known:
        raise InputError(f'result {i} has {key} {row[key]!r}, which is not among the '
                         f'{len(known)} {table} of the annotations')


def _match(truth: dict[str, Any], rows: Sequence[Mapping[str, Any]],
           scorer: str) -> tuple[np.ndarray, np.ndarray]:
  """Precision [10, 101, K, 4, 3] and recall [10, K, 4, 3], NOTHING where there is no truth."""
  if scorer == 'hotcoco':
    from hotcoco import COCO, COCOeval
  else:
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval
  found = [{
      'id': i, 'image_id': r['image_id'], 'category_id': r['category_id'],
      'bbox': list(r['bbox']), 'score': r['score'], 'area': r['bbox'][2] * r['bbox'][3],
      'iscrowd': 0} for i, r in enumerate(rows, start=1)]
  # Not loadRes: pycocotools' fails on no rows and writes into those it is given.
  with contextlib.redirect_stdout(io.StringIO()):
    job = COCOeval(*(_index(COCO, truth | {'annotations': annotations})
                     for annotations in (truth['annotations'], found)), 'bbox')
    job.evaluate()
    job.accumulate()
  return np.asarray(job.eval['precision']), np.asarray(job.eval['recall'])


def _index(coco: type, dataset: dict[str, Any]):
  index = coco()
  index.dataset = dataset
  index.createIndex()
  return index


def _mean(values: np.ndarray) -> float | None:
  scored = values[values > NOTHING]
  return float(np.mean(scored)) if scored.size else None


def _show(value: float | None) -> str:
  return f'{format_metric(value):>5}'
