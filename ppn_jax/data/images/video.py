"""Video files: frames in, frames out, by OpenCV's FFmpeg. Sound is left behind."""

import os
import pathlib
from collections.abc import Iterator
from types import TracebackType

import cv2
import numpy as np

from ppn_jax.errors import InputError

# Where a file does not say.
_FRAMES_PER_SECOND = 25.0


class VideoReader:
  """The frames of a video file, in order; once.

  Attributes:
    size: (height, width) in pixels, upright.
    frames_per_second: of the whole file; files of varying rate are taken to have a constant one.
    stated: how many frames the file says that it has, 0 if it does not.
    count: frames read so far.
  """

  def __init__(self, path: pathlib.Path):
    """Raises InputError if the file is no video that can be read."""
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
    """Frames u8 [H, W, 3], RGB."""
    frame, self._first = self._first, None
    while frame is not None:
      self.count += 1
      yield frame
      frame = self._read()

  @property
  def cut_short(self) -> bool:
    """Whether, read to the end, it had fewer frames than it states, to within a second."""
    return self.count < self.stated - self.frames_per_second

  def _read(self) -> np.ndarray | None:
    there, frame = self._capture.read()
    return np.ascontiguousarray(frame[..., ::-1]) if there else None

  def __enter__(self) -> 'VideoReader':
    return self

  def __exit__(self, *_) -> None:
    self._capture.release()


class VideoWriter:
  """Writes frames to an MP4 (MPEG-4 part 2), which is there only when all of it is.

  Args:
    path: to end with .mp4; its folder is made.
    size: (height, width) in pixels, at least 2 each; frames of another size are scaled. The
      format has even sides only, so that of an odd one the last pixel is left out.
    frames_per_second: constant.
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
    """Adds u8 [H, W, 3], RGB."""
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
        self._check_whole()
        os.replace(self._part, self._path)
    finally:
      self._part.unlink(missing_ok=True)

  def _check_whole(self) -> None:
    """OpenCV tells nobody of a full disk."""
    try:
      with VideoReader(self._part) as reader:
        written = reader.stated
    except InputError:
      written = 0
    if written != self._count:
      raise InputError(f'{self._path}: could not be written, {written} of {self._count} frames '
                       'arrived; is the disk full?')


def _quiet() -> None:
  """Keeps decoders from writing to stderr, and files from having others opened over a network."""
  os.environ.setdefault('OPENCV_FFMPEG_LOGLEVEL', '-8')
  os.environ.setdefault('OPENCV_FFMPEG_CAPTURE_OPTIONS', 'protocol_whitelist;file')
  cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
