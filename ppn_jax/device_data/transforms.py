"""The augmentation of `data.transforms` on the device, one image at a time, to be mapped.

What changes geometry is decided first and the pixels are read once, at the end (`View`); what
changes colour follows on the network's input. The distributions are those of the host's ops;
their random numbers are not.
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
from ppn_jax.data.transforms.random_crop import SsdRandomCrop
from ppn_jax.data.transforms.zoom import Expand, LargeScaleJitter
from ppn_jax.detection import boxes as box_ops
from ppn_jax.detection.structures import Array, GroundTruth
from ppn_jax.device_data.resize import KERNELS, crop_and_resize
from ppn_jax.errors import InputError, did_you_mean

_WHOLE = np.float32([0, 0, 1, 1])


class View(NamedTuple):
  """One image with its truth as the ops so far leave it; pixels are still those stored."""
  size: Array  # f32 [2], (height, width) in whole pixels.
  frame: Array  # f32 [4], the box of the stored image that it shows.
  mirrored: Array  # bool [], left to right.
  truth: GroundTruth  # [G, ...]; boxes that are gone are not valid, wherever they stand.
  visible: Array = _WHOLE  # f32 [4], the box of the stored image that no crop has cut off.


class Augmentation(NamedTuple):
  """The ops of `data.transforms` and the resize to the network's input.

  Fields:
    ops: dataclasses of `data.transforms`, in order.
    image_size: S.
    kernel: of resizing, one of `device_resize.KERNELS`.
  """
  ops: tuple[Any, ...]
  image_size: int
  kernel: str

  def view(self, size: Array, truth: GroundTruth, key: Array) -> View:
    """What to show of an image of `size` (i32 [2], pixels), and its truth then."""
    view = View(size.astype(jnp.float32), jnp.float32(_WHOLE), jnp.bool_(False), truth)
    for number, op in enumerate(self.ops):
      if type(op) in _GEOMETRY:
        view = _GEOMETRY[type(op)](op, view, jax.random.fold_in(key, number))
    return view

  def __call__(self, image: Array, size: Array, truth: GroundTruth, key: Array
               ) -> tuple[Array, GroundTruth]:
    """A stored image -> what the network sees, and its truth.

    Args:
      image: u8 [3, R, R].
      size: i32 [2], (height, width) of the original, in whose pixels the ops draw.
      truth: [G, ...].
      key: of this image in this epoch.

    Returns:
      u8 [S, S, 3], and the truth [G, ...], zero where it is not valid.
    """
    view = self.view(size, truth, key)
    fills = any(isinstance(op, _FILLING) for op in self.ops)
    image, seen = crop_and_resize(image, view.frame, view.mirrored, self.image_size, self.kernel,
                                  beyond=fills, visible=view.visible if fills else None)
    for number, op in enumerate(self.ops):
      if isinstance(op, _FILLING):  # Colours change it only from here on.
        image = image * seen + jnp.float32(op.fill)[:, None, None] * (1 - seen)
      if type(op) in _COLOR:
        image = _COLOR[type(op)](op, image, jax.random.fold_in(key, number))
    valid = view.truth.valid
    boxes = jnp.where(valid[:, None], view.truth.boxes, 0)
    labels = jnp.where(valid, view.truth.labels, 0)
    return (jnp.rint(image).astype(jnp.uint8).transpose(1, 2, 0),
            GroundTruth(boxes, labels, view.truth.crowd & valid, valid))


def build_augmentation(blocks: Sequence[Mapping[str, Any]], *, image_size: int, resize: str
                       ) -> Augmentation:
  """The device's form of a config's `data.transforms` and `data.resize`.

  Raises:
    InputError: as `build_transforms`, or an op that has no form on the device.
  """
  ops = build_transforms(blocks)
  kernel = Resize(image_size, resize).method
  for block, op in zip(blocks, ops, strict=True):
    if type(op) not in (*_GEOMETRY, *_COLOR):  # Not isinstance: a subclass does something else.
      raise InputError(f'transform {block["name"]!r} has no form on the device; leave it out, or '
                       'train with data.resident.enabled=False')
    if isinstance(op, (Resize, LargeScaleJitter)):
      kernel = op.method
      if op.size < image_size:
        raise InputError(f'{block["name"]}.size is {op.size}, below model.image_size={image_size}, '
                         'which has no form on the device; train with data.resident.enabled=False')
  if kernel not in KERNELS:
    raise InputError(f'resize method {kernel!r} has no form on the device; '
                     f'{did_you_mean(kernel, KERNELS)}')
  filling = [block['name'] for block, op in zip(blocks, ops, strict=True)
             if isinstance(op, _FILLING)]
  if len(filling) > 1:
    raise InputError(f'transforms {filling[0]!r} and {filling[1]!r} both show more than the image; '
                     'with data.resident.enabled=True one may')
  return Augmentation(ops, image_size, kernel)


def _horizontal_flip(op: HorizontalFlip, view: View, key: Array) -> View:
  flip = jax.random.uniform(key) < op.probability
  boxes = jnp.where(flip, box_ops.flip_horizontal(view.truth.boxes), view.truth.boxes)
  return view._replace(mirrored=view.mirrored ^ flip, truth=view.truth._replace(boxes=boxes))


def _resize(op: Resize | LargeScaleJitter, view: View, key: Array) -> View:
  return view._replace(size=jnp.full(2, op.size, jnp.float32))


def _expand(op: Expand, view: View, key: Array) -> View:
  draws = jax.random.uniform(key, (4,))
  size = jnp.rint(view.size * _between(op.ratio, draws[0]))
  corner = -jnp.floor(draws[1:3] * (size - view.size + 1))
  larger = crop(view, jnp.concatenate([corner, corner + size]), 0)
  return jax.tree.map(lambda a, b: jnp.where(draws[3] < op.probability, a, b), larger, view)


def _large_scale_jitter(op: LargeScaleJitter, view: View, key: Array) -> View:
  draws = jax.random.uniform(key, (3,))
  frame = jnp.maximum(jnp.rint(view.size.max() / _between(op.scale, draws[0])), 1)
  corner = jnp.floor(draws[1:] * (jnp.maximum(view.size - frame, 0) + 1))
  view = crop(view, jnp.concatenate([corner, corner + frame]), op.min_coverage)
  boxes = view.truth.boxes
  large = ((boxes[:, 2:] - boxes[:, :2]) * op.size).min(axis=-1) >= op.min_side
  valid = view.truth.valid & (large | view.truth.crowd) & (box_ops.area(boxes) > 0)
  return _resize(op, view._replace(truth=view.truth._replace(valid=valid)), key)


def _ssd_random_crop(op: SsdRandomCrop, view: View, key: Array) -> View:
  draws = jax.random.uniform(key, (4 * op.attempts + 2,))  # One call: each is slow to compile.
  coverage = jnp.float32(op.coverages)[jnp.int32(draws[0] * len(op.coverages))]
  window = draw_window(op, view.size, view.truth, coverage, draws[2:].reshape(4, op.attempts))
  keep = draws[1] < op.keep_probability
  return jax.tree.map(lambda a, b: jnp.where(keep, a, b), view, crop(view, window, coverage))


def crop(view: View, window: Array, coverage: Array) -> View:
  """Crops as `data.geometry.crop`, to a window f32 [4], [ymin, xmin, ymax, xmax] in pixels."""
  frame, truth = window / jnp.tile(view.size, 2), view.truth
  share = box_ops.coverage(truth.boxes, frame[None])[:, 0]
  valid = truth.valid & (share > 0) & (truth.crowd | (share >= coverage))
  boxes = box_ops.clip((truth.boxes - jnp.tile(frame[:2], 2))
                       / jnp.tile(frame[2:] - frame[:2], 2))
  # The same window in the image as it is stored, and so not mirrored.
  frame = jnp.where(view.mirrored, box_ops.flip_horizontal(frame), frame)
  corner, sides = view.frame[:2], view.frame[2:] - view.frame[:2]
  return view._replace(size=window[2:] - window[:2],
                       frame=jnp.tile(corner, 2) + frame * jnp.tile(sides, 2),
                       truth=truth._replace(boxes=boxes, valid=valid),
                       visible=box_ops.common(view.visible, view.frame))


def draw_window(op: SsdRandomCrop, size: Array, truth: GroundTruth, coverage: Array, draws: Array
                ) -> Array:
  """`data.random_crop.draw_window` -> f32 [4], [ymin, xmin, ymax, xmax] in whole pixels.

  Args:
    draws: f32 [4, attempts], uniform in [0, 1).
  """
  sides, legal = _draw_sides(op, size, _between(op.aspect_ratio, draws[0]), draws[1])
  corners = jnp.floor(draws[2:].T * (size - sides))
  windows = jnp.concatenate([corners, corners + sides], axis=-1)
  whole = jnp.concatenate([jnp.zeros(2), size])
  objects = jnp.trunc(box_ops.clip(truth.boxes) * jnp.tile(size, 2))
  seen = truth.valid & (box_ops.area(objects) >= 1)
  covered = seen[:, None] & (box_ops.coverage(objects, windows) >= coverage)
  # Without boxes the whole image serves as one.
  alone = box_ops.coverage(whole[None], windows)[0] >= coverage
  good = legal & jnp.where(truth.valid.any(), covered.any(axis=0), alone)
  return jnp.where(good.any(), windows[jnp.argmax(good)], whole)


def _draw_sides(op: SsdRandomCrop, size: Array, aspect: Array, draw: Array
                ) -> tuple[Array, Array]:
  """(height, width) of windows [attempts, 2], and which keep to the rules, as on the host."""
  low_area, high_area = (share * size[0] * size[1] for share in op.area)
  # The largest height whose width, rounded, still fits into the image.
  fitting = jnp.floor((size[1] + (0.5 - 1e-3)) / aspect)
  highest = jnp.minimum(jnp.minimum(jnp.rint(jnp.sqrt(high_area / aspect)), fitting), size[0])
  lowest = jnp.minimum(jnp.rint(jnp.sqrt(low_area / aspect)), highest)
  height = lowest + jnp.floor(draw * (highest - lowest + 1))
  # Rounding may have left the area just outside its range; one pixel of height mends it.
  height += height * jnp.rint(height * aspect) < low_area
  height -= height * jnp.rint(height * aspect) > high_area
  sides = jnp.stack([height, jnp.rint(height * aspect)], axis=-1)
  drawn = sides.prod(axis=-1)
  legal = ((low_area <= drawn) & (drawn <= high_area) & (sides <= size).all(axis=-1)
           & (sides > 0).all(axis=-1))
  return jnp.where(legal[:, None], sides, size), legal


def _photometric_distortion(op: PhotometricDistortion, image: Array, key: Array) -> Array:
  """On [3, S, S], 0 to 255; in floating point, without the host's rounding in between."""
  draws = jax.random.uniform(key, (3, 4))
  low = jnp.float32([-op.brightness, op.contrast[0], op.saturation[0], -op.hue])
  high = jnp.float32([op.brightness, op.contrast[1], op.saturation[1], op.hue])
  nothing = jnp.float32([0, 1, 1, 0])
  amount = jnp.where(draws[0] < 0.5, _between((low, high), draws[1]), nothing)
  order = jnp.argsort(draws[2])

  def change(turn: Array, image: Array) -> Array:
    # Under a map every branch would run, so each turn does all four, three of them idle.
    now = jnp.where(jnp.arange(4) == order[turn], amount, nothing)
    image = jnp.clip(image * now[1] + now[0], 0, 255)
    return jnp.where(order[turn] >= 2, shift_hsv(image, now[3], now[2]), image)

  return jax.lax.fori_loop(0, 4, change, image)


def _between(bounds: Sequence[Any], draws: Array) -> Array:
  """Uniform in [0, 1) -> uniform between two bounds."""
  return bounds[0] + draws * (bounds[1] - bounds[0])


def shift_hsv(image: Array, hue: Array, saturation: Array) -> Array:
  """Turns the hue by degrees and multiplies the saturation of f32 [3, S, S], RGB of 0 to 255."""
  red, green, blue = image
  value, chroma = image.max(axis=0), image.max(axis=0) - image.min(axis=0)
  safe = jnp.where(chroma > 0, chroma, 1)
  sixth = jnp.where(value == red, (green - blue) / safe,
                    jnp.where(value == green, 2 + (blue - red) / safe, 4 + (red - green) / safe))
  chroma = jnp.minimum(chroma * saturation, value)
  # Each channel is the value less a trapezoid of the hue.
  turns = jnp.mod(jnp.float32([5, 3, 1])[:, None, None] + sixth + hue / 60, 6)
  return value - chroma * jnp.clip(jnp.minimum(turns, 4 - turns), 0, 1)


_Form = Callable[[Any, Any, Array], Any]
_GEOMETRY: dict[type, _Form] = {
    HorizontalFlip: _horizontal_flip, SsdRandomCrop: _ssd_random_crop, Expand: _expand,
    LargeScaleJitter: _large_scale_jitter, Resize: _resize}
_FILLING = (Expand, LargeScaleJitter)
_COLOR: dict[type, _Form] = {PhotometricDistortion: _photometric_distortion}
