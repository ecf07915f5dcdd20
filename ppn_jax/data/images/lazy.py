"""Images that are decoded late, when it is known which of their pixels are needed, and how large.

Crops, flips and borders are only recorded. A JPEG that is to be shrunk is then decoded at a half, a
quarter or an eighth of its size, directly from the coefficients (the scaled inverse DCT of
libjpeg-turbo), and no pixel outside the window is turned or resized.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import cv2
import numpy as np

Window = tuple[int, int, int, int]  # (y, x, height, width) in pixels.
Frame = tuple[float, float, float, float]  # The same, with fractions of pixels.
# (image, height, width) -> u8. With a fourth argument, (rows, columns) as floats, the result shows
# only that part of the image, from its top left corner on.
Kernel = Callable[..., np.ndarray]
Color = tuple[int, int, int]  # RGB.
Region = tuple[tuple[int, int], tuple[int, int]]  # First and last + 1 of rows, then of columns.


class StoredImage(NamedTuple):
  """Stored image and the function that decodes it."""
  size: tuple[int, int]  # (height, width) in pixels.
  # load(f) -> u8 [ceil(height / f), ceil(width / f), 3], or all pixels for any f.
  load: Callable[[int], np.ndarray]
  factors: tuple[int, ...] = ()  # Values of f other than 1, largest first.


@dataclasses.dataclass(frozen=True, eq=False)
class LazyImage:
  """View of a stored image; `np.asarray` converts it to u8 [H, W, 3].

  The view is a window that is turned: first its axes are swapped, then its rows and its columns are
  reversed.

  Attributes:
    stored: The image.
    window: The window, in stored pixels.
    visible: The stored pixels that no crop has cut off.
    canvases: Regions of one colour each around the visible pixels, the innermost first.
    fill: RGB of everything outside the canvases.
    transposed, upside_down, mirrored: How the window is turned.
  """
  stored: StoredImage
  window: Window
  visible: Region
  transposed: bool = False
  upside_down: bool = False
  mirrored: bool = False
  fill: Color = (0, 0, 0)
  canvases: tuple[tuple[Region, Color], ...] = ()

  @classmethod
  def of(cls, image: 'np.ndarray | LazyImage') -> 'LazyImage':
    """Makes a lazy image of decoded pixels, u8 [H, W, 3]; returns a lazy image unchanged."""
    if isinstance(image, LazyImage):
      return image
    return cls.whole(StoredImage(image.shape[:2], lambda factor: image))

  @classmethod
  def whole(cls, stored: StoredImage, **turns: bool) -> 'LazyImage':
    """Makes a view of a whole stored image."""
    height, width = stored.size
    return cls(stored, (0, 0, height, width), ((0, height), (0, width)), **turns)

  @property
  def shape(self) -> tuple[int, int, int]:
    """(H, W, 3), known without decoding."""
    sides = self.window[2:]
    return (*(sides[::-1] if self.transposed else sides), 3)

  def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
    return np.array(self.pixels(), dtype=dtype, copy=copy)

  def crop(self, window: Window, fill: Color | None = None) -> 'LazyImage':
    """Returns the part in a window, which may extend beyond the view.

    Args:
      window: In pixels of the view.
      fill: Colour outside the image; None keeps the present one.
    """
    y, x, height, width = window
    if self.upside_down:
      y = self.shape[0] - y - height
    if self.mirrored:
      x = self.shape[1] - x - width
    if self.transposed:
      y, x, height, width = x, y, width, height
    window = (self.window[0] + y, self.window[1] + x, height, width)
    view = tuple((start, start + side)
                 for start, side in zip(self.window[:2], self.window[2:], strict=True))
    inside = all(low <= start and start + side <= high for (low, high), start, side
                 in zip(view, window[:2], window[2:], strict=True))
    fill = self.fill if fill is None or inside else tuple(fill)
    canvases = tuple((_intersect_regions(region, view), color) for region, color in self.canvases)
    # What the view shows outside the image and its canvases keeps its colour.
    if fill != self.fill and any(axis.exceeds() for axis in self._axes()):
      canvases = (*canvases, (view, self.fill))
    return dataclasses.replace(self, window=window, visible=_intersect_regions(self.visible, view),
                               canvases=canvases, fill=fill)

  def mirror(self) -> 'LazyImage':
    """Reverses left and right."""
    return dataclasses.replace(self, mirrored=not self.mirrored)

  def pixels(self) -> np.ndarray:
    """Returns u8 [H, W, 3], possibly a view of the stored pixels.

    Raises:
      InputError: If the file is damaged.
    """
    return self._draw(self._axes(), None, 1)[0]

  def resize(self, height: int, width: int, kernel: Kernel, *, reduce: bool
             ) -> tuple[np.ndarray, Frame]:
    """Returns the view at another size.

    Args:
      height, width: Size of the result in pixels.
      kernel: Function that resizes pixels.
      reduce: Whether to load the stored image at a fraction of its size if the needed part of it is
        then still no smaller than the result.

    Returns:
      u8 [height, width, 3], and the frame that it shows, in pixels of the view. That is the whole
      view, (0, 0, H, W), unless it has borders, or edges of a crop from an image that was loaded at
      a fraction of its size. These edges are rounded, by at most half a pixel of the result; the
      image's own edges stay exact, if necessary between two loaded pixels.

    Raises:
      InputError: If the file is damaged.
    """
    axes = self._axes((width, height) if self.transposed else (height, width))
    factors = [f for f in self.stored.factors if all(axis.may_reduce(f) for axis in axes)]
    pixels, factor = self._draw(axes, kernel, factors[0] if reduce and factors else 1)
    (y, rows), (x, columns) = (axis.frame(factor) for axis in axes)
    if self.transposed:
      y, x, rows, columns = x, y, columns, rows
    if self.upside_down:
      y = self.shape[0] - y - rows
    if self.mirrored:
      x = self.shape[1] - x - columns
    return pixels, (y, x, rows, columns)

  def _axes(self, out: tuple[int, int] | None = None, region: Region | None = None
            ) -> list['_Axis']:
    """Returns the y and x axes of the window and a region, by default `visible`."""
    return [_Axis(*axis) for axis in zip(
        self.window[:2], self.window[2:], region or self.visible, out or self.window[2:],
        self.stored.size, strict=True)]

  def _draw(self, axes: list['_Axis'], kernel: Kernel | None, factor: int
            ) -> tuple[np.ndarray, int]:
    """Returns the view in the size of the axes, and the factor at which the image was loaded."""
    stored = self.stored.load(factor)
    if stored.shape[:2] == self.stored.size:
      factor = 1
    sides = [axis.out for axis in axes]
    places = self._places(axes)
    if self.transposed:
      sides = sides[::-1]
    if any(first == last for first, last in places):  # The window misses the image.
      return self._canvas(sides), factor
    pixels = self._resize_part(stored, axes, kernel, factor)
    if self.canvases:
      canvas = self._canvas(sides)
      canvas[tuple(slice(*place) for place in places)] = pixels
      return canvas, factor
    borders = [b for (first, last), side in zip(places, sides, strict=True)
               for b in (first, side - last)]
    if any(borders):
      pixels = cv2.copyMakeBorder(pixels, *borders, cv2.BORDER_CONSTANT, value=self.fill)
    return pixels, factor

  def _resize_part(self, stored: np.ndarray, axes: list['_Axis'], kernel: Kernel | None,
                   factor: int) -> np.ndarray:
    """Returns the part of the loaded image in the window, turned, in the size of the axes."""
    parts = [axis.part(factor) for axis in axes]
    pixels = stored[tuple(slice(first, math.ceil(last)) for first, last in parts)]
    sizes = [last - first for first, last in (axis.place for axis in axes)]
    shown = [last - first for first, last in parts]
    if kernel and any(side != int(side) for side in shown):
      # Before turning, which would move the fraction of a pixel to the other end.
      return self._turn(kernel(pixels, *sizes, tuple(shown)))
    pixels = self._turn(pixels)
    return kernel(pixels, *(sizes[::-1] if self.transposed else sizes)) if kernel else pixels

  def _places(self, axes: list['_Axis']) -> list[tuple[int, int]]:
    """Returns first and last + 1 of the result's rows, then columns, that a region fills."""
    places, sides = [axis.place for axis in axes], [axis.out for axis in axes]
    if self.transposed:
      places, sides = places[::-1], sides[::-1]
    for at, turned_over in enumerate((self.upside_down, self.mirrored)):
      if turned_over:
        places[at] = (sides[at] - places[at][1], sides[at] - places[at][0])
    return places

  def _canvas(self, sides: list[int]) -> np.ndarray:
    """Returns the view without the image, u8 [H, W, 3]."""
    canvas = np.full((*sides, 3), self.fill, np.uint8)
    out = tuple(sides[::-1] if self.transposed else sides)
    for region, color in reversed(self.canvases):
      places = self._places(self._axes(out, region))
      canvas[tuple(slice(*place) for place in places)] = color
    return canvas

  def _turn(self, pixels: np.ndarray) -> np.ndarray:
    # Not NumPy views, because a negative stride makes every later operation copy.
    if self.transposed:
      pixels = cv2.transpose(pixels)
    if self.upside_down or self.mirrored:
      code = 1 if not self.upside_down else -1 if self.mirrored else 0
      pixels = cv2.flip(pixels, code)
    return pixels


@dataclasses.dataclass(frozen=True)
class _Axis:
  """One axis of a window that is resized to `out` pixels, in the order of the stored pixels.

  Attributes:
    start, length: Position and size of the window in stored pixels.
    region: First and last + 1 of the stored pixels that may be shown.
    out: Number of pixels of the result.
    side: Number of stored pixels.
  """
  start: int
  length: int
  region: tuple[int, int]
  out: int
  side: int

  def exceeds(self) -> bool:
    """Returns whether the window extends beyond the region."""
    return self.start < self.region[0] or self.start + self.length > self.region[1]

  def part(self, factor: int) -> tuple[int, float]:
    """Returns the first and the end of the shown pixels, in pixels loaded at 1 / factor.

    They are rounded to whole pixels, except for the end of the image: if the factor does not divide
    the side, only a part of the last pixel belongs to the image.
    """
    first, last = self._shown
    if factor == 1 or first == last:
      return first, last
    return _nearest(first / factor), last / factor if last == self.side else _nearest(last / factor)

  @functools.cached_property
  def _shown(self) -> tuple[int, int]:
    return _intersect((self.start, self.start + self.length), self.region)

  @functools.cached_property
  def place(self) -> tuple[int, int]:
    """First and last + 1 of the result's pixels that the shown pixels fill."""
    first, last = self._shown
    if first == last:
      return 0, 0
    scale = self.out / self.length
    to_first, to_last = (_nearest((at - self.start) * scale) for at in (first, last))
    if to_first == to_last:  # Less than half a pixel, which must be visible nevertheless.
      to_first = min(to_first, self.out - 1)
    return to_first, max(to_last, to_first + 1)

  def may_reduce(self, factor: int) -> bool:
    """Returns whether at least one loaded pixel is left for each pixel of the result."""
    (first, last), (to_first, to_last) = self.part(factor), self.place
    return last - first >= to_last - to_first

  def frame(self, factor: int) -> tuple[float, float]:
    """Returns start, relative to the window, and length of the shown part, in stored pixels."""
    (first, last), (to_first, to_last) = self.part(factor), self.place
    exact = (first * factor, last * factor) == self._shown
    if first == last or (exact and not self.exceeds()):
      return 0.0, float(self.length)
    scale = (last - first) * factor / (to_last - to_first)
    return first * factor - to_first * scale - self.start, self.out * scale


def _intersect(span: tuple[int, int], region: tuple[int, int]) -> tuple[int, int]:
  """Returns the intersection of two spans, of length 0 if it is empty."""
  low, high = region
  first = min(max(span[0], low), high)
  return first, max(min(span[1], high), first)


def _intersect_regions(a: Region, b: Region) -> Region:
  """Returns the intersection of two regions."""
  return tuple(_intersect(span, region) for span, region in zip(b, a, strict=True))


def _nearest(value: float) -> int:
  return math.floor(value + 0.5)
