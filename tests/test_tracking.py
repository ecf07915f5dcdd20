"""Ids over the frames of a video: the tracker, `ImageDetector.stream` and `ppn detect --track`.

The detector finds coloured squares by their pixels, so that the truth is known in every frame.
"""

import csv
import functools
import http.server
import json
import sys
import threading

import numpy as np
import pytest

import ppn_jax
from ppn_jax.cli import detect
from ppn_jax.cli.main import main
from ppn_jax.data.images import video
from ppn_jax.detection.structures import Category, Detections
from ppn_jax.errors import InputError
from ppn_jax.tracking import Tracker
from ppn_jax.visualization import drawing

SIZE = 120, 160
SIDE = 20
COLOURS = {'red': (255, 0, 0), 'green': (0, 255, 0), 'blue': (0, 0, 255)}
LABELS = {'red': 0, 'green': 0, 'blue': 1}


@pytest.fixture
def library():
  return pytest.importorskip('trackforge', reason="pip install 'ppn_jax[track]'")


def places(frame):
  """Returns colour -> top left corner (y, x): two squares that pass, and a third one later."""
  found = {'red': (10, 5 + 8 * frame), 'green': (60, 135 - 8 * frame)}
  if frame in (7, 8):
    del found['red']  # Not seen for a moment.
  if frame >= 5:
    found['blue'] = (90, 20)
  return found


def frame_pixels(frame):
  image = np.zeros((*SIZE, 3), np.uint8)
  for colour, (y, x) in places(frame).items():
    image[y:y + SIDE, x:x + SIDE] = COLOURS[colour]
  return image


FRAMES = 14


class ColourDetector:
  """A predictor that finds squares by their colour; its scores change the order of the boxes."""
  categories = Category(3, 'square'), Category(7, 'tile')
  step, batch_size, point = None, 4, None

  def __init__(self):
    self.count = 0

  def __call__(self, images):
    return [self.find(image) for image in images]

  def find(self, image):
    self.count += 1
    found = []
    for k, (colour, value) in enumerate(COLOURS.items()):
      ys, xs = np.nonzero((np.abs(image.astype(int) - value) < 100).all(axis=-1))
      if len(ys) > SIDE:
        score = 0.9 - 0.1 * ((k + self.count) % 3)
        found.append((score, [ys.min(), xs.min(), ys.max() + 1, xs.max() + 1], LABELS[colour]))
    found.append((0.1, [0, 0, 30, 30], 0))  # Noise.
    found.sort(reverse=True)
    scores, boxes, labels = zip(*found, strict=True)
    return Detections(np.float32(boxes) / np.float32([*SIZE] * 2), np.float32(scores),
                      np.int32(labels), np.zeros(len(found), np.int32),
                      np.ones(len(found), bool))


def colour_at(frame, corner):
  """Returns which square has a corner (y, x) near the given one."""
  return min(places(frame), key=lambda colour: np.abs(np.subtract(places(frame)[colour],
                                                                  corner)).sum())


def make_film(path):
  video._quiet()
  with video.VideoWriter(path, SIZE, 10.0) as writer:
    for frame in range(FRAMES):
      writer.write(frame_pixels(frame))
  return str(path)


@pytest.fixture
def film(tmp_path):
  return make_film(tmp_path / 'a.mp4')


@pytest.fixture
def notes(monkeypatch):
  """Puts the detector of colours in the place of a model; returns the notes of drawn boxes."""
  monkeypatch.setattr(detect, '_load',
                      lambda args, usual_batch: ppn_jax.ImageDetector(ColourDetector()))
  drawn, draw = [], drawing.draw_boxes
  monkeypatch.setattr(drawing, 'draw_boxes',
                      lambda *args, notes: drawn.append(notes) or draw(*args, notes=notes))
  return drawn


def command(*arguments):
  return main(['detect', '--model=ppn_voc', *map(str, arguments)])


def test_ids_persist_and_agree_in_all_formats(library, film, tmp_path, notes, capsys):
  assert command(film, '--track', f'--output={tmp_path}/out',
                 '--format=pictures,json,jsonl,csv') == 0
  lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
  assert [len(line['detections']) for line in lines] == [len(places(i)) for i in range(FRAMES)]
  ids = {}
  for line in lines:
    for row in line['detections']:
      x, y, *_ = row['bbox']
      ids.setdefault(colour_at(line['frame'], (y, x)), set()).add(row['track_id'])
  # One id each, from first to last frame; the third square got the next one.
  assert {colour: len(each) for colour, each in ids.items()} == {'red': 1, 'green': 1, 'blue': 1}
  assert ids['red'] | ids['green'] == {1, 2} and ids['blue'] == {3}
  entry, = json.loads((tmp_path / 'out/detections.json').read_text())
  assert [f['detections'] for f in entry['frames']] == [line['detections'] for line in lines]
  assert notes == [[f'#{row["track_id"]}' for row in line['detections']] for line in lines]
  rows = list(csv.DictReader((tmp_path / 'out/detections.csv').open()))
  assert [(int(row['frame']), int(row['track_id'])) for row in rows] == [
      (line['frame'], row['track_id']) for line in lines for row in line['detections']]


def test_each_video_counts_from_one(library, film, tmp_path, notes, capsys):
  make_film(tmp_path / 'b.mp4')
  assert command(film, tmp_path / 'b.mp4', '--track', '--format=jsonl', '--frames=2') == 0
  lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
  assert [{row['track_id'] for row in line['detections']} for line in lines] == [{1, 2}] * 4


def test_streams_have_ids(library, film, tmp_path, notes, capsys):
  handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=tmp_path)
  handler.log_message = lambda *_: None
  with http.server.ThreadingHTTPServer(('127.0.0.1', 0), handler) as server:
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
      code = command(f'http://127.0.0.1:{server.server_port}/a.mp4', '--track', '--frames=1',
                     '--format=jsonl')
    finally:
      server.shutdown()
      thread.join()
  assert code == 0
  line, = map(json.loads, capsys.readouterr().out.splitlines())
  # A stream gives the newest frame, which may be any of the film.
  ids = [row['track_id'] for row in line['detections']]
  assert len(ids) >= 2 and sorted(ids) == list(range(1, len(ids) + 1))


def test_without_it_nothing_has_ids(film, tmp_path, notes, capsys):
  assert command(film, '--frames=1', f'--output={tmp_path}/out', '--format=pictures,jsonl,csv') == 0
  assert 'track_id' not in capsys.readouterr().out and notes == [None]
  assert 'track_id' not in (tmp_path / 'out/detections.csv').read_text()


def test_stream_in_python(library):
  detector = ppn_jax.ImageDetector(ColourDetector())
  frames = [frame_pixels(i) for i in range(FRAMES)]
  found = list(detector.stream(frames, threshold=0.3, track=True, frames_per_second=10))
  ids = [dict(zip(map(functools.partial(colour_at, i), one.boxes[:, :2]), one.track_ids.tolist(),
                  strict=True)) for i, one in enumerate(found)]
  assert [set(each) for each in ids] == [set(places(i)) for i in range(FRAMES)]
  last = ids[-1]
  assert all(each[colour] == last[colour] for each in ids for colour in each)
  best = found[-1].at_least(0.85)
  assert len(best.track_ids) == len(best.scores) == 1
  assert all(one.track_ids is None for one in detector.stream(frames[:2], threshold=0.3))
  with pytest.raises(InputError, match='frames_per_second=0'):
    detector.stream(frames, track=True, frames_per_second=0)


def boxes_at(*corners, side=SIDE):
  return np.float32([[y, x, y + side, x + side] for y, x in corners])


def ids_of(tracker, corners, scores=None, labels=None):
  n = len(corners)
  return tracker.update(
      boxes_at(*corners).reshape(n, 4), np.float32([0.8] * n if scores is None else scores),
      np.int32([0] * n if labels is None else labels)).tolist()


def test_ids_survive_a_crossing(library):
  """One goes right and one down; their paths cross, and half of each box covers the other."""
  tracker = Tracker(np.float32([0.3]))
  ids = [ids_of(tracker, [(50, 4 * i), (4 * i - 18, 60)][::1 if i % 2 else -1])[
      ::1 if i % 2 else -1] for i in range(30)]
  assert ids == [ids[0]] * 30 and sorted(ids[0]) == [1, 2]


def test_a_low_score_continues_an_object_and_starts_none(library):
  tracker = Tracker(np.float32([0.4]), frames_per_second=2)
  assert ids_of(tracker, [(10, 10), (60, 60)], [0.8, 0.3]) == [1, 0]
  for i in range(1, 12):  # Longer than an object may be away.
    assert ids_of(tracker, [(10, 10 + 5 * i)], [0.3]) == [1]
  assert ids_of(tracker, [(10, 70)], [0.1]) == [0]  # Below half of the threshold it is noise.


@pytest.mark.parametrize('away, same', [(5, True), (25, False)])
def test_an_object_may_be_away_for_a_second(library, away, same):
  tracker = Tracker(np.float32([0.3]), frames_per_second=10)
  for _ in range(3):
    assert ids_of(tracker, [(10, 10)]) == [1]
  for _ in range(away):
    assert ids_of(tracker, []) == []
  assert ids_of(tracker, [(10, 10)]) == ([1] if same else [2])


def test_two_classes_of_one_object_have_an_id_each(library):
  tracker = Tracker(np.float32([0.3, 0.5]))
  for i in range(6):
    order = [0, 1] if i % 2 else [1, 0]
    ids = ids_of(tracker, [(10, 10), (10, 10)], labels=order)
    assert [ids[order.index(k)] for k in (0, 1)] == [1, 2]


def test_boxes_without_area_do_no_harm(library):
  tracker = Tracker(np.float32([0.3]))
  flat = np.float32([[10, 10, 10, 30], [50, 50, 70, 70]])
  for _ in range(4):
    assert tracker.update(flat, np.float32([0.9, 0.8]), np.int32([0, 0])).tolist() == [1, 2]


def errors(capsys):
  return [line for line in capsys.readouterr().err.splitlines() if line.startswith('ppn: error')]


def test_pictures_are_refused(film, tmp_path, notes, capsys):
  folder = tmp_path / 'photos'
  for name in ('a.png', 'b.png'):
    drawing.save_picture(folder / name, frame_pixels(0))
  assert command(film, folder, '--track', f'--output={tmp_path}/out') == 2
  line, = errors(capsys)
  assert 'leave it or the pictures out' in line and line.endswith(f'{folder}/a.png and 1 more')
  assert not (tmp_path / 'out').exists()


def test_formats_without_ids_are_refused(library, film, tmp_path, notes, capsys):
  out = f'--output={tmp_path}/out'
  assert command(film, '--track', '--format=yolo,crops', out) == 2
  line, = errors(capsys)
  assert 'yolo,crops has no place for ids' in line and 'csv,json,jsonl,pictures' in line
  assert not (tmp_path / 'out').exists()
  assert command(film, '--track', '--format=yolo,csv', out, '--frames=1') == 0


def test_a_missing_library_names_the_command(film, notes, monkeypatch, capsys):
  monkeypatch.setitem(sys.modules, 'trackforge', None)
  assert command(film, '--track', '--format=jsonl') == 2
  line, = errors(capsys)
  assert 'trackforge' in line and 'pip install' in line and '[track]' in line
  with pytest.raises(InputError, match='pip install'):
    ppn_jax.ImageDetector(ColourDetector()).stream([], track=True)
