"""Tests `ppn prepare` as users type it: it writes data sets that `ppn train` reads."""

import json
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from time_limits import HANG_SECONDS

from ppn_jax.cli.main import main
from ppn_jax.data.images.decoding import encode_jpeg
from ppn_jax.data.sources.tfds import Tfds
from ppn_jax.errors import InputError

pytest.importorskip('tensorflow_datasets')
REPOSITORY = pathlib.Path(__file__).resolve().parents[2]


def write_coco(folder, images):
  """Writes a folder of images of noise and their ground truth."""
  folder.mkdir()
  pixels = np.random.default_rng(0).integers(0, 255, (200, 300, 3), np.uint8)
  data = encode_jpeg(pixels)
  for i in range(images):
    (folder / f'{i}.jpg').write_bytes(data)
  content = {'images': [{'id': i, 'file_name': f'{i}.jpg', 'height': 200, 'width': 300}
                        for i in range(images)],
             'annotations': [{'image_id': i, 'category_id': 7, 'bbox': [0, 0, 50, 60]}
                             for i in range(images)],
             'categories': [{'id': 7, 'name': 'noise'}]}
  (folder / 'truth.json').write_text(json.dumps(content))


@pytest.fixture
def argv(tmp_path):
  write_coco(tmp_path / 'in', 6)
  flags = [f'--config.data.{split}.{key}={value}' for split in ('train', 'eval')
           for key, value in (('images', tmp_path / 'in'),
                              ('annotations', tmp_path / 'in' / 'truth.json'))]
  return ['prepare', f'--config={REPOSITORY}/configs/coco_json.py', *flags, '--name=noise',
          f'--output={tmp_path / "out"}', '--processes=1']


def test_a_missing_image_is_left_out_as_the_message_says(argv, tmp_path, capsys):
  (tmp_path / 'in' / '3.jpg').unlink()
  assert main(argv) == 2
  assert '3.jpg; a few such images can be skipped (--on_bad_image=skip)' in (
      capsys.readouterr().err)
  assert main([*argv, '--on_bad_image=skip', '--max_bad=0.5']) == 0
  err = capsys.readouterr().err
  assert 'data.train: 1 image cannot be read and skipped, such as: ' in err
  assert len(Tfds(data_dir=str(tmp_path / 'out' / 'noise' / '1.0.0'))) == 5


def test_prepares_both_splits(argv, tmp_path, capsys):
  assert main([*argv, '--max_side=64', '--shards=2']) == 0
  out, err = capsys.readouterr()
  assert "6 images in 'train', 6 images in 'eval': " in out and 'ppn:' not in err
  source = Tfds('noise', 'eval', str(tmp_path / 'out'))
  assert source[0].image.shape == (43, 64, 3) and source[0].size == (200, 300)
  assert [tuple(c) for c in source.categories] == [(7, 'noise')]
  assert main([*argv, '--max_side=64']) == 0
  assert 'exists already' in capsys.readouterr().err


def test_the_policy_of_the_config_applies_and_stored_images_are_counted(argv, tmp_path, capsys):
  (tmp_path / 'in' / '3.jpg').write_bytes(b'junk')
  assert main([*argv, '--splits=train']) == 2
  assert '--on_bad_image=skip' in capsys.readouterr().err
  argv = [*argv, '--splits=train', '--config.data.on_bad_example=skip']
  assert main(argv) == 2
  assert 'more than the share 0.01 that --max_bad allows' in capsys.readouterr().err
  assert main([*argv, '--config.data.max_bad_share=0.2']) == 0
  out, err = capsys.readouterr()
  assert "5 images in 'train' (1 left out): " in out and 'left out image 3: ' in err


def test_one_split(argv, tmp_path):
  assert main([*argv, '--splits=eval', '--config.data.train.images=/nowhere']) == 0
  folder = tmp_path / 'out' / 'noise' / '1.0.0'
  assert {p.name.split('.')[0] for p in folder.glob('*record*')} == {'noise-eval'}


def test_a_fraction_of_the_training_images_becomes_the_other_split(argv, tmp_path, capsys):
  train = [a for a in argv if not a.startswith('--config.data.eval.')]
  assert main(train) == 2
  assert 'or --splits=train' in capsys.readouterr().err
  assert main([*train, '--config.data.eval_fraction=0.3']) == 0
  assert "4 images in 'train', 2 images in 'eval': " in capsys.readouterr().out
  ids = [{image['id'] for image in Tfds('noise', split, str(tmp_path / 'out')).ground_truth()[
      'images']} for split in ('train', 'eval')]
  assert ids[0] | ids[1] == set(range(6)) and not ids[0] & ids[1]


def test_evaluation_data_with_some_of_the_classes(argv, tmp_path):
  ground_truth = json.loads((tmp_path / 'in' / 'truth.json').read_text())
  ground_truth['categories'].insert(0, {'id': 3, 'name': 'signal'})
  (tmp_path / 'in' / 'more.json').write_text(json.dumps(ground_truth))
  assert main([*argv, f'--config.data.train.annotations={tmp_path}/in/more.json']) == 0
  source = Tfds('noise', 'eval', str(tmp_path / 'out'))
  assert [c.name for c in source.categories] == ['signal', 'noise']
  np.testing.assert_array_equal(source[0].labels, [1])
  assert source.encoded(0) == (tmp_path / 'in' / '0.jpg').read_bytes()


@pytest.mark.parametrize('flag, message', [
    ('--name=coco', "name 'coco' is that of one of TFDS's own"), ('--name=A', "name is 'A'"),
    ('--splits=test', '--splits=test, legal'), ('--splits=eval,eval', '--splits=eval,eval, legal'),
    ('--output=s3://x/y', 'must be a local folder or gs://BUCKET/FOLDER'),
    ('--max_side=-3', 'max_side is -3'),
    ('--max_sid=3', "unknown flag --max_sid; did you mean '--max_side'"),
    ('--on_bad_image=hide', "legal: 'raise', 'skip'"),
    ('--config.data.train.images=/nowhere', "no folder of images at '/nowhere'"),
    ('--config.data.train.name=', 'config.data.train names no component'),
])
def test_mistakes_are_one_line(argv, flag, message, tmp_path, capsys):
  argv = [a for a in argv if a.partition('=')[0] != flag.partition('=')[0]]
  splits = ['--splits=train'] if flag.endswith('name=') else []
  assert main([*argv, flag, *splits]) == 2
  # Libraries may print warnings of their own.
  error, = (line for line in capsys.readouterr().err.splitlines() if line.startswith('ppn: '))
  assert message in error and not (tmp_path / 'out').exists()


def test_an_output_that_is_a_file(argv, tmp_path, capsys):
  (tmp_path / 'out').write_text('mine')
  assert main(argv) == 2
  error, = (line for line in capsys.readouterr().err.splitlines() if line.startswith('ppn: '))
  assert 'out' in error and (tmp_path / 'out').read_text() == 'mine'


def test_the_flag_of_earlier_versions(argv):
  """`--processes` counts threads now; the fixture gives it."""
  assert main([*(a for a in argv if a != '--processes=1'), '--threads=2']) == 0
  assert main(argv) == 0


@pytest.mark.slow
def test_killed_without_warning_it_leaves_no_data(tmp_path):
  write_coco(tmp_path / 'in', 800)
  argv = ['prepare', f'--config={REPOSITORY}/configs/coco_json.py', '--name=noise',
          f'--config.data.train.images={tmp_path}/in', f'--output={tmp_path}/out',
          f'--config.data.train.annotations={tmp_path}/in/truth.json', '--splits=train',
          '--shards=40', '--threads=1', '--max_side=200']
  process = subprocess.Popen([sys.executable, '-m', 'ppn_jax.cli.main', *argv], cwd=REPOSITORY)
  made, end = tmp_path / 'out' / 'noise', time.time() + HANG_SECONDS
  while len(list(made.glob('incomplete.*_1.0.0/*.array_record-*'))) < 4 and time.time() < end:
    time.sleep(0.005)
  process.send_signal(signal.SIGKILL)
  assert process.wait() == -signal.SIGKILL
  left, = made.iterdir()
  assert left.name.startswith('incomplete.') and len(list(left.glob('*.array_record-*'))) < 40
  for where in (('noise', 'train', str(tmp_path / 'out')), ('', 'train', str(left))):
    with pytest.raises(InputError):
      Tfds(*where)
  assert main(argv) == 0
  assert [p.name for p in made.iterdir()] == ['1.0.0']
  source = Tfds('noise', 'train', str(tmp_path / 'out'))
  assert len(source) == 800 and source[799].image.shape == (133, 200, 3)
