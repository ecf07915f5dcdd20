"""The server on this machine, with a detector that finds one box in each picture."""

import contextlib
import http.client
import io
import json
import os
import queue
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import zlib
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from time_limits import HANG_SECONDS

from ppn_jax.cli.main import main
from ppn_jax.detection.structures import Category
from ppn_jax.image_detector import ImageDetections, ImageDetector

pytest.importorskip('starlette', reason="pip install 'ppn_jax[serve]'")
uvicorn = pytest.importorskip('uvicorn', reason="pip install 'ppn_jax[serve]'")

from ppn_jax.serving.app import Server  # noqa: E402
from ppn_jax.serving.limits import Limits  # noqa: E402
from ppn_jax.serving.run import serve  # noqa: E402


class OneBox:
  """Finds two boxes in each picture, with the share of its brightness as the better score."""
  categories = (Category(7, 'cat'),)
  step = 12
  predictor = SimpleNamespace(batch_size=4, point=None)
  thresholds_by_label = ImageDetector.thresholds_by_label

  def __init__(self):
    self.go = threading.Event()
    self.go.set()

  def __call__(self, images, threshold):
    assert threshold == 0
    assert self.go.wait(HANG_SECONDS)
    if any(image.shape[0] == 13 for image in images):
      raise RuntimeError('a bug')
    return [ImageDetections(np.float32([[1, 2, 11, 22], [0, 0, 5, 5]]),
                            np.float32([image[0, 0, 0] / 255, 0.1]), np.int32([0, 0]),
                            ('cat', 'cat'), np.int32([0, 0])) for image in images]


@contextlib.contextmanager
def serving(timeout):
  """Runs a server in a thread; yields its address and detector."""
  detector = OneBox()
  server = Server(detector, Limits(max_bytes=20_000, max_pixels=100_000, max_requests=4,
                                   timeout=timeout))
  server.warm_up()
  started, place, listening = threading.Event(), [], []

  def on_start(address):
    place.append(address.removeprefix('http://'))
    started.set()

  class Kept(uvicorn.Server):

    def __init__(self, config):
      super().__init__(config)
      listening.append(self)

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(uvicorn, 'Server', Kept)
    thread = threading.Thread(target=serve, args=(server, '127.0.0.1', 0), kwargs=dict(
        max_connections=50, timeout=timeout, on_start=on_start))
    thread.start()
    assert started.wait(HANG_SECONDS)
  try:
    yield SimpleNamespace(address=place[0], detector=detector)
  finally:
    listening[0].should_exit = True
    thread.join(HANG_SECONDS)
  assert not thread.is_alive()


@pytest.fixture(scope='module')
def running():
  with serving(timeout=HANG_SECONDS) as server:
    yield server


@pytest.fixture(scope='module')
def impatient():
  with serving(timeout=0.2) as server:
    yield server


def picture(size=(40, 60), grey=204, form='PNG'):
  file = io.BytesIO()
  Image.new('RGB', size[::-1], (grey,) * 3).save(file, form)
  return file.getvalue()


def png_header(height, width):
  """Returns the beginning of a PNG file of any size."""
  chunk = b'IHDR' + struct.pack('>IIBBBBB', width, height, 8, 2, 0, 0, 0)
  return (b'\x89PNG\r\n\x1a\n' + struct.pack('>I', 13) + chunk
          + struct.pack('>I', zlib.crc32(chunk)) + struct.pack('>I', 4) + b'IDAT')


def ask(running, body=b'', path='/detect', method='POST', **headers):
  connection = http.client.HTTPConnection(running.address, timeout=HANG_SECONDS)
  connection.request(method, path, body, headers)
  answer = connection.getresponse()
  data = answer.read()
  connection.close()
  return answer.status, data, answer


def test_json(running):
  status, data, _ = ask(running, picture())
  assert status == 200
  assert json.loads(data) == {
      'width': 60, 'height': 40, 'step': 12, 'detections': [
          {'category': 'cat', 'category_id': 7, 'score': pytest.approx(.8),
           'bbox': [2, 1, 20, 10]}]}
  _, data, _ = ask(running, picture(), '/detect?threshold=0.05')
  assert len(json.loads(data)['detections']) == 2


def test_picture(running):
  status, data, answer = ask(running, picture(form='JPEG'), '/detect?format=picture')
  assert (status, answer.getheader('content-type')) == (200, 'image/jpeg')
  drawn = np.asarray(Image.open(io.BytesIO(data)))
  assert drawn.shape == (40, 60, 3) and drawn.min() < 150


@pytest.mark.parametrize('body, path, headers, status, message', [
    (b'no picture', '/detect', {}, 400, 'the picture'),
    (picture(form='JPEG')[:300], '/detect', {}, 400, 'the picture'),
    (b'', '/detect', {}, 400, 'the body is empty'),
    (picture((401, 250)), '/detect', {}, 413, '401 x 250 pixels; the largest number is 100,000'),
    (png_header(20_000, 20_000), '/detect', {}, 413, 'too many pixels'),
    (picture((1, 70_000)), '/detect?format=picture', {}, 413, '65,500 a side; ask for format=json'),
    (bytes(30_000), '/detect', {}, 413, 'more than 20,000 bytes'),
    (picture(), '/detect?threshold=2', {}, 400, "threshold='2'"),
    (picture(), '/detect?threshold=x', {}, 400, "threshold='x'"),
    (picture(), '/detect?format=xml', {}, 400, "format='xml'; legal: json, picture"),
    (picture(), '/detect?treshold=1', {}, 400, "no option 'treshold'"),
    (picture(), '/detect', {'content-type': 'multipart/form-data'}, 415, 'not a form'),
    (picture((13, 20)), '/detect', {}, 500, 'the server failed')])
def test_what_is_refused(running, body, path, headers, status, message):
  found, data, _ = ask(running, body, path, **headers)
  assert found == status and message in json.loads(data)['error']
  assert ask(running, picture())[0] == 200


def test_bodies_of_unknown_length_are_limited(running):
  chunks = iter([bytes(15_000)] * 2)
  connection = http.client.HTTPConnection(running.address, timeout=HANG_SECONDS)
  connection.request('POST', '/detect', chunks, encode_chunked=True,
                     headers={'Transfer-Encoding': 'chunked'})
  assert connection.getresponse().status == 413
  connection.close()


def test_slow_uploads_are_ended(impatient):
  host, port = impatient.address.split(':')
  with socket.create_connection((host, int(port)), timeout=HANG_SECONDS) as client:
    client.sendall(b'POST /detect HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\nabc')
    assert client.recv(100).startswith(b'HTTP/1.1 408')


def test_slow_detections_are_given_up(impatient):
  impatient.detector.go.clear()
  assert ask(impatient, picture())[0] == 504
  impatient.detector.go.set()


def test_too_many_at_a_time_are_refused(running):
  running.detector.go.clear()
  statuses = queue.Queue()
  threads = [threading.Thread(target=lambda: statuses.put(ask(running, picture())[0]))
             for _ in range(7)]
  for thread in threads:
    thread.start()
  assert [statuses.get(timeout=HANG_SECONDS) for _ in range(3)] == [503] * 3
  running.detector.go.set()
  for thread in threads:
    thread.join(HANG_SECONDS)
  assert [statuses.get() for _ in range(4)] == [200] * 4


def test_clients_that_leave(running):
  host, port = running.address.split(':')
  for _ in range(5):
    with socket.create_connection((host, int(port)), timeout=HANG_SECONDS) as client:
      client.sendall(b'POST /detect HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\nabc')
  for _ in range(600):  # Until the server has noticed.
    if ask(running, picture())[0] == 200:
      break
    time.sleep(0.1)
  assert b'status="499"' in ask(running, path='/metrics', method='GET')[1]


def test_health_and_metrics(running):
  assert ask(running, picture())[0] == 200
  status, data, _ = ask(running, path='/health', method='GET')
  assert status == 200 and json.loads(data) == {'status': 'ok', 'step': 12, 'classes': ['cat']}
  _, data, _ = ask(running, path='/metrics', method='GET')
  assert b'ppn_requests_total{status="200"}' in data and b'ppn_batch_pictures_bucket' in data
  _, data, _ = ask(running, path='/', method='GET')
  assert f"--data-binary @photo.jpg 'http://{running.address}/detect'".encode() in data


@pytest.mark.parametrize('method, path, status', [('GET', '/detect', 405), ('POST', '/detec', 404)])
def test_other_paths_and_methods_are_told_the_right_one(running, method, path, status):
  found, data, answer = ask(running, picture(), path, method)
  assert found == status and answer.getheader('connection') == 'close'
  error = json.loads(data)['error']
  assert error.startswith(f'{method} {path}: ') and error.endswith('POST a picture to /detect')


@pytest.mark.parametrize('flag', ['--max_megabytes=nan', '--max_megapixels=inf', '--timeout=inf',
                                  '--timeout=0', '--wait=nan', '--threshold=nan', '--port=70000',
                                  '--max_requests=0'])
def test_bad_flags_are_reported_before_a_model_is_loaded(flag, capsys):
  assert main(['serve', '--workdir=none', flag]) == 2
  line = capsys.readouterr().err.splitlines()[-1]
  assert line.startswith('ppn: error: ') and flag.strip('-').partition('=')[0] in line


@pytest.mark.slow
def test_the_command(tmp_path):
  from tiny import untrained_run
  run = untrained_run(tmp_path / 'run')
  command = [sys.executable, '-m', 'ppn_jax.cli.main', 'serve', f'--workdir={run}', '--port=0',
             '--threshold=0']
  with subprocess.Popen(command, stdout=subprocess.PIPE, text=True,
                        env=os.environ | {'JAX_PLATFORMS': 'cpu'}) as process:
    line = process.stdout.readline()
    place = SimpleNamespace(address=line.split()[2].removeprefix('http://'))
    status, data, _ = ask(place, picture())
    assert status == 200 and json.loads(data)['step'] == 6 and json.loads(data)['detections']
    again = subprocess.run([*command[:-2], f'--port={place.address.split(":")[1]}'],
                           capture_output=True, text=True)
    assert again.returncode == 2 and 'is the port in use?' in again.stderr.splitlines()[-1]
    process.send_signal(signal.SIGTERM)
    assert process.wait(HANG_SECONDS) == 0
