"""Reads and writes the frames of video files, cameras and streams with OpenCV, without sound."""

import os
import pathlib
import threading
import time
from collections.abc import Iterator
from types import TracebackType

import cv2
import numpy as np

from ppn_jax.errors import InputError

# For files that do not state it.
_FRAMES_PER_SECOND = 25.0


class VideoReader:
  """Reads the frames of a video file in order, once.

  Attributes:
    size: (height, width) in pixels, upright.
    frames_per_second: Rate of the whole file; a varying rate is treated as constant.
    stated: Number of frames according to the file, 0 if it does not state it.
    count: Number of frames read so far.
  """

  def __init__(self, path: pathlib.Path):
    """Opens the file; raises InputError if it is no readable video."""
    _quiet()
    self._path, self.count = path, 0
    self._capture = cv2.VideoCapture(str(path), cv2.CAP_FFMPEG)
    self._first = self._read()
    if self._first is None:
      self._capture.release()
      raise InputError(f'{path}: not a video that can be read')
    self.size = self._first.shape[:2]
    self.stated = max(int(self._capture.get(cv2.CAP_PROP_FRAME_COUNT)), 0)
    rate = self._capture.get(cv2.CAP_PROP_FPS)
    self.frames_per_second = rate if 0 < rate < 1000 else _FRAMES_PER_SECOND

  def __iter__(self) -> Iterator[np.ndarray]:
    """Yields frames u8 [H, W, 3], RGB."""
    frame, self._first = self._first, None
    while frame is not None:
      self.count += 1
      yield frame
      frame = self._read()

  @property
  def cut_short(self) -> bool:
    """True if the file ended more than a second before its stated number of frames."""
    return self.count < self.stated - self.frames_per_second

  def _read(self) -> np.ndarray | None:
    read, frame = self._capture.read()
    return np.ascontiguousarray(frame[..., ::-1]) if read else None

  def __enter__(self) -> 'VideoReader':
    return self

  def __exit__(self, *_) -> None:
    self._capture.release()


class LiveReader:
  """Reads the newest frame of a camera or stream, and leaves out those that came meanwhile.

  Attributes:
    size: (height, width) in pixels.
    frames_per_second: The rate that it states, or a usual one.
    count, dropped: Number of frames that were yielded, and left out, so far.
    seconds: Time of the last yielded frame since the first one.
  """

  def __init__(self, source: str):
    """Opens a camera by its number or a stream by its address.

    Raises:
      InputError: If there is none.
    """
    _quiet()
    self._source = source
    if source.isdecimal():
      self._capture = cv2.VideoCapture(int(source))
    else:
      self._capture = _open_stream(source)
    read, frame = self._capture.read()
    if not read:
      self._capture.release()
      what = f'camera {source}' if source.isdecimal() else source
      raise InputError(f'{what}: no picture comes from it')
    self.size = frame.shape[:2]
    rate = self._capture.get(cv2.CAP_PROP_FPS)
    self.frames_per_second = rate if 0 < rate < 1000 else _FRAMES_PER_SECOND
    self.count = self.dropped = 0
    self.seconds = 0.0
    self._start = time.monotonic()
    self._newest, self._ended, self._changed = (frame, self._start), False, threading.Condition()
    self._closing = threading.Event()
    self._thread = threading.Thread(target=self._follow, name='ppn live', daemon=True)
    self._thread.start()

  def __iter__(self) -> Iterator[np.ndarray]:
    """Yields frames u8 [H, W, 3], RGB, until the stream ends."""
    while True:
      with self._changed:
        self._changed.wait_for(lambda: self._newest is not None or self._ended)
        if self._newest is None:
          return
        (frame, moment), self._newest = self._newest, None
      self.count += 1
      self.seconds = moment - self._start
      yield np.ascontiguousarray(frame[..., ::-1])

  def _follow(self) -> None:
    """Reads frames as they come; the thread of this object."""
    read = True
    while read and not self._closing.is_set():
      read, frame = self._capture.read()
      with self._changed:
        if read:
          self.dropped += self._newest is not None
          self._newest = frame, time.monotonic()
        else:
          self._ended = True
        self._changed.notify()

  def __enter__(self) -> 'LiveReader':
    return self

  def __exit__(self, *_) -> None:
    self._closing.set()
    self._thread.join(5)
    if not self._thread.is_alive():  # A stream that hangs is left to the end of the process.
      self._capture.release()


def _open_stream(address: str) -> cv2.VideoCapture:
  """Opens a stream; files, which `_quiet` restricts to themselves, stay restricted."""
  options = 'OPENCV_FFMPEG_CAPTURE_OPTIONS'
  before = os.environ[options]
  os.environ[options] = ('protocol_whitelist;http,https,httpproxy,tcp,tls,udp,rtp,rtsp,rtmp,srt,'
                         'crypto,hls')
  try:
    return cv2.VideoCapture(address, cv2.CAP_FFMPEG, [
        cv2.CAP_PROP_OPEN_TIMEOUT_MSEC, 10_000, cv2.CAP_PROP_READ_TIMEOUT_MSEC, 10_000])
  finally:
    os.environ[options] = before


class VideoWriter:
  """Writes frames to an MP4 file (MPEG-4 part 2), which appears when it is complete.

  Args:
    path: Ends with .mp4; its folder is created.
    size: (height, width) in pixels, at least 2 each; frames of another size are scaled. The format
      has even sides only, so the last pixel of an odd side is cut off.
    frames_per_second: Constant rate.
  """

  def __init__(self, path: pathlib.Path, size: tuple[int, int], frames_per_second: float):
    _quiet()
    path.parent.mkdir(parents=True, exist_ok=True)
    self._path, self._part = path, path.with_name(f'.{path.stem}.part.mp4')
    self._shape, self._count = size[::-1], 0
    self._writer = cv2.VideoWriter(str(self._part), cv2.CAP_FFMPEG,
                                   cv2.VideoWriter_fourcc(*'mp4v'), frames_per_second, self._shape)
    if not self._writer.isOpened():
      self._part.unlink(missing_ok=True)
      raise InputError(f'{path}: cannot write a video of {size[1]}x{size[0]} pixels there')

  def write(self, frame: np.ndarray) -> None:
    """Appends a frame u8 [H, W, 3], RGB."""
    if frame.shape[1::-1] != self._shape:
      frame = cv2.resize(frame, self._shape, interpolation=cv2.INTER_AREA)
    self._count += 1
    self._writer.write(np.ascontiguousarray(frame[..., ::-1]))

  def __enter__(self) -> 'VideoWriter':
    return self

  def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
               trace: TracebackType | None) -> None:
    self._writer.release()
    try:
      if kind is None:
        self._check_complete()
        os.replace(self._part, self._path)
    finally:
      self._part.unlink(missing_ok=True)

  def _check_complete(self) -> None:
    """Raises InputError unless all frames were written; OpenCV does not report a full disk."""
    try:
      with VideoReader(self._part) as reader:
        written = reader.stated
    except InputError:
      written = 0
    if written != self._count:
      raise InputError(f'{self._path}: could not be written: it has {written} of '
                       f'{self._count} frames; is the disk full?')


def _quiet() -> None:
  """Keeps decoders from writing to stderr, and files from opening others over the network."""
  os.environ.setdefault('OPENCV_FFMPEG_LOGLEVEL', '-8')
  os.environ.setdefault('OPENCV_FFMPEG_CAPTURE_OPTIONS', 'protocol_whitelist;file')
  cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
