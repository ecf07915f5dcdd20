"""Decodes image files to whole, upright, 8-bit RGB pixels, or raises an error naming the file."""

import contextlib
import io
import logging
import os
import pathlib
import re
import threading
import time
from typing import Any, BinaryIO

import numpy as np
import PIL.Image

from ppn_jax import storage
from ppn_jax.data.images import jpeg_segments
from ppn_jax.data.images.lazy import LazyImage, StoredImage
from ppn_jax.errors import InputError, InputTypeError

# Formats whose decoders notice a truncated file (that of JPEG 2000 does not always). Not EPS, for
# which Pillow would start Ghostscript on an untrusted file.
PIL.Image.init()
_FORMATS = tuple(f for f in ('JPEG', 'PNG', 'WEBP', 'AVIF', 'BMP', 'GIF', 'TIFF', 'PPM')
                 if f in PIL.Image.OPEN)
# File name suffixes of these formats in lower case: Pillow's list and two more suffixes of formats
# that it opens, without PFM, whose pixels are floating-point numbers of unknown range.
SUFFIXES = frozenset({suffix for suffix, kind in PIL.Image.registered_extensions().items()
                      if kind in _FORMATS} | {'.dib', '.mpo'}) - {'.pfm'}

_ORIENTATION_TAG = 0x0112
# Version of the rules of decoding: orientation, transparency, 16 bits and so on. A higher number
# invalidates caches of decoded images.
DECODING = 1
# Seconds within which a file may change again and keep its time of change, on any file system.
_CLOCK_TICK = 2.0
_TIFF_WIDTH_TAG, _TIFF_HEIGHT_TAG = 0x0100, 0x0101
_XMP_ORIENTATION = re.compile(rb'tiff:Orientation(?:\s*=\s*["\']|>)\s*([1-8])')
# Orientation -> inverse of `PIL.ImageOps.exif_transpose`.
_INVERSE = {2: PIL.Image.Transpose.FLIP_LEFT_RIGHT, 3: PIL.Image.Transpose.ROTATE_180,
            4: PIL.Image.Transpose.FLIP_TOP_BOTTOM, 5: PIL.Image.Transpose.TRANSPOSE,
            6: PIL.Image.Transpose.ROTATE_90, 7: PIL.Image.Transpose.TRANSVERSE,
            8: PIL.Image.Transpose.ROTATE_270}

# Of libjpeg-turbo.
MAX_JPEG_SIDE = 65_500

_END_MARKER = b'\xff\xd9'
_NAMED = 5  # Number of files without an end marker that a process names in its log.
_log = logging.getLogger(__name__)


class TooManyPixels(InputError):
  """Image that is too large to be decoded."""


def read(path: str) -> bytes:
  """Reads a file.

  Raises:
    InputError: If it cannot be read.
  """
  try:
    return storage.retried(pathlib.Path(path).read_bytes)
  except OSError as e:
    raise InputError(f'{path}: cannot be read: {e.strerror}') from e


def stamp(path: str) -> bytes:
  """Returns bytes that differ after a file was changed, replaced or moved, without reading it.

  They are empty if that is not certain: there is no such file, or it was changed a moment ago, so
  that another change could go unnoticed.
  """
  try:
    stat = os.stat(path)
  except OSError:
    return b''
  # The time of its inode's last change cannot be set back, unlike that of its contents.
  if time.time() - max(stat.st_mtime, stat.st_ctime) < _CLOCK_TICK:
    return b''
  return repr((os.path.abspath(path), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns,
               stat.st_ino)).encode(errors='surrogateescape')


def read_sizes(path: str) -> tuple[tuple[int, int], tuple[int, int]]:
  """Reads (height, width) of an image as stored, and of the upright image, from the file's header.

  Raises:
    InputError: If there is no such file, or it is not an image.
  """
  try:
    with open(path, 'rb') as f:
      return header_sizes(f, path)
  except OSError as e:
    raise InputError(f'{path}: cannot be read: {e.strerror}') from e


def header_sizes(file: BinaryIO, name: str) -> tuple[tuple[int, int], tuple[int, int]]:
  """Reads the sizes of an open file called `name`; see `read_sizes`."""
  try:
    with PIL.Image.open(file, formats=_FORMATS) as image:
      stored, orientation = _stored_size(image), _orientation(image)
  except PIL.Image.DecompressionBombError as e:
    raise TooManyPixels(f'{name}: too many pixels: {_line(e)}') from e
  except PIL.UnidentifiedImageError as e:
    raise InputError(f'{name}: not an image that can be read') from e
  except Exception as e:  # Pillow's plugins raise exceptions of any type for damaged files.
    raise InputError(f'{name}: damaged image: {_line(e)}') from e
  return stored, stored[::-1] if orientation >= 5 else stored


def stored_size(data: bytes, name: str) -> tuple[int, int]:
  """Returns (height, width) of an image as it is stored, from the header of its bytes."""
  try:
    return _jpeg_header(data)[:2]
  except ValueError:
    return header_sizes(io.BytesIO(data), name)[0]


def decode(data: bytes, *, name: str, size: tuple[int, int] | None = None,
           max_pixels: int = 178_956_970) -> np.ndarray:
  """Decodes an image file.

  Grey and palette images become RGB, CMYK is converted without a colour profile, 16-bit channels
  keep their upper byte, transparent pixels are placed on white, and an animation is its first
  frame.

  An image with an orientation is turned upright if the result has `size`, and left as it is stored
  if only that has `size`, since the pixels must be those that were annotated. The orientation is
  that of the EXIF block, otherwise that of the XMP block, in every format and in `read_sizes` too.

  A JPEG that lacks only its end marker is decoded and named in this module's log, once.

  Args:
    data: Contents of the file.
    name: Name of the file, for error messages.
    size: (height, width) according to the annotations; None returns the upright image.
    max_pixels: Largest height x width, checked in the header before anything is decoded. For
      files other than JPEG, Pillow's own limit, which is this default, applies too.

  Returns:
    u8 [H, W, 3], RGB, C-contiguous.

  Raises:
    InputError: If the data is not an image, truncated, damaged, too large, or has another size.
  """
  return open_image(data, name=name, size=size, max_pixels=max_pixels).pixels()


def load(path: str) -> np.ndarray:
  """Reads and decodes a file; see `decode`. Errors name the file."""
  return decode(read(path), name=path)


def to_pixels(image: Any, name: str = 'the image') -> np.ndarray:
  """Returns the pixels of a file, PIL image, array or tensor.

  Args:
    image: The path of an image file; a PIL image of any mode, which is turned upright by its
      orientation; or an array or tensor, u8 [H, W, 3] RGB, [H, W, 4] RGBA, which is placed on
      white, or [H, W] or [H, W, 1] grey.
    name: Name of the image in error messages.

  Returns:
    u8 [H, W, 3], RGB.

  Raises:
    InputTypeError: If `image` is none of these, or an array of another type.
    InputError: If a file cannot be read, or an array has another shape or no pixels.
  """
  if isinstance(image, (str, os.PathLike)):
    return load(os.path.expanduser(os.fspath(image)))
  if isinstance(image, PIL.Image.Image):
    return _upright(*_stored(*_pixels_of(image, name)), name, None).pixels()
  if not is_array(image):
    raise InputTypeError(f'{name} is of type {type(image).__name__}; legal: the path of a file, a '
                         'PIL image, a uint8 array [height, width, 3], or a list of these')
  array = np.asarray(image)
  legal = 'an image must be uint8 [height, width, 3] (RGB), also 4 (RGBA) or grey [height, width]'
  if array.dtype != np.uint8:
    raise InputTypeError(f'{legal}; {name} is {array.dtype} {list(array.shape)}')
  channels = 1 if array.ndim == 2 else array.shape[-1] if array.ndim == 3 else 0
  if channels not in (1, 3, 4) or not array.size:
    raise InputError(f'{legal}; {name} is {array.dtype} {list(array.shape)}')
  if channels == 4:
    return _over_white(array)
  return array if channels == 3 else np.repeat(array.reshape(*array.shape[:2], 1), 3, axis=-1)


def is_array(value: Any) -> bool:
  """Returns whether `value` is an array or tensor of numbers, of any library."""
  return hasattr(value, 'ndim') and hasattr(value, 'shape') and hasattr(value, '__array__')


def open_image(data: bytes, *, name: str, size: tuple[int, int] | None = None,
               max_pixels: int = 178_956_970) -> LazyImage:
  """Opens an image file as `decode` does, but decodes a JPEG only when its pixels are needed.

  The header is checked now. That a file is truncated or damaged is found when pixels are decoded,
  whether all or some of them.
  """
  if not data:
    raise InputError(f'{name}: the file is empty')
  if data[:2] == b'\xff\xd8':
    stored, orientation = _open_jpeg(data, name, max_pixels)
  else:
    stored, orientation = _stored(*_decode_other(data, name, max_pixels))
  return _upright(stored, orientation, name, size)


def _simplejpeg() -> Any:
  import simplejpeg  # Not above, since an exported detector needs no decoder for arrays.
  return simplejpeg


def encode_jpeg(image: np.ndarray, quality: int = 92) -> bytes:
  """Encodes u8 [H, W, 3] RGB as a JPEG file without EXIF.

  Raises:
    InputError: If a side is longer than a JPEG can have.
  """
  if max(image.shape[:2]) > MAX_JPEG_SIDE:
    raise InputError(f'{_show(image.shape)} pixels do not fit into a JPEG, whose longest side is '
                     f'{MAX_JPEG_SIDE:,}')
  return _simplejpeg().encode_jpeg(np.ascontiguousarray(image), quality=quality)


def _jpeg_header(data: bytes) -> tuple[int, int, str]:
  """Returns (height, width, colour space); raises ValueError on other files and some JPEGs."""
  try:
    return _simplejpeg().decode_jpeg_header(data)[:3]
  except KeyError as e:  # It has no name for 4:4:1.
    raise ValueError(f'unknown sampling {e}') from e


def _open_jpeg(data: bytes, name: str, max_pixels: int) -> tuple[StoredImage, int]:
  """Returns the image as stored, and the EXIF orientation 1..8."""
  try:
    height, width, color = _jpeg_header(data)
  except ValueError:  # Some legal files are not supported by libjpeg's simple interface.
    return _stored(*_decode_other(data, name, max_pixels))
  _check_pixels(height, width, name, max_pixels)
  cmyk = color in ('CMYK', 'YCCK')

  def load_from(data: bytes, factor: int) -> np.ndarray:
    return _load_cmyk(data) if cmyk else _simplejpeg().decode_jpeg(
        data, colorspace='RGB', min_height=-(-height // factor), min_width=-(-width // factor),
        min_factor=factor)

  def load(factor: int) -> np.ndarray:
    try:
      return load_from(data, factor)
    except ValueError as e:
      if 'Premature end' in str(e) and jpeg_segments.scans_are_complete(data):
        # With an end marker the decoder fails only if bits of the image are missing.
        with contextlib.suppress(ValueError):
          pixels = load_from(data + _END_MARKER, factor)
          _note_missing_end(name)
          return pixels
      # Two defects that affect no pixel: padding before the end marker, and a header that some
      # phones write. Pillow ignores both and still rejects a truncated file.
      if 'before marker 0xd9' in str(e) or 'Invalid SOS parameters' in str(e):
        return _decode_other(data, name, max_pixels)[0]
      raise InputError(f'{name}: damaged or truncated JPEG: {_line(e)}') from e

  factors = () if cmyk else (8, 4, 2)
  blocks = jpeg_segments.read_metadata(data)
  return StoredImage((height, width), load, factors), _orientation_of_blocks(*blocks)


def _load_cmyk(data: bytes) -> np.ndarray:
  # Like Adobe's programs, all writers of such files store 255 minus the ink.
  cmyk = _simplejpeg().decode_jpeg(data, colorspace='CMYK').astype(np.uint16)
  return ((cmyk[..., :3] * cmyk[..., 3:] + 127) // 255).astype(np.uint8)


def _stored(pixels: np.ndarray, orientation: int) -> tuple[StoredImage, int]:
  return LazyImage.of(pixels).stored, orientation


def _decode_other(data: bytes, name: str, max_pixels: int) -> tuple[np.ndarray, int]:
  """Decodes a file with Pillow to pixels as stored, and the EXIF orientation 1..8."""
  try:
    image = PIL.Image.open(io.BytesIO(data), formats=_FORMATS)
    height, width = image.height, image.width
  except PIL.Image.DecompressionBombError as e:
    raise TooManyPixels(f'{name}: too many pixels: {_line(e)}') from e
  except PIL.UnidentifiedImageError as e:
    raise InputError(f'{name}: not an image that can be read; it starts with {data[:8]!r}, '
                     f"legal: {', '.join(_FORMATS)}") from e
  except Exception as e:  # Pillow's plugins raise exceptions of any type for damaged files.
    raise InputError(f'{name}: damaged or truncated image: {_line(e)}') from e
  _check_pixels(height, width, name, max_pixels)
  return _pixels_of(image, name)


def _pixels_of(image: PIL.Image.Image, name: str) -> tuple[np.ndarray, int]:
  """Returns the pixels of a PIL image as stored, u8 [H, W, 3], and its orientation 1..8."""
  orientation = _orientation(image)
  try:
    image.load()
    pixels = _to_rgb(image)
  except InputError as e:
    raise InputError(f'{name}: {e}') from e
  except Exception as e:
    raise InputError(f'{name}: damaged or truncated {image.format or "image"}: {_line(e)}') from e
  if orientation != 1 and _orientation(image) == 1:
    # Pillow turns some formats (TIFF) while loading them. The pixels as stored are needed here, for
    # annotations that were made on them.
    turned = PIL.Image.fromarray(pixels).transpose(_INVERSE[orientation])
    pixels = np.array(turned)
  return pixels, orientation


def _stored_size(image: PIL.Image.Image) -> tuple[int, int]:
  """Returns (height, width), as stored, of a file that has been opened but not loaded."""
  if image.format == 'TIFF':  # Pillow swaps the sides as soon as it has read the orientation.
    return int(image.tag_v2[_TIFF_HEIGHT_TAG]), int(image.tag_v2[_TIFF_WIDTH_TAG])
  return image.height, image.width


def _check_pixels(height: int, width: int, name: str, max_pixels: int) -> None:
  if height * width > max_pixels:
    raise TooManyPixels(f'{name}: too many pixels: {height} x {width} is {height * width:,}, '
                        f'legal: up to {max_pixels:,}')


def _to_rgb(image: PIL.Image.Image) -> np.ndarray:
  """Converts a loaded image of any mode to u8 [H, W, 3]."""
  if image.mode.startswith('I'):
    return _high_byte(np.asarray(image))
  if image.mode == 'F':
    raise InputError('pixels are floating-point numbers of unknown range; convert to 8 bits')
  if 'A' in image.mode or 'a' in image.mode or 'transparency' in image.info:
    return _over_white(np.asarray(image.convert('RGBA')))
  return np.array(image.convert('RGB'))


def _over_white(rgba: np.ndarray) -> np.ndarray:
  """Converts RGBA u8 [H, W, 4] to RGB u8 [H, W, 3] on a white background."""
  rgba = rgba.astype(np.uint16)
  color, alpha = rgba[..., :3], rgba[..., 3:]
  return ((color * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)


def _high_byte(grey: np.ndarray) -> np.ndarray:
  """Converts 16-bit grey [H, W], of any integer type, to u8 [H, W, 3]."""
  low, high = int(grey.min()), int(grey.max())
  if low < 0 or high > 0xffff:
    raise InputError(f'grey values from {low} to {high}, legal: 0 to 65535; convert to 8 bits')
  return np.repeat((grey.astype(np.uint16) >> 8).astype(np.uint8)[..., None], 3, axis=-1)


_without_end: set[str] = set()
_without_end_lock = threading.Lock()


def _note_missing_end(name: str) -> None:
  """Logs that a JPEG has no end marker, once per file and for the first few files only."""
  with _without_end_lock:
    if name in _without_end or len(_without_end) > _NAMED:
      return
    _without_end.add(name)
    count = len(_without_end)
  if count <= _NAMED:
    _log.warning('%s: the JPEG lacks its end marker, but no pixel; it is used', name)
  else:
    _log.warning('more JPEG files lack their end marker, but no pixel; they are used and not named')


def _orientation(image: PIL.Image.Image) -> int:
  """Returns the orientation 1..8 of an open PIL image, 1 if it has none that is legal."""
  with contextlib.suppress(Exception):  # A damaged block does not affect the pixels.
    if orientation := _legal(image.getexif().get(_ORIENTATION_TAG)):
      return orientation
  xmp = image.info.get('xmp') or image.info.get('XML:com.adobe.xmp') or b''
  return _orientation_of_xmp(xmp.encode() if isinstance(xmp, str) else xmp)


def _orientation_of_blocks(exif_block: bytes, xmp_block: bytes) -> int:
  """Returns the orientation 1..8 from the blocks of a JPEG, which are b'' if it has none."""
  with contextlib.suppress(Exception):
    exif = PIL.Image.Exif()
    exif.load(exif_block)
    if orientation := _legal(exif.get(_ORIENTATION_TAG)):
      return orientation
  return _orientation_of_xmp(xmp_block)


def _orientation_of_xmp(block: Any) -> int:
  stated = _XMP_ORIENTATION.search(block) if isinstance(block, bytes) else None
  return int(stated[1]) if stated else 1


def _legal(orientation: Any) -> int:
  return orientation if orientation in range(1, 9) else 0


def _upright(stored: StoredImage, orientation: int, name: str,
             size: tuple[int, int] | None) -> LazyImage:
  """Turns a stored image upright where `decode` does so."""
  upright = stored.size[::-1] if orientation >= 5 else stored.size
  if size is not None and tuple(size) not in (stored.size, upright):
    raise InputError(f'{name}: the image is {_show(upright)}, but the annotations say '
                     f'{_show(size)} (height x width); correct one of them')
  if size is not None and tuple(size) != upright:
    orientation = 1
  return LazyImage.whole(stored, transposed=orientation >= 5,
                         upside_down=orientation in (3, 4, 7, 8),
                         mirrored=orientation in (2, 3, 6, 7))


def _show(size: tuple[int, int]) -> str:
  return f'{size[0]} x {size[1]}'


def _line(error: Exception) -> str:
  return ' '.join(str(error).split()) or type(error).__name__
