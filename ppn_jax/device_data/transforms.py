"""Augmentation of `data.transforms` on the device, for one image, to be vmapped.

Geometric ops only update a `View`; the pixels are read once, at the end. Colour ops then change the
network's input, and mixup blends two of them. The distributions are those of the host's ops; the
random numbers are not.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ppn_jax.data.transforms.basic import (
  HorizontalFlip,
  PhotometricDistortion,
  Resize,
  build_transforms,
)
from ppn_jax.data.transforms.mixing import Mixup
from ppn_jax.data.transforms.random_crop import SsdRandomCrop
from ppn_jax.data.transforms.zoom import Expand, LargeScaleJitter
from ppn_jax.detection import boxes as box_ops
from ppn_jax.detection.frame import FILL, ImageSize, InputFrame, sides_of
from ppn_jax.detection.structures import Array, GroundTruth
from ppn_jax.device_data.resize import KERNELS, crop_and_resize
from ppn_jax.errors import InputError, did_you_mean

_WHOLE = np.float32([0, 0, 1, 1])


class View(NamedTuple):
  """Image with its ground truth after the ops so far; its pixels are read later."""
  size: Array  # f32 [2], (height, width) in whole pixels.
  frame: Array  # f32 [4], the box of the stored image that is shown.
  mirrored: Array  # bool [], left to right.
  ground_truth: GroundTruth  # [G, ...]; dropped boxes are not valid, at any position.
  visible: Array = _WHOLE  # f32 [4], the box of the stored image that no crop has cut off.


class Stored(NamedTuple):
  """Stored image with its ground truth."""
  image: Array  # u8 [3, R, R], or of another shape.
  size: Array  # i32 [2], (height, width) of the original, in whose pixels the ops draw.
  ground_truth: GroundTruth  # [G, ...].


class Augmentation(NamedTuple):
  """Ops of `data.transforms` and the resize to the network's input.

  Fields:
    ops: dataclasses of `data.transforms`, in order.
    image_size: S, side of the network's input in pixels, or (height, width).
    kernel: resizing kernel, one of `resize.KERNELS`.
    resize_mode: one of `frame.RESIZE_MODES`.
  """
  ops: tuple[Any, ...]
  image_size: ImageSize
  kernel: str
  resize_mode: str = 'stretch'

  @property
  def frame(self) -> InputFrame:
    """Geometry of the network's input."""
    return InputFrame.of(self.image_size, self.resize_mode)

  @property
  def mixup(self) -> int | None:
    """Position of the op that blends two images; None if there is none."""
    return next((n for n, op in enumerate(self.ops) if type(op) is Mixup), None)

  def view(self, size: Array, ground_truth: GroundTruth, key: Array) -> View:
    """Applies the geometric ops to an image of `size` (i32 [2], pixels)."""
    view = View(size.astype(jnp.float32), jnp.float32(_WHOLE), jnp.bool_(False), ground_truth)
    for number, op in enumerate(self.ops):
      if type(op) in _GEOMETRY:
        view = _GEOMETRY[type(op)](op, view, jax.random.fold_in(key, number))
    return view

  def __call__(self, image: Array, size: Array, ground_truth: GroundTruth, key: Array,
               other: Stored | None = None) -> tuple[Array, GroundTruth]:
    """Augments a stored image and resizes it to the network's input.

    Args:
      image: u8 [3, R, R].
      size: i32 [2], (height, width) of the original, in whose pixels the ops draw.
      ground_truth: [G, ...].
      key: random key of this image in this epoch.
      other: image that mixup blends with this one, which only takes the ops before mixup.

    Returns:
      Image u8 [S, S, 3], and its ground truth [G, ...], zero where it is not valid.
    """
    last = len(self.ops) if self.mixup is None else self.mixup
    pixels, ground_truth = self._shown(Stored(image, size, ground_truth), last, key)
    if self.mixup is not None:
      assert other is not None, 'mixup needs another image'
      own_key = jax.random.fold_in(key, last)
      pixels, ground_truth = _mixup(
          self.ops[last], own_key, (pixels, ground_truth),
          self._shown(other, last, jax.random.fold_in(own_key, _OTHER_TAG)))
    for number, op in enumerate(self.ops[last + 1:], start=last + 1):
      pixels = _COLOR[type(op)](op, pixels, jax.random.fold_in(key, number))
    valid = ground_truth.valid
    boxes = jnp.where(valid[:, None], ground_truth.boxes, 0)
    labels = jnp.where(valid, ground_truth.labels, 0)
    return (jnp.rint(pixels).astype(jnp.uint8).transpose(1, 2, 0),
            GroundTruth(boxes, labels, ground_truth.crowd & valid, valid))

  def _shown(self, stored: Stored, count: int, key: Array) -> tuple[Array, GroundTruth]:
    """Applies the first `count` ops and resizes; returns f32 [3, S, S] and the ground truth."""
    image, size, ground_truth = stored
    view = self.view(size, ground_truth, key)
    fills = any(isinstance(op, _FILLING) for op in self.ops)
    content = self.frame.content(view.size) if self.frame.keeps_aspect else None
    image, seen = crop_and_resize(image, view.frame, view.mirrored, self.image_size, self.kernel,
                                  beyond=fills, visible=view.visible if fills else None,
                                  content=content)
    for number, op in enumerate(self.ops[:count]):
      if isinstance(op, _FILLING):  # Only later colour ops change the fill.
        image = image * seen + jnp.float32(op.fill)[:, None, None] * (1 - seen)
      if type(op) in _COLOR:
        image = _COLOR[type(op)](op, image, jax.random.fold_in(key, number))
    if content is not None:  # The host fills the rest after the colour ops, too.
      rows, columns = (jnp.arange(side) < filled
                       for side, filled in zip(sides_of(self.image_size), content, strict=True))
      image = jnp.where(rows[:, None] & columns, image, FILL)
    boxes = self.frame.to_input(view.ground_truth.boxes, view.size)
    return image, view.ground_truth._replace(boxes=boxes)


def build_augmentation(blocks: Sequence[Mapping[str, Any]], *, image_size: ImageSize, resize: str,
                       resize_mode: str = 'stretch') -> Augmentation:
  """Builds the device's augmentation from a config's `data.transforms` and how images are resized.

  Raises:
    InputError: If a block is bad (see `build_transforms`), or an op is not available on the device.
  """
  ops = build_transforms(blocks, resize_mode)
  kernel = Resize(image_size, resize, resize_mode=resize_mode).method
  for block, op in zip(blocks, ops, strict=True):
    # Not isinstance, since a subclass may behave differently.
    if type(op) not in (*_GEOMETRY, *_COLOR, Mixup):
      raise InputError(f'transform {block["name"]!r} is not available on the device; remove it, or '
                       'train with data.resident.enabled=False')
    if isinstance(op, (Resize, LargeScaleJitter, Mixup)):
      kernel = op.method
      if any(a < b for a, b in zip(sides_of(op.size), sides_of(image_size), strict=True)):
        raise InputError(f'{block["name"]}.size is {op.size}, below model.image_size={image_size}, '
                         'which is not available on the device; train with '
                         'data.resident.enabled=False')
    mode = getattr(op, 'resize_mode', resize_mode)
    if mode != resize_mode or (type(op) is Resize and mode == 'letterbox'):
      raise InputError(f'{block["name"]}.resize_mode={mode!r} with data.resize_mode='
                       f'{resize_mode!r} is not available on the device; remove it, or train with '
                       'data.resident.enabled=False')
  if kernel not in KERNELS:
    raise InputError(f'resize method {kernel!r} is not available on the device; '
                     f'{did_you_mean(kernel, KERNELS)}')
  filling = [block['name'] for block, op in zip(blocks, ops, strict=True)
             if isinstance(op, _FILLING)]
  if len(filling) > 1:
    raise InputError(f'transforms {filling[0]!r} and {filling[1]!r} both add a border around the '
                     'image; with data.resident.enabled=True only one transform may')
  _check_mixup([block['name'] for block in blocks], ops, image_size)
  return Augmentation(ops, image_size, kernel, resize_mode)


def _check_mixup(names: Sequence[str], ops: Sequence[Any], image_size: ImageSize) -> None:
  """Checks that mixup, if there is one, blends inputs of the network.

  Raises:
    InputError: If it does not.
  """
  at = next((n for n, op in enumerate(ops) if type(op) is Mixup), len(ops))
  for name, op in zip(names[at + 1:], ops[at + 1:], strict=True):
    if type(op) not in _COLOR:
      raise InputError(f'transform {name!r} follows {names[at]!r}, which is not available on the '
                       'device; put it before, or train with data.resident.enabled=False')
  if at < len(ops) and sides_of(ops[at].size) != sides_of(image_size):
    raise InputError(f'{names[at]}.size is {ops[at].size}, but with data.resident.enabled=True it '
                     f'must be model.image_size={image_size}')


def _horizontal_flip(op: HorizontalFlip, view: View, key: Array) -> View:
  flip, ground_truth = jax.random.uniform(key) < op.probability, view.ground_truth
  boxes = jnp.where(flip, box_ops.flip_horizontal(ground_truth.boxes), ground_truth.boxes)
  return view._replace(mirrored=view.mirrored ^ flip,
                       ground_truth=ground_truth._replace(boxes=boxes))


def _resize(op: Resize | LargeScaleJitter, view: View, key: Array) -> View:
  return view._replace(size=jnp.float32(sides_of(op.size)))


def _expand(op: Expand, view: View, key: Array) -> View:
  draws = jax.random.uniform(key, (4,))
  size = jnp.rint(view.size * _between(op.ratio, draws[0]))
  corner = -jnp.floor(draws[1:3] * (size - view.size + 1))
  larger = crop(view, jnp.concatenate([corner, corner + size]), 0)
  return jax.tree.map(lambda a, b: jnp.where(draws[3] < op.probability, a, b), larger, view)


def _large_scale_jitter(op: LargeScaleJitter, view: View, key: Array) -> View:
  draws = jax.random.uniform(key, (3,))
  height, width = sides_of(op.size)
  # As `zoom.smallest_frame`; a factor of 1 changes nothing.
  ratios = jnp.float32([height / width, width / height])
  smallest = jnp.maximum(view.size, view.size[::-1] * ratios)
  frame = jnp.maximum(jnp.rint(smallest / _between(op.scale, draws[0])), 1)
  corner = jnp.floor(draws[1:] * (jnp.maximum(view.size - frame, 0) + 1))
  view = crop(view, jnp.concatenate([corner, corner + frame]), op.min_coverage)
  boxes = view.ground_truth.boxes
  sides = (boxes[:, 2:] - boxes[:, :2]) * jnp.float32(sides_of(op.size))
  large = sides.min(axis=-1) >= op.min_side
  valid = view.ground_truth.valid & (large | view.ground_truth.crowd) & (box_ops.area(boxes) > 0)
  return _resize(op, view._replace(ground_truth=view.ground_truth._replace(valid=valid)), key)


def _ssd_random_crop(op: SsdRandomCrop, view: View, key: Array) -> View:
  # One call, since each is slow to compile.
  draws = jax.random.uniform(key, (4 * op.attempts + 2,))
  coverage = jnp.float32(op.coverages)[jnp.int32(draws[0] * len(op.coverages))]
  window = draw_window(op, view.size, view.ground_truth, coverage,
                       draws[2:].reshape(4, op.attempts))
  keep = draws[1] < op.keep_probability
  return jax.tree.map(lambda a, b: jnp.where(keep, a, b), view, crop(view, window, coverage))


def crop(view: View, window: Array, coverage: Array) -> View:
  """Crops like `data.transforms.geometry.crop`.

  Args:
    view: image to crop.
    window: f32 [4], [ymin, xmin, ymax, xmax] in pixels; it may reach beyond the image.
    coverage: least share of a box inside the window for the box to be kept.
  """
  frame, ground_truth = window / jnp.tile(view.size, 2), view.ground_truth
  share = box_ops.coverage(ground_truth.boxes, frame[None])[:, 0]
  valid = ground_truth.valid & (share > 0) & (ground_truth.crowd | (share >= coverage))
  boxes = box_ops.clip((ground_truth.boxes - jnp.tile(frame[:2], 2))
                       / jnp.tile(frame[2:] - frame[:2], 2))
  # The same window in the stored image, which is not mirrored.
  frame = jnp.where(view.mirrored, box_ops.flip_horizontal(frame), frame)
  corner, sides = view.frame[:2], view.frame[2:] - view.frame[:2]
  return view._replace(size=window[2:] - window[:2],
                       frame=jnp.tile(corner, 2) + frame * jnp.tile(sides, 2),
                       ground_truth=ground_truth._replace(boxes=boxes, valid=valid),
                       visible=box_ops.intersect(view.visible, view.frame))


def draw_window(op: SsdRandomCrop, size: Array, ground_truth: GroundTruth, coverage: Array,
                draws: Array) -> Array:
  """Draws a crop window like `data.transforms.random_crop.draw_window`.

  Args:
    op: options of the crop.
    size: f32 [2], (height, width) of the image in pixels.
    ground_truth: [G, ...].
    coverage: least share of some box that the window must cover.
    draws: f32 [4, attempts], uniform in [0, 1).

  Returns:
    f32 [4], [ymin, xmin, ymax, xmax] in whole pixels; the whole image if no attempt succeeds.
  """
  sides, legal = _draw_sides(op, size, _between(op.aspect_ratio, draws[0]), draws[1])
  corners = jnp.floor(draws[2:].T * (size - sides))
  windows = jnp.concatenate([corners, corners + sides], axis=-1)
  whole = jnp.concatenate([jnp.zeros(2), size])
  objects = jnp.trunc(box_ops.clip(ground_truth.boxes) * jnp.tile(size, 2))
  seen = ground_truth.valid & (box_ops.area(objects) >= 1)
  covered = seen[:, None] & (box_ops.coverage(objects, windows) >= coverage)
  # Without boxes, the whole image counts as one.
  covers_image = box_ops.coverage(whole[None], windows)[0] >= coverage
  good = legal & jnp.where(ground_truth.valid.any(), covered.any(axis=0), covers_image)
  return jnp.where(good.any(), windows[jnp.argmax(good)], whole)


def _draw_sides(op: SsdRandomCrop, size: Array, aspect: Array, draw: Array
                ) -> tuple[Array, Array]:
  """Draws (height, width) of windows [attempts, 2], and which are legal, as the host does."""
  low_area, high_area = (share * size[0] * size[1] for share in op.area)
  # The largest height whose rounded width still fits into the image.
  fitting = jnp.floor((size[1] + (0.5 - 1e-3)) / aspect)
  highest = jnp.minimum(jnp.minimum(jnp.rint(jnp.sqrt(high_area / aspect)), fitting), size[0])
  lowest = jnp.minimum(jnp.rint(jnp.sqrt(low_area / aspect)), highest)
  height = lowest + jnp.floor(draw * (highest - lowest + 1))
  # Rounding may put the area just outside its range; one pixel of height corrects that.
  height += height * jnp.rint(height * aspect) < low_area
  height -= height * jnp.rint(height * aspect) > high_area
  sides = jnp.stack([height, jnp.rint(height * aspect)], axis=-1)
  drawn = sides.prod(axis=-1)
  legal = ((low_area <= drawn) & (drawn <= high_area) & (sides <= size).all(axis=-1)
           & (sides > 0).all(axis=-1))
  return jnp.where(legal[:, None], sides, size), legal


def _mixup(op: Mixup, key: Array, one: tuple[Array, GroundTruth], two: tuple[Array, GroundTruth]
           ) -> tuple[Array, GroundTruth]:
  """Blends two images f32 [3, S, S] with their ground truth, like `data.transforms.mixing.Mixup`.

  The valid boxes of each image are in the first half of the G places, since `required_boxes` makes
  room for two images.
  """
  for_share, for_blend = jax.random.split(key)
  share = jax.random.beta(for_share, op.alpha, op.alpha)
  blend = jax.random.uniform(for_blend) < op.probability
  room = len(one[1].valid) // 2
  halves = [truth._replace(valid=truth.valid & (s >= op.min_share))
            for (_, truth), s in ((one, share), (two, 1 - share))]

  def both(a: Array, b: Array) -> Array:
    joined = jnp.concatenate([a[:room], b[:room]])
    return jnp.pad(joined, [(0, len(a) - 2 * room)] + [(0, 0)] * (a.ndim - 1))

  mixed = share * one[0] + (1 - share) * two[0], jax.tree.map(both, *halves)
  return jax.tree.map(lambda a, b: jnp.where(blend, a, b), mixed, one)


def _photometric_distortion(op: PhotometricDistortion, image: Array, key: Array) -> Array:
  """Distorts [3, S, S], 0 to 255, in floating point, without the host's rounding between steps."""
  draws = jax.random.uniform(key, (3, 4))
  low = jnp.float32([-op.brightness, op.contrast[0], op.saturation[0], -op.hue])
  high = jnp.float32([op.brightness, op.contrast[1], op.saturation[1], op.hue])
  identity = jnp.float32([0, 1, 1, 0])
  amount = jnp.where(draws[0] < 0.5, _between((low, high), draws[1]), identity)
  order = jnp.argsort(draws[2])

  def change(turn: Array, image: Array) -> Array:
    # Under vmap every branch of a conditional runs, so each turn does all four changes, three of
    # them with no effect.
    now = jnp.where(jnp.arange(4) == order[turn], amount, identity)
    image = jnp.clip(image * now[1] + now[0], 0, 255)
    return jnp.where(order[turn] >= 2, shift_hsv(image, now[3], now[2]), image)

  return jax.lax.fori_loop(0, 4, change, image)


def _between(bounds: Sequence[Any], draws: Array) -> Array:
  """Maps uniform draws in [0, 1) to the range between two bounds."""
  return bounds[0] + draws * (bounds[1] - bounds[0])


def shift_hsv(image: Array, hue: Array, saturation: Array) -> Array:
  """Shifts the hue by degrees and scales the saturation of f32 [3, S, S], RGB of 0 to 255."""
  red, green, blue = image
  value, chroma = image.max(axis=0), image.max(axis=0) - image.min(axis=0)
  divisor = jnp.where(chroma > 0, chroma, 1)
  sixth = jnp.where(value == red, (green - blue) / divisor,
                    jnp.where(value == green, 2 + (blue - red) / divisor,
                              4 + (red - green) / divisor))
  chroma = jnp.minimum(chroma * saturation, value)
  # Each channel is the value minus a trapezoid of the hue.
  turns = jnp.mod(jnp.float32([5, 3, 1])[:, None, None] + sixth + hue / 60, 6)
  return value - chroma * jnp.clip(jnp.minimum(turns, 4 - turns), 0, 1)


_DeviceOp = Callable[[Any, Any, Array], Any]
_GEOMETRY: dict[type, _DeviceOp] = {
    HorizontalFlip: _horizontal_flip, SsdRandomCrop: _ssd_random_crop, Expand: _expand,
    LargeScaleJitter: _large_scale_jitter, Resize: _resize}
# Ops that may show a border around the image.
_FILLING = (Expand, LargeScaleJitter)
_OTHER_TAG = 0x07e2  # Separates the random numbers of the other image of mixup.
_COLOR: dict[type, _DeviceOp] = {PhotometricDistortion: _photometric_distortion}
