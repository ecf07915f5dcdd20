"""Tests the files of an evaluation, and that a failure to draw loses no metrics."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from ml_collections import ConfigDict
from tiny import untrained_run

from ppn_jax.data.bad_examples import BadExamples
from ppn_jax.data.sources import scans
from ppn_jax.data.sources.synthetic import SyntheticShapes
from ppn_jax.errors import InputError
from ppn_jax.jobs import evaluate as evaluate_job
from ppn_jax.metrics import coco
from ppn_jax.run import Run


class Damaged(SyntheticShapes):
  """Source whose first image, or every image, cannot be read."""

  def __init__(self, every=False):
    super().__init__(num_images=5, image_size=64)
    self._every = every

  def __getitem__(self, index):
    if self._every or index == 0:
      raise InputError(f'{index}.jpg: damaged')
    return super().__getitem__(index)


def test_contact_sheets_have_only_readable_images():
  source = Damaged()
  sheets = [evaluate_job.draw_contact_sheet(source, [], source.categories, count=count)
            for count in (2, 5)]
  for sheet, count in zip(sheets, (2, 4), strict=True):
    blank = np.zeros((400, 400, 3), np.uint8)
    assert sheet.shape == evaluate_job.contact_sheet([blank] * count).shape
  with pytest.raises(InputError, match=r'none of the images can be read.* the first: 0\.jpg'):
    evaluate_job.draw_contact_sheet(Damaged(every=True), [], source.categories, count=2)


def test_scores_are_written_before_anything_is_drawn(tmp_path, monkeypatch):
  source = SyntheticShapes(num_images=2, image_size=64)
  evaluator = SimpleNamespace(
      source=source, bad=BadExamples('data.eval', 2), rows=lambda variables, on_images: [],
      score=lambda rows: coco.score(source.ground_truth(), rows))

  def fail(*_, **__):
    raise MemoryError

  monkeypatch.setattr(evaluate_job, 'draw_contact_sheet', fail)
  run = SimpleNamespace(categories=source.categories, stamp=lambda step: None,
                        config=SimpleNamespace(optim=SimpleNamespace(ema_decay=0)))
  job = evaluate_job.EvaluationJob(run, SimpleNamespace(num_levels=1), evaluator,
                                   evaluate_job.EvaluationOptions(pictures=2))
  with pytest.raises(MemoryError):
    job.evaluate(3, None, tmp_path / '3')
  assert json.loads((tmp_path / '3' / 'scores.json').read_text())['figures']['AP'] == 0
  assert json.loads((tmp_path / '3' / 'results.json').read_text()) == []


def test_a_run_is_evaluated_with_the_scans_of_its_workdir(tmp_path, monkeypatch):
  seen = []
  encoded = scans.encode(scans.Scan([], {3: 'broken'}))

  def build(run, detector, mesh, scorer):
    scan = lambda: seen.append('scanned') or scans.decode(encoded)
    return scans.scanned(lambda: 'the data', scan)

  monkeypatch.setattr(evaluate_job, 'build_evaluator', build)
  open_evaluator = evaluate_job._open_evaluator
  for _ in range(2):
    found = open_evaluator(Run(tmp_path, ConfigDict(), ()), None, None, 'hotcoco')
    assert found.unreadable == {3: 'broken'}
  assert seen == ['scanned']
  open_evaluator(SimpleNamespace(), None, None, 'hotcoco')  # A weights file has no workdir.
  assert seen == ['scanned'] * 2


def test_another_matmul_dtype_needs_a_folder_of_its_own(tmp_path):
  run = untrained_run(tmp_path / 'run')
  options = evaluate_job.EvaluationOptions(matmul_dtype='bfloat16')
  with pytest.raises(InputError, match='matmul_dtype is given, so give output=DIR'):
    evaluate_job.evaluate(run, options=options)
  config = SimpleNamespace(optim=SimpleNamespace(ema_decay=0))
  job = evaluate_job.EvaluationJob(SimpleNamespace(config=config), None,
                                   SimpleNamespace(source=range(3)), options)
  assert job.conditions() == {'average': False, 'images': 3, 'matmul_dtype': 'bfloat16'}
