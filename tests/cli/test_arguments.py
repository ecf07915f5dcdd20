"""Tests mistakes on the command line, before anything is read."""

import argparse
import json

import pytest
from tiny import tiny_config

from ppn_jax.cli.flags import open_model
from ppn_jax.cli.main import main
from ppn_jax.detection.structures import Category
from ppn_jax.errors import InputError
from ppn_jax.run import create_run


@pytest.mark.parametrize('arguments, message', [
    ('train configs/x.py', "'configs/x.py'; did you mean --config=configs/x.py?"),
    ('train configs/x.py:coco --workdir w', 'did you mean --config=configs/x.py:coco?'),
    ('train --config x.py --workdir=w train.steps=3', 'did you mean --config.train.steps=3?'),
    ('train --config x.py --workdir=w config.seed=3', 'did you mean --config.seed=3?'),
    ('train quickstart --workdir=w', 'did you mean --config=quickstart?'),
    ('train --config=x.py runs/a', 'did you mean --workdir=runs/a?'),
    ('data configs/x.py', 'did you mean --config=configs/x.py?'),
    ('plan configs/x.py', 'did you mean --config=configs/x.py?'),
    ('summary configs/x.py', 'did you mean --config=configs/x.py?'),
    ('prepare configs/x.py', 'did you mean --config=configs/x.py?'),
    ('evaluate runs/a', 'did you mean --workdir=runs/a?'),
    ('evaluate --workdir=a step=3', 'did you mean --step=3?'),
    ('export --workdir=a model.onnx', 'did you mean --output=model.onnx?'),
    ('import-tf model.ckpt', 'did you mean --checkpoint=model.ckpt?'),
    ('tran', "did you mean 'train'?"),
    ('train --workdri=x', 'did you mean'),
    ('train --config=x.py --workdir=w --config.train.steps', 'write --config.train.steps=VALUE')])
def test_a_mistake_is_answered_in_one_line(arguments, message, capsys):
  assert main(arguments.split()) == 2
  error = capsys.readouterr().err
  assert message in error and error.count('\n') == 1


def test_values_after_their_flags_are_taken(capsys):
  # Up to the file that does not exist.
  assert main(['train', '--config', 'no/such.py', '--workdir', 'w']) == 2
  assert "no file 'no/such.py'" in capsys.readouterr().err


def test_version(capsys):
  assert main(['--version']) == 0
  line = capsys.readouterr().out
  assert all(name in line for name in ('ppn_jax', 'jax ', 'Python'))


@pytest.mark.parametrize('entry, message', [
    ('data.eval_fraction=0.2', '--config.data.eval_fraction=0.2: which images'),
    ('data.eval_fraction=0.3', '--config.data.eval_fraction=0.3: which images'),
    ('seed=1', r'--config.seed=1: which .* training began \(seed=0\)'), ('data.threads=3', '')])
def test_which_images_are_held_out_is_decided_when_training_begins(tmp_path, entry, message):
  config = tiny_config().copy_and_resolve_references().unlock()
  config.data.eval_fraction = 0.0 if message.startswith('--config.data.eval_fraction=0.2') else 0.2
  create_run(tmp_path, config, (Category(1, 'cat'),)).save()
  args = argparse.Namespace(workdir=str(tmp_path), model=None, allow=[],
                            overrides=[f'--config.{entry}'])
  if message:
    with pytest.raises(InputError, match=message):
      open_model(args)
  else:
    assert open_model(args).config.data.threads == 3


def test_unknown_keys_are_reported(tmp_path, capsys):
  create_run(tmp_path, tiny_config(), (Category(1, 'cat'),)).save()
  written = json.loads((tmp_path / 'config.json').read_text())
  (tmp_path / 'config.json').write_text(json.dumps(written | {'optim_': 3}))
  open_model(argparse.Namespace(workdir=str(tmp_path), model=None, allow=[], overrides=[]))
  assert 'does not know and ignores: optim_' in capsys.readouterr().err
