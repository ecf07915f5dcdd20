"""A run whose input is no square and letterboxed, from training to an exported file."""

import json

import numpy as np
import pytest
from tiny import tiny_config

import ppn_jax
from ppn_jax.cli.main import main
from ppn_jax.config_files import override
from ppn_jax.data.source import build_source
from ppn_jax.jobs import train as train_job
from ppn_jax.run import open_run

ENTRIES = ['model.image_size=48,96', 'data.resize_mode=letterbox', 'data.train.image_size=64,128',
           'data.eval.image_size=96,64']


def config_with(*entries):
  return override(tiny_config(), [*ENTRIES, *entries])


@pytest.mark.slow
def test_resident_data_of_a_run(tmp_path):
  train_job.train(config_with('data.resident.enabled=True', 'train.steps=2'), tmp_path)
  assert np.isfinite([line['train/loss'] for line in open_run(tmp_path).metrics()
                      if 'train/loss' in line]).all()


@pytest.mark.slow
def test_a_run_and_what_is_made_of_it(tmp_path, capsys):
  pytest.importorskip('flatbuffers', reason="pip install 'ppn_jax[export]'")
  run = tmp_path / 'run'
  train_job.train(config_with(), run)
  assert json.loads((run / 'config.json').read_text())['model']['image_size'] == [48, 96]
  assert main(['evaluate', f'--workdir={run}']) == 0
  results, = run.glob('evaluation/6/results.json')
  rows = json.loads(results.read_text())
  right, bottom = np.array([np.add(r['bbox'][:2], r['bbox'][2:]) for r in rows]).T
  # In pixels of pictures of 96 x 64, which fill 48 x 32 of the input.
  assert 90 < bottom.max() <= 96.01 and 60 < right.max() <= 64.01
  picture = build_source(dict(name='synthetic_shapes', num_images=1, image_size=(96, 64)))[0].image
  found = ppn_jax.load(run)(picture, threshold=0.0)
  assert len(found.boxes) and (found.boxes <= [96, 64, 96, 64]).all()
  for output, flags in (('a', ['--format=stablehlo']), ('b.safetensors', ['--format=weights'])):
    assert main(['export', f'--workdir={run}', f'--output={tmp_path / output}', *flags]) == 0
    again = ppn_jax.load(tmp_path / output)(picture, threshold=0.0)
    np.testing.assert_allclose(again.boxes, found.boxes, atol=1e-3)
  capsys.readouterr()
  assert main(['summary', f'--workdir={run}']) == 0
  assert '48x96 px, 5 classes' in capsys.readouterr().out
