"""Data whose classes are a subset of the run's."""

import json
import types

import numpy as np
import pytest
from PIL import Image

from ppn_jax.data.bad_examples import BadExamples
from ppn_jax.data.report import report
from ppn_jax.data.source import build_source, file_ids
from ppn_jax.detection.structures import Category
from ppn_jax.errors import InputError
from ppn_jax.jobs import evaluate as evaluate_job
from ppn_jax.metrics import coco

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
    assert scores.metrics == pytest.approx(perfect.metrics)
    assert [c.name for c in scores.per_class] == [c.name for c in run]


@pytest.mark.parametrize('wrong, message', [
    (lambda c: c._replace(name=c.name.upper()), r"label 0 is '(\w+)' .* here and '(?!\1)\w+'"),
    (lambda c: c._replace(id=77, name='x'), r'label 0 is .* here and no class in the run')])
def test_other_classes(sources, wrong, message):
  plain, _, run = sources
  with pytest.raises(InputError, match=message):
    build_source(BLOCK, categories=[wrong(c) if c == plain.categories[0] else c for c in run])


def renumbered(sources):
  """Returns the data for a run that numbers the classes differently and has another one."""
  plain, _, _ = sources
  run = tuple(Category(i, c.name) for i, c in enumerate(reversed(plain.categories), 2))
  run = (Category(1, 'own'), *run)
  return plain, build_source(BLOCK, categories=run), run


def test_classes_of_other_ids_are_matched_by_name(sources):
  plain, found, run = renumbered(sources)
  for i in range(len(plain)):
    a, b = plain[i], found[i]
    assert [plain.categories[k].name for k in a.labels] == [run[k].name for k in b.labels]
  truth, names = found.ground_truth(), {c.id: c.name for c in run}
  assert truth['categories'] == [c._asdict() for c in run]
  own = {c.id: c.name for c in plain.categories}
  assert [names[a['category_id']] for a in truth['annotations']] == [
      own[a['category_id']] for a in plain.ground_truth()['annotations']]


def test_results_have_the_ids_of_the_data_s_own_file(sources):
  plain, found, run = renumbered(sources)
  rows = [{k: a[k] for k in ('image_id', 'category_id', 'bbox')} | {'score': 0.9}
          for a in found.ground_truth()['annotations']]
  assert coco.score(found.ground_truth(), rows).metrics['AP'] == pytest.approx(1)
  written = coco.renumber(rows, file_ids(found))
  assert coco.score(plain.ground_truth(), written).metrics['AP'] == pytest.approx(1)
  ids = file_ids(found)
  assert len(set(ids.values())) == len(run)  # The class that the file lacks has an id of its own.
  assert coco.renumber(written, {theirs: ours for ours, theirs in ids.items()}) == rows
  assert coco.renumber(rows, file_ids(plain)) == rows


def test_a_note_tells_that_classes_were_matched_by_name(tmp_path):
  Image.new('RGB', (40, 20)).save(tmp_path / '0.jpg')
  (tmp_path / 'a.json').write_text(json.dumps({
      'images': [dict(id=0, file_name='0.jpg', height=20, width=40)],
      'categories': [dict(id=7, name='red'), dict(id=2, name='blue')],
      'annotations': [dict(image_id=0, category_id=7, bbox=[1, 2, 10, 10])]}))
  block = dict(name='coco_json', images=str(tmp_path), annotations=str(tmp_path / 'a.json'))
  source = build_source(block, categories=(Category(1, 'red'), Category(2, 'blue')))
  assert ("data.eval: classes are matched by name: 'red' has the id 7 here and 1 in the run"
          in report(source, 'data.eval').lines)
  assert source[0].labels.tolist() == [0]
  with pytest.raises(InputError, match=r"'red' \(id 7\) here and no class .*did you mean"):
    build_source(block, categories=(Category(1, 'rad'), Category(2, 'blue')))


def test_an_evaluation_writes_the_ids_of_the_data_s_own_file(sources, tmp_path):
  plain, found, run = renumbered(sources)
  rows = [{k: a[k] for k in ('image_id', 'category_id', 'bbox')} | {'score': 0.9, 'level': 0}
          for a in found.ground_truth()['annotations']]
  evaluator = types.SimpleNamespace(
      source=found, bad=BadExamples('data.eval', len(found)), rows=lambda *_, **__: rows,
      score=lambda rows: coco.score(found.ground_truth(), rows))
  optim = types.SimpleNamespace(ema_decay=0)
  of_run = types.SimpleNamespace(stamp=lambda step: None, categories=run,
                                 config=types.SimpleNamespace(optim=optim))
  job = evaluate_job.EvaluationJob(of_run, types.SimpleNamespace(num_levels=1), evaluator,
                                   evaluate_job.EvaluationOptions(pictures=0))
  made = job.evaluate(1, {}, tmp_path)
  assert made.scores.metrics['AP'] == pytest.approx(1)
  assert [c.name for c in made.scores.per_class] == [c.name for c in run]
  written = json.loads((tmp_path / 'results.json').read_text())
  assert coco.score(plain.ground_truth(), written).metrics['AP'] == pytest.approx(1)
