"""Tests `ppn detect` on files, folders, patterns and video; broken pictures: test_commands.py."""

import json

import cv2
import numpy as np
import pytest
from PIL import Image
from tiny import untrained_run

import ppn_jax
from ppn_jax import image_detector
from ppn_jax.cli.detect import _drawing_paths
from ppn_jax.cli.main import main
from ppn_jax.data.images import decoding, video
from ppn_jax.errors import InputError


@pytest.fixture(scope='module')
def run(tmp_path_factory):
  return untrained_run(tmp_path_factory.mktemp('run'))


def draw(path, size=(48, 64), seed=0):
  path.parent.mkdir(parents=True, exist_ok=True)
  image = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
  Image.fromarray(image).save(path)
  return image


def film(path, frames=7, size=(48, 64)):
  """Writes a video whose frame i has one grey, which any decoder returns within a few levels."""
  path.parent.mkdir(parents=True, exist_ok=True)
  video._quiet()  # OpenCV reads its log level once per process.
  codec = 'MJPG' if path.suffix == '.avi' else 'mp4v'
  writer = cv2.VideoWriter(str(path), cv2.CAP_FFMPEG, cv2.VideoWriter_fourcc(*codec), 10.0,
                           size[::-1])
  for i in range(frames):
    writer.write(np.full((*size, 3), 30 * i % 256, np.uint8))
  writer.release()
  return path


def frames_of(path):
  capture, frames = cv2.VideoCapture(str(path)), []
  while (read := capture.read())[0]:
    frames.append(read[1])
  return frames


def command_lines(capture):
  """Returns the lines of the command on stderr, without those that libraries may print."""
  return [line for line in capture.readouterr().err.splitlines() if line.startswith('ppn: ')]


def detect(run, output, *arguments):
  assert main(['detect', f'--workdir={run}', f'--output={output}', *map(str, arguments)]) == 0
  return json.loads((output / 'detections.json').read_text())


@pytest.mark.slow
def test_exported_file(run, tmp_path, capsys):
  pytest.importorskip('flatbuffers', reason="pip install 'ppn_jax[export]'")
  model, picture, output = (tmp_path / name for name in ('model', 'a.png', 'out'))
  assert main(['export', f'--workdir={run}', '--format=stablehlo', f'--output={model}']) == 0
  draw(picture)
  entry, = detect(run, tmp_path / 'run_out', picture)
  assert main(['detect', f'--model={model}', f'--output={output}', str(picture)]) == 0
  assert '(step 6)' in capsys.readouterr().out
  found, = json.loads((output / 'detections.json').read_text())
  assert len(found['detections']) == len(entry['detections'])
  for ours, theirs in zip(found['detections'], entry['detections'], strict=True):
    assert ours['category_id'] == theirs['category_id']
    assert ours['bbox'] == pytest.approx(theirs['bbox'], abs=1e-3)
  for flags, message in [([f'--workdir={model}'], f'given by --model={model}'),
                      ([f'--model={run}'], 'given by --workdir'),
                      ([f'--model={model}', f'--workdir={run}'], 'not allowed with'),
                      ([f'--model={model}', '--step=6'], '--step and --ema choose'),
                      ([f'--model={model}', '--no-ema'], '--step and --ema choose'),
                      ([f'--model={model}', '--batch_size=2'], 'takes 1 images at a time'),
                      ([], '--workdir --model is required')]:
    assert main(['detect', *flags, f'--output={tmp_path}/new', str(picture)]) == 2
    line, = command_lines(capsys)
    assert message in line and not (tmp_path / 'new').exists()


@pytest.mark.slow
def test_patterns_folders_and_files_each_once(run, tmp_path, capsys):
  for name in ('a.png', 'b.jpg', 'deep/er/c.png', 'notes[1].png'):
    draw(tmp_path / 'in' / name)
  (tmp_path / 'in' / 'readme.txt').write_text('no picture')
  found = detect(run, tmp_path / 'out', tmp_path / 'in' / '*.png', tmp_path / 'in',
                 tmp_path / 'in/**/c.*', tmp_path / 'in' / 'notes[1].png')
  assert [entry['file'].rpartition('/')[2] for entry in found] == [
      'a.png', 'notes[1].png', 'b.jpg', 'c.png']
  printed = capsys.readouterr().out
  best = max(d['score'] for entry in found for d in entry['detections'])
  assert '4 pictures' in printed and best < 0.3
  assert f'none scores --threshold=0.3 or more, the best has {best:.2g}\n' in printed


@pytest.mark.slow
def test_other_files_in_a_folder_are_reported(run, tmp_path, monkeypatch, capsys):
  monkeypatch.setenv('HOME', str(tmp_path))
  monkeypatch.setattr(decoding, '_without_end', set())
  for name in ('a.png', 'b.pgm', 'c.jfif', 'more/e.png'):
    draw(tmp_path / 'in' / name)
  cut = tmp_path / 'in' / 'c.jfif'
  cut.write_bytes(cut.read_bytes()[:-2])
  for name in ('d.heic', '._a.png', '.DS_Store'):
    (tmp_path / 'in' / name).write_bytes(b'\0\0\0\x18ftypheic')
  found = detect(run, tmp_path / 'out', '~/in')
  assert [entry['file'].rpartition('/')[2] for entry in found] == ['a.png', 'b.pgm', 'c.jfif']
  printed = capsys.readouterr()
  assert '3 pictures' in printed.out
  assert printed.err.splitlines() == [
      f'ppn: {tmp_path}/in: 1 file not looked at: .heic; 1 folder not looked into: more',
      f'ppn: {cut}: the JPEG lacks its end marker, but no pixel; it is used']
  assert len(detect(run, tmp_path / 'out', '~/in/**')) == 4
  assert capsys.readouterr().err == f'ppn: {tmp_path}/in/**: 1 file not looked at: .heic\n'


def test_drawings_have_different_names_on_any_file_system(tmp_path):
  files = [tmp_path / name for name in ('a.png', 'A.jpg', 'b/a.png', 'a.png.png')]
  names = [drawing.name.lower() for drawing in _drawing_paths(files, tmp_path / 'out')]
  assert len(set(names)) == 4


def test_labels_and_crops_of_pictures_have_different_names_too(tmp_path):
  files = [tmp_path / name for name in ('a.jpg', 'a.png', 'a.jpeg', 'A.webp', 'a.avi')]
  drawings = _drawing_paths(files, tmp_path / 'out')
  assert [d.name for d in drawings] == ['a.jpg', 'a.png.png', 'a.jpeg.jpg', 'A.webp.png', 'a.mp4']


def test_no_drawing_takes_the_place_of_another_picture(tmp_path):
  for name in ('a.jpeg', 'a.jpg', 'b.JPG', 'c.webp'):
    (tmp_path / name).touch()
  for name, drawing in (('a.jpeg', 'a.jpg'), ('b.JPG', 'b.jpg')):
    with pytest.raises(InputError, match=f'would overwrite .*/{drawing}; give another folder'):
      _drawing_paths([tmp_path / name], tmp_path)
  assert _drawing_paths([tmp_path / 'c.webp'], tmp_path) == [tmp_path / 'c.png']
  other = tmp_path / 'out'
  other.mkdir()
  (other / 'a.jpg').touch()  # Of an earlier run.
  assert _drawing_paths([tmp_path / 'a.jpeg'], other) == [other / 'a.jpg']


@pytest.mark.parametrize('name, drawing', [
    ('a.png', 'a.png'), ('a.jpg', 'a.jpg'), ('a.JPEG', 'a.jpg'), ('a.jfif', 'a.jpg'),
    ('a.webp', 'a.png'), ('a.avi', 'a.mp4')])
def test_a_drawing_is_of_the_kind_of_its_picture(tmp_path, name, drawing):
  assert _drawing_paths([tmp_path / name], tmp_path / 'out') == [tmp_path / 'out' / drawing]


@pytest.mark.slow
def test_json_agrees_with_load(run, tmp_path):
  image = draw(tmp_path / 'a.png')
  entry, = detect(run, tmp_path / 'out', tmp_path / 'a.png')
  found = ppn_jax.load(run, batch_size=4)(image)
  assert len(found.names) == len(entry['detections']) > 0
  for name, score, (ymin, xmin, ymax, xmax), row in zip(
      found.names, found.scores, found.boxes.astype(float), entry['detections'], strict=True):
    assert (row['category'], row['score']) == (name, float(score))
    np.testing.assert_allclose(row['bbox'], [xmin, ymin, xmax - xmin, ymax - ymin], rtol=1e-6)
    assert row['category_id'] == {'circle': 0, 'square': 10, 'star': 20}[name]


@pytest.mark.slow
@pytest.mark.parametrize(('name', 'threshold'), [('clip.mp4', 0.001), ('clip.avi', 1)])
def test_video(run, tmp_path, name, threshold, capsys):
  film(tmp_path / name)
  draw(tmp_path / 'clip.png')
  moving, picture = detect(run, tmp_path / 'out', tmp_path / name, tmp_path / 'clip.png',
                          f'--threshold={threshold}')
  assert picture['picture'].endswith('clip.png') and moving['video'].endswith('clip.mp4')
  assert (moving['width'], moving['height'], moving['frames_per_second']) == (64, 48, 10)
  assert [f['frame'] for f in moving['frames']] == list(range(7))
  assert [f['seconds'] for f in moving['frames']] == [i / 10 for i in range(7)]
  assert all(d['score'] >= threshold for f in moving['frames'] for d in f['detections'])
  assert any(f['detections'] for f in moving['frames']) == (threshold < 1)
  drawn, source = frames_of(moving['video']), frames_of(tmp_path / name)
  assert len(drawn) == 7 and drawn[0].shape == (48, 64, 3)
  for number, (ours, theirs) in enumerate(zip(drawn, source, strict=True)):
    changed = np.abs(ours.astype(int) - theirs).max() > 20
    assert changed == bool(moving['frames'][number]['detections'])
  assert not list((tmp_path / 'out').glob('.*'))
  printed = capsys.readouterr().out
  assert '1 picture, 1 video' in printed and ('no box is drawn' in printed) == (threshold == 1)


@pytest.mark.slow
def test_video_that_cannot_be_read(run, tmp_path, capfd):
  (tmp_path / 'bad.mp4').write_bytes(film(tmp_path / 'good.mp4').read_bytes()[:300])
  argv = ['detect', f'--workdir={run}', f'--output={tmp_path / "out"}', str(tmp_path / 'bad.mp4')]
  assert main(argv) == 2
  assert command_lines(capfd) == [
      f'ppn: error: {tmp_path / "bad.mp4"}: not a video that can be read']
  assert not (tmp_path / 'out').exists()
  assert main([*argv, str(tmp_path / 'good.mp4')]) == 2
  lines = command_lines(capfd)
  assert len(lines) == 2 and 'skipped' in lines[0] and '1 of 2 files' in lines[1]
  assert len(json.loads((tmp_path / 'out' / 'detections.json').read_text())) == 1


def test_video_that_ends_early_is_named(run, tmp_path, capfd):
  whole = film(tmp_path / 'a.avi', frames=60).read_bytes()
  (tmp_path / 'a.avi').write_bytes(whole[:len(whole) // 2])
  entry, = detect(run, tmp_path / 'out', tmp_path / 'a.avi')
  assert 0 < len(entry['frames']) < 50
  assert f'a.avi ends after {len(entry["frames"])} of 60 frames' in capfd.readouterr().err


@pytest.mark.parametrize('arguments, message', [
  (['none/*.jpg'], 'no picture or video matches none/*.jpg'),
  (['*.txt'], 'no picture or video matches *.txt'),
  (['.'], 'folder . has no pictures or videos'),
  (['clip.mp4', '--output=.'], 'would overwrite clip.mp4'),
  (['clip.mp4', '--threshold=nan'], '--threshold=nan'),
  (['clip.mp4', '--batch_size=0'], 'batch_size=0'),
  (['clip.mp4', '--ema'], 'ema_decay'),
])
def test_mistakes(run, tmp_path, monkeypatch, capsys, arguments, message):
  monkeypatch.chdir(tmp_path)
  (tmp_path / 'a.txt').write_text('')
  if 'clip.mp4' in arguments:
    film(tmp_path / 'clip.mp4')
  before = {p: p.read_bytes() for p in tmp_path.iterdir()}
  assert main(['detect', f'--workdir={run}', '--output=out', *arguments]) == 2
  assert message in command_lines(capsys)[-1]
  assert {p: p.read_bytes() for p in tmp_path.iterdir()} == before


@pytest.mark.parametrize('command', ['detect', 'serve'])
def test_matmul_dtype_reaches_the_detector(monkeypatch, tmp_path, run, command):
  if command == 'serve':
    pytest.importorskip('starlette', reason="pip install 'ppn_jax[serve]'")
  draw(tmp_path / 'a.png')
  given = []

  def load(path, **options):
    given.append(options['matmul_dtype'])
    raise InputError('loaded')

  monkeypatch.setattr(image_detector, 'load', load)
  arguments = [str(tmp_path / 'a.png'), f'--output={tmp_path / "found"}']
  for flags in ([], ['--matmul_dtype=bfloat16']):
    assert main([command, f'--workdir={run}', *flags,
                 *(arguments if command == 'detect' else [])]) == 2
  assert given == [None, 'bfloat16']
