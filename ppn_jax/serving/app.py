"""The HTTP interface of a detector: POST a picture, get its detections as JSON or drawn."""

import asyncio
import functools
import logging
import time
from typing import Any

import numpy as np
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from ppn_jax.data.images import decoding
from ppn_jax.errors import InputError
from ppn_jax.image_detector import ImageDetections, ImageDetector
from ppn_jax.jobs.detection_files import rows_of
from ppn_jax.serving.batching import Batcher
from ppn_jax.serving.limits import Limits, PixelBudget
from ppn_jax.visualization.drawing import draw_boxes

logger = logging.getLogger(__name__)

USAGE = """POST a picture to /detect:

  curl --data-binary @photo.jpg 'ADDRESS/detect'
  curl --data-binary @photo.jpg 'ADDRESS/detect?threshold=0.5&format=picture' > drawn.jpg

/health tells whether the server is ready, /metrics has its numbers for Prometheus.
"""
_FORMATS = ('json', 'picture')
_DEFAULT_THRESHOLD = 0.3  # If none are kept with the model.
_CLIENT_CLOSED = 499  # As nginx has it; nobody reads this answer.


class _Refused(Exception):
  """Request that is answered by an error.

  Attributes:
    status: of HTTP.
  """

  def __init__(self, status: int, message: str):
    super().__init__(message)
    self.status = status


class Server:
  """Detector behind HTTP.

  Args:
    detector: The detector, called by one thread.
    limits: What is accepted.
    threshold: Lowest score of a detection that is returned if a request has none; None for the
      best of each class, or 0.3 if none are kept with the detector.
    wait: Longest time in seconds that a picture waits for others.

  Attributes:
    app: The ASGI application.
  """

  def __init__(self, detector: ImageDetector, limits: Limits, *, threshold: float | None = None,
               wait: float = 0.005):
    self._detector, self._limits = detector, limits
    self._thresholds = detector.thresholds_by_label(threshold, _DEFAULT_THRESHOLD)
    registry = CollectorRegistry()
    self._registry = registry
    self._requests = Counter('ppn_requests', 'Requests to /detect', ['status'], registry=registry)
    self._seconds = Histogram('ppn_request_seconds', 'Time of successful requests, from the first '
                              'byte of the picture', registry=registry)
    self._batches = Histogram('ppn_batch_pictures', 'Pictures in a batch', registry=registry,
                              buckets=(1, 2, 4, 8, 16, 32, 64))
    self._busy = Gauge('ppn_requests_in_progress', 'Pictures received, waiting or detected',
                       registry=registry)
    self._in_progress = 0
    self._budget = PixelBudget(4 * limits.max_pixels)
    self._batcher = Batcher(functools.partial(detector, threshold=0.0),
                            detector.predictor.batch_size, wait, self._batches.observe)
    self.app = Starlette(routes=[
        Route('/', lambda request: PlainTextResponse(
            USAGE.replace('ADDRESS', str(request.base_url).rstrip('/')))),
        Route('/detect', self._detect, methods=['POST']),
        Route('/health', self._health), Route('/metrics', self._metrics)],
                         exception_handlers={HTTPException: _refuse_path})

  def warm_up(self) -> None:
    """Compiles the detector, so that the first request is as fast as the others."""
    self._batcher.submit(np.zeros((8, 8, 3), np.uint8)).result()

  def close(self) -> None:
    """Ends the thread of the detector."""
    self._batcher.close()

  def _health(self, request: Request) -> Response:
    return JSONResponse({'status': 'ok', 'step': self._detector.step,
                         'classes': [c.name for c in self._detector.categories]})

  def _metrics(self, request: Request) -> Response:
    return Response(generate_latest(self._registry),
                    media_type='text/plain; version=0.0.4; charset=utf-8')

  async def _detect(self, request: Request) -> Response:
    """Answers a picture."""
    start = time.monotonic()
    if self._in_progress >= self._limits.max_requests:
      return self._refuse(503, f'{self._in_progress} pictures are being detected; try again',
                          {'Retry-After': '1'})
    self._in_progress += 1
    self._busy.set(self._in_progress)
    try:
      response = await self._answer(request)
      self._requests.labels('200').inc()
      self._seconds.observe(time.monotonic() - start)
      return response
    except _Refused as e:
      return self._refuse(e.status, str(e))
    except ClientDisconnect:
      return self._refuse(_CLIENT_CLOSED, 'the client has gone')
    except Exception:  # A bug ends a request, not the server.
      logger.exception('/detect failed')
      return self._refuse(500, 'the server failed')
    finally:
      self._in_progress -= 1
      self._busy.set(self._in_progress)

  def _refuse(self, status: int, message: str, headers: dict[str, str] | None = None) -> Response:
    self._requests.labels(str(status)).inc()
    # What the client still sends is not read, so the connection cannot be used again.
    return JSONResponse({'error': message}, status, {'Connection': 'close', **(headers or {})})

  async def _answer(self, request: Request) -> Response:
    thresholds, form = self._options(request)
    data = await self._body(request)
    try:
      height, width = decoding.stored_size(data, 'the picture')
    except decoding.TooManyPixels as e:
      raise _Refused(413, str(e)) from e
    except InputError as e:
      raise _Refused(400, str(e)) from e
    if height * width > self._limits.max_pixels:
      raise _Refused(413, f'the picture has {height} x {width} pixels; the largest number is '
                          f'{self._limits.max_pixels:,}')
    if form == 'picture' and max(height, width) > decoding.MAX_JPEG_SIDE:
      raise _Refused(413, f'the picture has {height} x {width} pixels, and a drawn one at most '
                          f'{decoding.MAX_JPEG_SIDE:,} a side; ask for format=json')
    try:
      async with asyncio.timeout(self._limits.timeout), self._budget.take(height * width):
        image = await run_in_threadpool(self._decode, data)
        found = await asyncio.wrap_future(self._batcher.submit(image))
        found = found.at_least(thresholds)
        if form == 'picture':
          return Response(await run_in_threadpool(self._draw, image, found),
                          media_type='image/jpeg')
        return JSONResponse(self._describe(image, found))
    except TimeoutError as e:
      raise _Refused(504, f'not detected within {self._limits.timeout:g} s') from e

  def _options(self, request: Request) -> tuple[np.ndarray, str]:
    """Returns the thresholds by label and the format of the answer."""
    query = request.query_params
    if unknown := sorted(query.keys() - {'threshold', 'format'}):
      raise _Refused(400, f'no option {unknown[0]!r}; legal: threshold, format')
    form = query.get('format', 'json')
    if form not in _FORMATS:
      raise _Refused(400, f'format={form!r}; legal: {", ".join(_FORMATS)}')
    if 'multipart' in request.headers.get('content-type', ''):
      raise _Refused(415, 'send the picture itself as the body, such as by curl --data-binary '
                          '@photo.jpg, not a form')
    text = query.get('threshold')
    if text is None:
      return self._thresholds, form
    try:
      threshold = float(text)
    except ValueError:
      threshold = -1.0
    if not 0 <= threshold <= 1:
      raise _Refused(400, f'threshold={text!r}; legal: 0 to 1')
    return self._detector.thresholds_by_label(threshold), form

  async def _body(self, request: Request) -> bytes:
    """Receives the picture file."""
    limit = self._limits.max_bytes
    too_large = _Refused(413, f'the picture has more than {limit:,} bytes')
    stated = request.headers.get('content-length', '0')
    if stated.isdecimal() and int(stated) > limit:
      raise too_large
    parts, size = [], 0
    try:
      async with asyncio.timeout(self._limits.timeout):
        async for part in request.stream():
          size += len(part)
          if size > limit:
            raise too_large
          parts.append(part)
    except TimeoutError as e:
      raise _Refused(408, f'the picture did not arrive within {self._limits.timeout:g} s') from e
    if not size:
      raise _Refused(400, 'the body is empty; send a picture file')
    return b''.join(parts)

  def _decode(self, data: bytes) -> np.ndarray:
    try:
      return decoding.decode(data, name='the picture', max_pixels=self._limits.max_pixels)
    except decoding.TooManyPixels as e:
      raise _Refused(413, str(e)) from e
    except InputError as e:
      raise _Refused(400, str(e)) from e

  def _describe(self, image: np.ndarray, found: ImageDetections) -> dict[str, Any]:
    height, width = image.shape[:2]
    return {'width': width, 'height': height, 'step': self._detector.step,
            'detections': rows_of(found, self._detector.categories)}

  def _draw(self, image: np.ndarray, found: ImageDetections) -> bytes:
    size = np.float32([*image.shape[:2]] * 2)
    return decoding.encode_jpeg(draw_boxes(
        image, found.boxes / size, found.labels, [c.name for c in self._detector.categories],
        found.scores))


def _refuse_path(request: Request, error: Exception) -> Response:
  """Answers a request to another path or of another method."""
  assert isinstance(error, HTTPException)
  return JSONResponse(
      {'error': f'{request.method} {request.url.path}: {error.detail}; POST a picture to /detect'},
      error.status_code, {'Connection': 'close', **(error.headers or {})})
