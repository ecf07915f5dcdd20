"""Images that are drawn on demand: shapes on textured backgrounds, with exact boxes."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import cv2
import numpy as np

from ppn_jax.data.checks import check_integer, check_range
from ppn_jax.data.images import decoding as image_files
from ppn_jax.detection.structures import Category, Example
from ppn_jax.errors import InputError

_NAMES = ('circle', 'square', 'triangle', 'star', 'cross')
_SPLITS = ('train', 'eval')
_DRAWING = 1  # Version of the drawing; increases if the same arguments give other images.
_TAG = 0x5ba9e5  # Separates these random streams from others of the same seed.
_SUBPIXEL_BITS = 4  # OpenCV draws at sixteenths of a pixel.
_TRIES = 12  # Positions to try for a shape before it is left out.
_OVERLAP = 0.15  # Largest overlap of two boxes, as a share of the smaller one's area.


class _Shape(NamedTuple):
  label: int
  outline: np.ndarray  # f64 [P, 2], (x, y) in pixels from the corner of the image.
  box: np.ndarray  # f64 [4], [ymin, xmin, ymax, xmax] of the outline in pixels.


class SyntheticShapes:
  """Images of circles, squares, triangles, stars and crosses, which need no files.

  Image i is a function of (seed, split, i). Its shapes have log-uniform sizes, are rotated and
  slightly stretched, and have colours and shading of their own. They are drawn on a mottled
  background and encoded as JPEG, so that they are processed like photographs. Boxes overlap little,
  and a shape that is drawn later hides a part of an earlier one.

  Args:
    num_images: Number of images.
    seed: At least 0.
    split: 'train' or 'eval', which have no image in common, for any seeds.
    image_size: (height, width) in pixels, or the side of a square.
    max_shapes: Largest number of shapes in an image; the smallest is 1.
    scale: Smallest and largest extent of a shape, as shares of the image's shorter side.
    max_turn: Largest rotation of a shape to either side in degrees, 0 to 180.

  Raises:
    InputError: If an argument is outside its range.
  """
  categories = tuple(Category(i, name) for i, name in enumerate(_NAMES, start=1))
  contents = None  # No report, which would have to lay out all images; none can be wrong.

  def __init__(self, num_images: int, seed: int = 0, split: str = 'train',
               image_size: int | Sequence[int] = 160, max_shapes: int = 6,
               scale: Sequence[float] = (0.08, 0.7), max_turn: float = 180.0):
    check_integer('synthetic_shapes.num_images', num_images, 1)
    check_integer('synthetic_shapes.seed', seed, 0)
    check_integer('synthetic_shapes.max_shapes', max_shapes, 1)
    check_range('synthetic_shapes.scale', scale, 0.02, 0.9)
    check_range('synthetic_shapes.max_turn', (0, max_turn), 0, 180)
    if split not in _SPLITS:
      raise InputError(f"synthetic_shapes.split is {split!r}, legal: 'train', 'eval'")
    size = image_size if isinstance(image_size, Sequence) else (image_size, image_size)
    for side in size:
      check_integer('synthetic_shapes.image_size', side, 32)
    check_range('synthetic_shapes.image_size', sorted(size), 32, 4096)
    self._num_images, self._key = num_images, (_TAG, seed, _SPLITS.index(split))
    self._size, self._scale = tuple(size), tuple(scale)
    self._max_turn = np.deg2rad(max_turn)
    self.max_boxes = max_shapes

  def __len__(self) -> int:
    return self._num_images

  def __getitem__(self, index: int) -> Example:
    index = range(self._num_images)[index]
    shapes = self._layout(index)
    rng = np.random.default_rng((*self._key, index, 1))
    canvas = _background(rng, self._size)
    for shape in shapes:
      _draw(rng, canvas, shape)
    grain = rng.integers(-6, 7, self._size, dtype=np.int16)
    noisy = cv2.add(canvas, cv2.merge([grain] * 3), dtype=cv2.CV_8U)
    name = f'synthetic image {index}'
    image = image_files.decode(image_files.encode_jpeg(noisy), name=name, size=self._size)
    height, width = self._size
    boxes = np.array([s.box for s in shapes]) / [height, width, height, width]
    return Example(image, boxes.astype(np.float32), np.array([s.label for s in shapes], np.int32),
                   np.zeros(len(shapes), bool), index + 1, self._size)

  def stamp(self, index: int) -> bytes:
    """See `OptionalMembers`."""
    return repr((_DRAWING, self._key, index, self._size, self._scale, float(self._max_turn),
                 self.max_boxes)).encode()

  def ground_truth(self) -> dict[str, Any]:
    """Returns the ground truth, for which images are laid out but not drawn; see `Source`."""
    height, width = self._size
    images = [{'id': i + 1, 'file_name': f'{i:06d}.jpg', 'height': height, 'width': width}
              for i in range(len(self))]
    annotations = []
    for i in range(len(self)):
      for shape in self._layout(i):
        ymin, xmin, ymax, xmax = shape.box.tolist()
        annotations.append({
            'id': len(annotations) + 1, 'image_id': i + 1, 'iscrowd': 0,
            'category_id': self.categories[shape.label].id,
            'bbox': [xmin, ymin, xmax - xmin, ymax - ymin],
            'area': float(cv2.contourArea(shape.outline.astype(np.float32)))})
    return {'images': images, 'annotations': annotations,
            'categories': [c._asdict() for c in self.categories]}

  def _layout(self, index: int) -> list[_Shape]:
    """Returns the shapes of an image, at least one, the largest first."""
    rng = np.random.default_rng((*self._key, index, 0))
    number = rng.integers(1, self.max_boxes + 1)
    extents = np.sort(np.exp(rng.uniform(*np.log(self._scale), number)))[::-1] * min(self._size)
    shapes = []
    for extent in extents:
      label = int(rng.integers(len(_NAMES)))
      outline = _outline(rng, _NAMES[label], extent, self._max_turn)
      place = _place(rng, outline.max(axis=0), self._size, [s.box for s in shapes])
      if place is not None:
        outline = outline + place
        box = np.concatenate([outline.min(axis=0)[::-1], outline.max(axis=0)[::-1]])
        shapes.append(_Shape(label, outline, box))
    return shapes


def _outline(rng: np.random.Generator, name: str, extent: float,
             max_turn: float) -> np.ndarray:
  """Makes a randomly rotated and stretched outline, f64 [P, 2], of longer side `extent`."""
  stretch = np.exp(rng.uniform(-0.18, 0.18))
  points = _turn(_POLYGONS[name], rng.uniform(-max_turn, max_turn)) * [stretch, 1 / stretch]
  points -= points.min(axis=0)
  return points * (extent / points.max())


def _turn(points: np.ndarray, angle: float) -> np.ndarray:
  """Rotates points [P, 2] about the origin, by `angle` in radians."""
  return points @ np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])


def _regular(corners: int, radii: Sequence[float] = (1.0,)) -> np.ndarray:
  """Makes a polygon around the origin, f64 [corners, 2], with the first corner on the right.

  The distances of the corners from the origin are `radii`, repeated.
  """
  angle = np.arange(corners) * 2 * np.pi / corners
  radius = np.resize(radii, corners)
  return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=-1)


_ARM = 0.3  # Half the width of the cross's arms, relative to their length.
_POLYGONS = {  # Upright, with y pointing down.
    'circle': _regular(48),
    'square': _turn(_regular(4), np.pi / 4),
    'triangle': _turn(_regular(3), -np.pi / 2),
    'star': _turn(_regular(10, (1.0, 0.42)), -np.pi / 2),
    'cross': np.array([(1, _ARM), (_ARM, _ARM), (_ARM, 1), (-_ARM, 1), (-_ARM, _ARM), (-1, _ARM),
                       (-1, -_ARM), (-_ARM, -_ARM), (-_ARM, -1), (_ARM, -1), (_ARM, -_ARM),
                       (1, -_ARM)]),
}


def _place(rng: np.random.Generator, sides: np.ndarray, size: tuple[int, int],
           taken: list[np.ndarray]) -> np.ndarray | None:
  """Finds a position for a shape with sides (x, y), None if it would overlap others too much."""
  corners = rng.random((_TRIES, 2)) * (np.array(size[::-1]) - 1 - sides) + 0.5
  free = np.ones(_TRIES, bool)
  for ymin, xmin, ymax, xmax in taken:
    overlap = np.minimum(corners + sides, [xmax, ymax]) - np.maximum(corners, [xmin, ymin])
    smaller = min(sides.prod(), (ymax - ymin) * (xmax - xmin))
    free &= np.maximum(overlap, 0).prod(axis=-1) <= _OVERLAP * smaller
  return corners[np.argmax(free)] if free.any() else None


def _background(rng: np.random.Generator, size: tuple[int, int]) -> np.ndarray:
  """Draws coarse and fine blotches between two muted colours, u8 [H, W, 3]."""
  height, width = size
  mix = np.zeros(size, np.float32)
  for cells, strength in ((3, 0.6), (9, 0.35), (27, 0.25)):
    coarse = rng.uniform(-strength, strength, (cells, cells)).astype(np.float32)
    mix += cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)
  first, second = (_color(rng, saturation=(20, 110), value=(50, 210)) for _ in range(2))
  table = first + (second - first) * np.linspace(0, 1, 256)[:, None]
  levels = cv2.convertScaleAbs(np.clip(mix + 0.5, 0, 1), alpha=255)
  return cv2.LUT(cv2.merge([levels] * 3), table.astype(np.uint8)[None])


def _color(rng: np.random.Generator, saturation: tuple[int, int],
           value: tuple[int, int]) -> np.ndarray:
  """Draws a colour of any hue, f32 [3], RGB in 0..255."""
  hsv = np.uint8([[[rng.integers(256), rng.integers(*saturation), rng.integers(*value)]]])
  return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB_FULL)[0, 0].astype(np.float32)


def _draw(rng: np.random.Generator, canvas: np.ndarray, shape: _Shape) -> None:
  """Draws a shape with shading or stripes in a colour that differs from its surroundings."""
  top, left = np.floor(shape.box[:2]).astype(int)
  bottom, right = np.ceil(shape.box[2:]).astype(int)
  patch = canvas[top:bottom, left:right]
  mask = np.zeros(patch.shape[:2], np.uint8)
  # In OpenCV whole coordinates are the centres of pixels, half a pixel from their corners.
  points = np.rint((shape.outline - [left, top] - 0.5) * 2**_SUBPIXEL_BITS).astype(np.int32)
  cv2.fillPoly(mask, [points], 255, cv2.LINE_AA, _SUBPIXEL_BITS)
  around = patch.mean(axis=(0, 1))
  colors = [_color(rng, saturation=(60, 256), value=(40, 256)) for _ in range(4)]
  color = max(colors, key=lambda c: np.abs(c - around).sum())
  alpha = mask[..., None] * np.float32(1 / 255)
  paint = color * _shading(rng, patch.shape[:2])[..., None]
  patch[:] = np.clip(patch + (paint - patch) * alpha, 0, 255)


def _shading(rng: np.random.Generator, size: tuple[int, int]) -> np.ndarray:
  """Draws brightness around 1, f32 [h, w]: stripes with probability 1/3, else a gradient."""
  angle = rng.uniform(0, 2 * np.pi)
  y = np.linspace(-1, 1, size[0], dtype=np.float32)[:, None] * np.float32(np.sin(angle))
  x = np.linspace(-1, 1, size[1], dtype=np.float32)[None] * np.float32(np.cos(angle))
  if rng.random() < 1 / 3:
    return 1 + 0.22 * np.sin((y + x) * np.float32(rng.uniform(6, 14)))
  return 1 + np.float32(rng.uniform(0.05, 0.25)) * (y + x)
