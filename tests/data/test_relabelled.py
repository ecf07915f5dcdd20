"""Data whose classes are some of a run's."""

import numpy as np
import pytest

from ppn_jax.data.sources import build_source
from ppn_jax.detection.structures import Category
from ppn_jax.errors import InputError
from ppn_jax.evaluation import coco

BLOCK = {'name': 'synthetic_shapes', 'num_images': 6, 'image_size': 64}


@pytest.fixture(scope='module')
def sources():
  plain = build_source(BLOCK)
  run = [Category(0, 'before'), *plain.categories[:2], Category(50, 'after'),
         *plain.categories[2:]]
  return plain, build_source(BLOCK, categories=sorted(run)), tuple(sorted(run))


def test_labels_are_the_runs(sources):
  plain, found, run = sources
  assert found.categories == run and len(found) == len(plain)
  assert found.max_boxes == plain.max_boxes
  for i in range(len(plain)):
    a, b = plain[i], found[i]
    assert [plain.categories[k] for k in a.labels] == [run[k] for k in b.labels]
    assert b.labels.dtype == np.int32
    np.testing.assert_array_equal(a.boxes, b.boxes)


def test_detections_of_any_class_are_scored(sources):
  plain, found, run = sources
  truth = found.ground_truth()
  assert truth['annotations'] == plain.ground_truth()['annotations']
  rows = [{k: a[k] for k in ('image_id', 'category_id', 'bbox')} | {'score': 0.9}
          for a in truth['annotations']]
  perfect = coco.score(plain.ground_truth(), rows)
  stray = [rows[0] | {'category_id': 50, 'score': 0.99}]
  for scorer in ('hotcoco', 'pycocotools'):
    scores = coco.score(truth, rows + stray, scorer=scorer)
    assert scores.figures == pytest.approx(perfect.figures)
    assert [c.name for c in scores.per_class] == [c.name for c in run]


@pytest.mark.parametrize('wrong, message', [
    (lambda c: c._replace(name=c.name.upper()), r"label 0 is '(\w+)' .* here and '(?!\1)\w+'"),
    (lambda c: c._replace(id=77, name='x'), r'label 0 is .* here and no class in the run')])
def test_other_classes(sources, wrong, message):
  plain, _, run = sources
  with pytest.raises(InputError, match=message):
    build_source(BLOCK, categories=[wrong(c) if c == plain.categories[0] else c for c in run])
