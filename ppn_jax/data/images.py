"""Bytes of an image file -> pixels: whole, upright, RGB, 8 bits; or an error naming the file."""

import io
import pathlib
import warnings
from collections.abc import Callable
from typing import BinaryIO

import numpy as np
import PIL.Image
import simplejpeg

from ppn_jax import files
from ppn_jax.data.lazy_image import LazyImage, StoredImage
from ppn_jax.errors import InputError

# Formats whose decoders notice a truncated file (JPEG 2000 does not always). Not EPS, for which
# Pillow would start Ghostscript on a stranger's file.
PIL.Image.init()
_FORMATS = tuple(f for f in ('JPEG', 'PNG', 'WEBP', 'AVIF', 'BMP', 'GIF', 'TIFF', 'PPM')
                 if f in PIL.Image.OPEN)
# How such files are called.
SUFFIXES = frozenset({'.jpg', '.jpeg', '.jpe', '.png', '.webp', '.avif', '.bmp', '.gif', '.tif',
                      '.tiff', '.ppm', '.pgm'})
_ORIENTATION_TAG = 0x0112

# Pillow warns of many pixels, which are counted here, and of metadata, which do not touch the
# pixels. A filter for good: `warnings.catch_warnings` is not safe in threads.
warnings.filterwarnings('ignore', module=r'PIL\.')


def read(path: str) -> bytes:
  """What a file holds.

  Raises:
    InputError: it cannot be read.
  """
  try:
    return files.retried(pathlib.Path(path).read_bytes)
  except OSError as e:
    raise InputError(f'{path}: cannot be read: {e.strerror}') from e


def read_sizes(path: str) -> tuple[tuple[int, int], tuple[int, int]]:
  """(height, width) of an image file as it is stored and as it is seen upright, by its header.

  Raises:
    InputError: no such file, or not an image.
  """
  try:
    with open(path, 'rb') as f:
      return header_sizes(f, path)
  except OSError as e:
    raise InputError(f'{path}: cannot be read: {e.strerror}') from e


def header_sizes(file: BinaryIO, name: str) -> tuple[tuple[int, int], tuple[int, int]]:
  """As `read_sizes`, of an open file called `name`."""
  try:
    with PIL.Image.open(file, formats=_FORMATS) as image:
      stored = image.height, image.width
      orientation = _orientation(image.getexif)
  except PIL.UnidentifiedImageError as e:
    raise InputError(f'{name}: not an image that can be read') from e
  except Exception as e:  # Pillow's plugins raise whatever a damaged file makes them stumble on.
    raise InputError(f'{name}: damaged image: {_line(e)}') from e
  return stored, stored[::-1] if orientation >= 5 else stored


def stored_size(data: bytes, name: str) -> tuple[int, int]:
  """(height, width) of an image file's bytes as it is stored, by its header."""
  try:
    return simplejpeg.decode_jpeg_header(data)[:2]
  except ValueError:
    return header_sizes(io.BytesIO(data), name)[0]


def decode(data: bytes, *, name: str, size: tuple[int, int] | None = None,
           max_pixels: int = 178_956_970) -> np.ndarray:
  """Decodes an image file.

  Grey and palette images become RGB, CMYK is converted without a colour profile, 16-bit
  channels keep their upper byte, transparent pixels are laid over white, of an animation the
  first frame counts.

  An image whose EXIF orientation turns it is turned upright if that gives `size`, and left as
  it is stored if only that gives `size`: the pixels must be the ones that were annotated.

  Args:
    data: what the file holds.
    name: the file's name, for error messages.
    size: (height, width) that the annotations state; None takes the upright image.
    max_pixels: of the header's height x width, checked before anything is decoded. Files other
      than JPEG are also under Pillow's own limit, which is this default.

  Returns:
    u8 [H, W, 3], RGB, C-contiguous.

  Raises:
    InputError: not an image, truncated, damaged, too large, or of another size than stated.
  """
  return open_image(data, name=name, size=size, max_pixels=max_pixels).pixels()


def load(path: str) -> np.ndarray:
  """`decode` of a file, which its errors name."""
  return decode(read(path), name=path)


def open_image(data: bytes, *, name: str, size: tuple[int, int] | None = None,
               max_pixels: int = 178_956_970) -> LazyImage:
  """As `decode`, but a JPEG's pixels are made when they are asked for.

  What the header tells is checked now; that a file is truncated or damaged is found when the
  pixels are made, whether all of them or fewer.
  """
  if not data:
    raise InputError(f'{name}: the file is empty')
  if data[:2] == b'\xff\xd8':
    stored, orientation = _open_jpeg(data, name, max_pixels)
  else:
    stored, orientation = _stored(*_decode_other(data, name, max_pixels))
  return _upright(stored, orientation, name, size)


def encode_jpeg(image: np.ndarray, quality: int = 92) -> bytes:
  """u8 [H, W, 3] RGB -> a JPEG file without EXIF."""
  return simplejpeg.encode_jpeg(np.ascontiguousarray(image), quality=quality)


def _open_jpeg(data: bytes, name: str, max_pixels: int) -> tuple[StoredImage, int]:
  """The image as stored, and the EXIF orientation 1..8."""
  try:
    height, width, color, _ = simplejpeg.decode_jpeg_header(data)
  except ValueError:  # Also a legal file of a kind that libjpeg's short interface does not know.
    return _stored(*_decode_other(data, name, max_pixels))
  _check_pixels(height, width, name, max_pixels)
  cmyk = color in ('CMYK', 'YCCK')

  def load(factor: int) -> np.ndarray:
    try:
      return _load_cmyk(data) if cmyk else simplejpeg.decode_jpeg(
          data, colorspace='RGB', min_height=-(-height // factor), min_width=-(-width // factor),
          min_factor=factor)
    except ValueError as e:
      # Two complaints that cost no pixel: padding before the end marker, and a header that some
      # telephones write. Pillow shrugs at both and still refuses a truncated file.
      if 'before marker 0xd9' in str(e) or 'Invalid SOS parameters' in str(e):
        return _decode_other(data, name, max_pixels)[0]
      raise InputError(f'{name}: damaged or truncated JPEG: {_line(e)}') from e

  factors = () if cmyk else (8, 4, 2)
  return StoredImage((height, width), load, factors), _orientation(lambda: _exif_of_jpeg(data))


def _load_cmyk(data: bytes) -> np.ndarray:
  # Every writer of such files follows Adobe and stores 255 minus the ink.
  cmyk = simplejpeg.decode_jpeg(data, colorspace='CMYK').astype(np.uint16)
  return ((cmyk[..., :3] * cmyk[..., 3:] + 127) // 255).astype(np.uint8)


def _stored(pixels: np.ndarray, orientation: int) -> tuple[StoredImage, int]:
  return LazyImage.of(pixels).stored, orientation


def _decode_other(data: bytes, name: str, max_pixels: int) -> tuple[np.ndarray, int]:
  """Pixels as stored, and the EXIF orientation 1..8, of what Pillow opens."""
  try:
    image = PIL.Image.open(io.BytesIO(data), formats=_FORMATS)
    height, width = image.height, image.width
  except PIL.Image.DecompressionBombError as e:
    raise InputError(f'{name}: too many pixels: {_line(e)}') from e
  except PIL.UnidentifiedImageError as e:
    raise InputError(f'{name}: not an image that can be read; it starts with {data[:8]!r}, '
                     f"legal: {', '.join(_FORMATS)}") from e
  except Exception as e:  # Pillow's plugins raise whatever a damaged file makes them stumble on.
    raise InputError(f'{name}: damaged or truncated image: {_line(e)}') from e
  _check_pixels(height, width, name, max_pixels)
  try:
    image.load()
    pixels = _to_rgb(image)
  except InputError as e:
    raise InputError(f'{name}: {e}') from e
  except Exception as e:
    raise InputError(f'{name}: damaged or truncated {image.format}: {_line(e)}') from e
  return pixels, _orientation(image.getexif)


def _check_pixels(height: int, width: int, name: str, max_pixels: int) -> None:
  if height * width > max_pixels:
    raise InputError(f'{name}: too many pixels: {height} x {width} is {height * width:,}, '
                     f'legal: up to {max_pixels:,}')


def _to_rgb(image: PIL.Image.Image) -> np.ndarray:
  """A loaded image of any mode -> u8 [H, W, 3]."""
  if image.mode.startswith('I'):
    return _high_byte(np.asarray(image))
  if image.mode == 'F':
    raise InputError('pixels are floating-point numbers of no stated range; convert to 8 bits')
  if 'A' in image.mode or 'a' in image.mode or 'transparency' in image.info:
    rgba = np.asarray(image.convert('RGBA')).astype(np.uint16)
    color, alpha = rgba[..., :3], rgba[..., 3:]
    return ((color * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)
  return np.array(image.convert('RGB'))


def _high_byte(grey: np.ndarray) -> np.ndarray:
  """16-bit grey [H, W], in whatever integer Pillow holds it -> u8 [H, W, 3]."""
  low, high = int(grey.min()), int(grey.max())
  if low < 0 or high > 0xffff:
    raise InputError(f'grey values from {low} to {high}, legal: 0 to 65535; convert to 8 bits')
  return np.repeat((grey.astype(np.uint16) >> 8).astype(np.uint8)[..., None], 3, axis=-1)


def _exif_of_jpeg(data: bytes) -> PIL.Image.Exif:
  """Looks for the EXIF block among the segments before the first scan.

  By hand because nearly no file of a data set has one, and opening every file with Pillow would
  hold the interpreter's lock longer than all the rest does.
  """
  exif = PIL.Image.Exif()
  at = 2
  while at + 4 <= len(data) and data[at] == 0xff and data[at + 1] != 0xda:
    if data[at + 1] == 0xff:  # A filler byte.
      at += 1
      continue
    length = int.from_bytes(data[at + 2:at + 4], 'big')
    segment = data[at + 4:at + 2 + length]
    if data[at + 1] == 0xe1 and segment.startswith(b'Exif\0\0'):
      exif.load(segment)
      break
    at += 2 + length
  return exif


def _orientation(read_exif: Callable[[], PIL.Image.Exif]) -> int:
  try:
    orientation = read_exif().get(_ORIENTATION_TAG, 1)
  except Exception:  # A garbled EXIF block does not make the pixels worse.
    return 1
  return orientation if orientation in range(1, 9) else 1


def _upright(stored: StoredImage, orientation: int, name: str,
             size: tuple[int, int] | None) -> LazyImage:
  """The stored image, turned where `decode` says so."""
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
