"""The formats of `ppn detect`, tiles, and streams."""

import csv
import functools
import http.server
import json
import threading

import numpy as np
import pytest
from PIL import Image
from test_detect import command_lines, detect, draw, film
from tiny import untrained_run

import ppn_jax
from ppn_jax.cli.main import main
from ppn_jax.data.images.video import LiveReader
from ppn_jax.errors import InputError
from ppn_jax.jobs.detection_files import file_name, is_live


@pytest.fixture(scope='module')
def run(tmp_path_factory):
  return untrained_run(tmp_path_factory.mktemp('run'))


@pytest.fixture
def shown(run):
  """Returns a threshold that a few boxes of the picture of `draw` reach, and these boxes."""
  image = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
  scores = ppn_jax.load(run, batch_size=4)(image).scores
  threshold = float(scores[2])
  return threshold, ppn_jax.load(run, batch_size=4)(image, threshold=threshold)


@pytest.mark.slow
def test_all_formats(run, tmp_path, shown, capsys):
  threshold, found = shown
  draw(tmp_path / 'a.png')
  argv = ['detect', f'--workdir={run}', str(tmp_path / 'a.png'), f'--threshold={threshold}']
  assert main([*argv, f'--output={tmp_path / "out"}', '--format=csv,yolo,crops,jsonl,csv']) == 0
  printed = capsys.readouterr()
  line, = printed.out.splitlines()
  assert '1 picture and detections.csv and labels and crops' in printed.err
  entry = json.loads(line)
  assert [d['score'] for d in entry['detections']] == found.scores.tolist()
  assert (entry['width'], entry['height'], 'frame' in entry) == (64, 48, False)
  out = tmp_path / 'out'
  assert sorted(p.name for p in out.iterdir()) == ['classes.txt', 'crops', 'detections.csv',
                                                   'labels']
  rows = list(csv.DictReader((out / 'detections.csv').open()))
  assert [row['category'] for row in rows] == list(found.names)
  corners = [[float(row[key]) for key in ('xmin', 'ymin', 'xmax', 'ymax')] for row in rows]
  np.testing.assert_allclose(corners, found.xyxy, rtol=1e-4, atol=1e-4)
  assert (out / 'classes.txt').read_text() == 'circle\nsquare\nstar\n'
  labels = np.loadtxt(out / 'labels/a.txt', ndmin=2)
  np.testing.assert_array_equal(labels[:, 0], found.labels)
  centre, side = labels[:, 1:3] * [64, 48], labels[:, 3:] * [64, 48]
  np.testing.assert_allclose(np.concatenate([centre - side / 2, centre + side / 2], axis=1),
                             found.xyxy, atol=1e-3)
  crops = sorted((out / 'crops').rglob('*.jpg'), key=lambda p: p.name)
  assert [p.parent.name for p in crops] == list(found.names)
  for path, (xmin, ymin, xmax, ymax) in zip(crops, found.xyxy, strict=True):
    width, height = Image.open(path).size
    assert abs(width - (xmax - xmin)) < 2 and abs(height - (ymax - ymin)) < 2


def test_lines_alone_need_no_folder(run, tmp_path, monkeypatch, capsys):
  monkeypatch.chdir(tmp_path)
  draw(tmp_path / 'a.png')
  film(tmp_path / 'b.avi', frames=5)
  argv = ['detect', f'--workdir={run}', 'a.png', 'b.avi', '--format=jsonl', '--frames=3']
  assert main(argv) == 0
  lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
  assert [(line['file'], line.get('frame')) for line in lines] == [
      ('a.png', None), ('b.avi', 0), ('b.avi', 1), ('b.avi', 2)]
  assert sorted(p.name for p in tmp_path.iterdir()) == ['a.png', 'b.avi']


def test_without_output_it_writes_to_detections(run, tmp_path, monkeypatch, capsys):
  monkeypatch.chdir(tmp_path)
  draw(tmp_path / 'a.png')
  assert main(['detect', f'--workdir={run}', 'a.png']) == 0
  assert {p.name for p in (tmp_path / 'detections').iterdir()} == {'a.png', 'detections.json'}


@pytest.mark.parametrize('arguments, message', [
    (['--format=jsonl,cvs'], "did you mean 'csv'?"), (['--format='], '--format='),
    (['--tiles=0', '--output=o'], 'tiles=0'), (['--overlap=.9', '--output=o'], 'overlap=0.9'),
    (['--frames=0', '--output=o'], '--frames=0'), (['7', '--output=o'], 'camera 7: no picture'),
    (['7', '8', '--output=o'], 'one camera or stream at a time'),
    (['http://127.0.0.1:9/x', '--output=o'], 'http://127.0.0.1:9/x: no picture')])
def test_mistakes(run, tmp_path, monkeypatch, capsys, arguments, message):
  monkeypatch.chdir(tmp_path)
  draw(tmp_path / 'a.png')
  images = ['a.png'] if all(a.startswith('--') for a in arguments) else []
  assert main(['detect', f'--workdir={run}', *images, *arguments]) == 2
  assert message in command_lines(capsys)[-1]
  assert [p.name for p in tmp_path.iterdir()] == ['a.png']


@pytest.mark.slow
def test_tiles(run, tmp_path):
  image = draw(tmp_path / 'a.png', size=(150, 200))
  entry, = detect(run, tmp_path / 'out', tmp_path / 'a.png', '--tiles=2')
  detector = ppn_jax.load(run, batch_size=4)
  found = detector(image, tiles=2)
  assert [d['score'] for d in entry['detections']] == found.scores.tolist()
  assert (np.diff(found.scores) <= 0).all() and (found.xyxy >= 0).all()
  assert (found.xyxy <= [200, 150, 200, 150]).all()
  plain = detector(image)
  assert len(found.scores) > len(plain.scores)  # An untrained detector finds boxes everywhere.
  # A box of the whole picture is kept unless a better one of a tile suppresses it.
  best = max(plain.scores)
  assert found.scores[0] >= best
  with pytest.raises(InputError, match='tiles=99'):
    detector(image, tiles=99)


@pytest.fixture
def address(tmp_path):
  """Serves a folder on this machine and returns its address."""
  handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=tmp_path)
  handler.log_message = lambda *_: None
  with http.server.ThreadingHTTPServer(('127.0.0.1', 0), handler) as server:
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f'http://127.0.0.1:{server.server_port}'
    server.shutdown()
    thread.join()


@pytest.mark.slow
def test_streams(run, tmp_path, address, capsys):
  film(tmp_path / 'clip.avi', frames=9)
  url = f'{address}/clip.avi'
  entry, = detect(run, tmp_path / 'out', url, '--frames=2', '--format=pictures,json,csv')
  assert entry['file'] == url and len(entry['frames']) <= 2
  assert entry['frames'][0]['frame'] == 0 and entry['frames'][0]['seconds'] >= 0
  assert entry['video'].endswith(file_name(url) + '.mp4')
  assert (tmp_path / 'out/detections.csv').exists()
  with LiveReader(url) as reader:
    frames = list(reader)
  assert reader.size == (48, 64) and len(frames) == reader.count >= 1
  assert reader.count + reader.dropped == 9
  assert abs(int(frames[-1].mean()) - 30 * 8) < 5  # The newest one is never left out.


def test_what_is_live(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  (tmp_path / '1').mkdir()
  assert [is_live(t) for t in ('0', '1', 'a.png', 'rtsp://u:p@host/x', 'gs://bucket/x', 'http:/x')
          ] == [True, False, False, True, False, False]
  assert file_name('rtsp://u:p@host/x?y=/') == 'rtsp_u_p_host_x_y' and file_name('..') == 'unnamed'
