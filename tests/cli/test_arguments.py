"""Mistakes on the command line, before anything is read."""

import pytest

from ppn_jax.cli.main import main


@pytest.mark.parametrize('arguments, said', [
    ('train configs/x.py', "'configs/x.py'; did you mean --config=configs/x.py?"),
    ('train configs/x.py:coco --workdir w', 'did you mean --config=configs/x.py:coco?'),
    ('train --config x.py --workdir=w train.steps=3', 'did you mean --config.train.steps=3?'),
    ('train --config x.py --workdir=w config.seed=3', 'did you mean --config.seed=3?'),
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
def test_a_mistake_is_answered_in_one_line(arguments, said, capsys):
  assert main(arguments.split()) == 2
  error = capsys.readouterr().err
  assert said in error and error.count('\n') == 1


def test_values_after_their_flags_are_taken(capsys):
  # Up to the file that does not exist.
  assert main(['train', '--config', 'no/such.py', '--workdir', 'w']) == 2
  assert "no file 'no/such.py'" in capsys.readouterr().err


def test_version(capsys):
  assert main(['--version']) == 0
  line = capsys.readouterr().out
  assert all(name in line for name in ('ppn_jax', 'jax ', 'Python'))


def test_which_images_are_kept_back_is_not_for_evaluation_to_decide(capsys):
  assert main(['evaluate', '--workdir=w', '--output=o', '--config.data.eval_fraction=0.2']) == 2
  assert 'decided when training begins' in capsys.readouterr().err
