"""Training set in device memory, from which the step draws its batches.

The images are decoded and resized once and stored as uint8 on the devices of the mesh, an equal
part on each. The batch of a step is a function of (seed, step), the same for any number of devices
and processes; there is no input to wait for, and no state of it to save.
"""

import functools
import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from ppn_jax.data.loader import eval_batches
from ppn_jax.data.repeats import Repeats
from ppn_jax.data.source import Source, open_example
from ppn_jax.detection.frame import ImageSize, show_size, sides_of
from ppn_jax.detection.structures import Array, Batch, Example, GroundTruth
from ppn_jax.device_data.exchange import Grid, choose_grid, collect_rows
from ppn_jax.device_data.shuffle import example_at, repeated_images
from ppn_jax.device_data.transforms import Augmentation, Stored
from ppn_jax.distributed import sharding
from ppn_jax.errors import InputError
from ppn_jax.telemetry.host_memory import available_memory

# Order, augmentation, repeats and the images that mixup adds have random streams of their own.
_ORDER_TAG, _AUGMENT_TAG, _REPEAT_TAG, _OTHER_TAG = 0x0de5, 0xa064, 0x4e9f, 0x07e1
_LANES, _SUBLANES = 128, 32  # A TPU's tile of bytes: rows of whole tiles waste and split none.
_GRID_AXES = ('data_rows', 'data_columns')  # Of the mesh as the exchange sees it.
_CHUNK = 64  # The most images that are copied to a device at a time.
# Estimated memory of a training step per pixel of its input. For PPN, the TPU compiler reports 235
# in bfloat16 (1.35 GB for 64 images of 300 px); float32 needs twice that, SSD and FPN less.
_STEP_BYTES_PER_PIXEL = 512


class ResidentData(NamedTuple):
  """N images with ground truth, rows split over the mesh; rows from N on are padding."""
  images: Array  # u8 [N', K, 128]: 3 x the stored size, channels first, padded with zeros.
  size: Array  # i32 [N', 2], (height, width) of the originals in pixels.
  boxes: Array  # f32 [N', 4 G]
  labels: Array  # i32 [N', G]
  crowd: Array  # bool [N', G]
  valid: Array  # bool [N', G]


class ResidentSpec(NamedTuple):
  """Sizes of a resident data set, and all else that determines the batches drawn from it.

  Fields:
    num_images: N.
    batch_size: B, over all devices.
    max_boxes: G.
    stored_size: R, side of the stored images in pixels, or (height, width).
    augmentation: applied to each image that is drawn.
    seed: seed of order and augmentation.
    repeats: how often an epoch shows each image; None is once.
  """
  num_images: int
  batch_size: int
  max_boxes: int
  stored_size: ImageSize
  augmentation: Augmentation
  seed: int
  repeats: Repeats | None = None


def check_memory(spec: ResidentSpec, mesh: Mesh, steps: int) -> None:
  """Checks before loading that the data and a step fit into memory.

  The memory of a step is a rough estimate.

  Raises:
    InputError: If they do not fit, or the run draws more images than 32 bits can count.
  """
  if steps * spec.batch_size >= 2**32:
    raise InputError(f'train.steps={steps} of train.batch_size={spec.batch_size} are more than '
                     '2**32 images, which data.resident.enabled=True cannot count')
  data = data_bytes(spec, mesh)
  pixels, stored = (math.prod(sides_of(size))
                    for size in (spec.augmentation.image_size, spec.stored_size))
  rows = spec.batch_size // mesh.size
  exchanged = 2 * choose_grid(rows, mesh.size).exchanged  # Sent and received.
  step = (rows * pixels * _STEP_BYTES_PER_PIXEL
          + exchanged * 3 * stored * _images_per_row(spec))
  free = min(map(_free_memory, mesh.local_devices))
  if data + step > free:
    raise InputError(
        f'data.resident: {spec.num_images:,} images of {show_size(spec.stored_size)} px take '
        f'{_gigabytes(data)} on each of {mesh.size} device{"s" if mesh.size > 1 else ""} and a '
        f'step about {_gigabytes(step)}, but {_gigabytes(free)} are free; use more devices, a '
        'smaller data.resident.size, or data.resident.enabled=False')


def data_bytes(spec: ResidentSpec, mesh: Mesh) -> int:
  """Returns the bytes of data on each device."""
  shapes = abstract_data(spec, mesh)
  return sum(math.prod(a.shape[1:]) * a.dtype.itemsize for a in shapes) * _rows(spec, mesh)


def abstract_data(spec: ResidentSpec, mesh: Mesh) -> ResidentData:
  """Returns shapes, types and shardings of the data, to compile with."""
  split = sharding.by_rows(mesh)
  tile = _LANES * _SUBLANES
  lines = -(-3 * math.prod(sides_of(spec.stored_size)) // tile) * _SUBLANES

  def array(*shape_and_type):
    *shape, dtype = shape_and_type
    return jax.ShapeDtypeStruct((_rows(spec, mesh) * mesh.size, *shape), dtype, sharding=split)

  g = spec.max_boxes
  return ResidentData(array(lines, _LANES, jnp.uint8), array(2, jnp.int32),
                      array(4 * g, jnp.float32), array(g, jnp.int32), array(g, jnp.bool_),
                      array(g, jnp.bool_))


def load(source: Source, spec: ResidentSpec, mesh: Mesh, *, threads: int = 0,
         on_images: Callable[[int], None] = lambda count: None) -> ResidentData:
  """Decodes the images and copies them to the devices.

  A process decodes the images of its own devices and keeps only a few chunks in its memory. Images
  are resized to R x R as `data.resize` says.

  Args:
    source: the N images.
    spec: sizes of the data set.
    mesh: devices that store the data.
    threads: see `data.loader`.
    on_images: called after each chunk with the number of images that this process has loaded.

  Raises:
    InputError: If an image cannot be read.
  """
  shapes = abstract_data(spec, mesh)
  total, rows, done = shapes.images.shape[0], _rows(spec, mesh), 0
  indices = sharding.by_rows(mesh).addressable_devices_indices_map((total,))
  parts = []
  for device, (index,) in indices.items():
    first = index.indices(total)[0]
    part = jax.tree.map(
        lambda a, device=device: jnp.zeros((rows, *a.shape[1:]), a.dtype, device=device), shapes)
    examples = _Subset(source, range(min(first, len(source)), min(first + rows, len(source))))
    for number, batch in enumerate(_batches(examples, spec, _chunk(spec, mesh), threads)):
      chunk = batch.images, batch.size, batch.ground_truth
      part = _insert(part, *jax.device_put(chunk, device), number * len(batch.images))
      done += int(batch.valid.sum())
      on_images(done)
    parts.append(part)
  return jax.tree.map(lambda a, *shards: jax.make_array_from_single_device_arrays(
      a.shape, a.sharding, shards), shapes, *parts)


def draw_batch(spec: ResidentSpec, mesh: Mesh, data: ResidentData, step: Array
               ) -> tuple[Array, GroundTruth]:
  """Draws the batch of a step: row r is the augmented example at position step * B + r.

  Each device looks up the batch's images that it holds, an exchange brings every device its rows
  (see `exchange.collect_rows`), and each device augments its own.

  Args:
    spec: sizes, seed and augmentation.
    mesh: devices that hold the data.
    data: result of `load`, on `mesh`.
    step: i32 [], number of steps before this one.

  Returns:
    Images u8 [B, S, S, 3] and their ground truth, split by rows.
  """
  replicated, split = PartitionSpec(), PartitionSpec(_GRID_AXES)
  rows = spec.batch_size // mesh.size
  grid = choose_grid(rows, mesh.size)
  draw = functools.partial(_draw_rows, spec, rows, grid)
  # The check of varying axes rejects loops and random bits that do not vary over the mesh.
  return jax.shard_map(
      draw, mesh=sharding.as_grid(mesh, (grid.height, grid.width), _GRID_AXES),
      in_specs=(split, replicated), out_specs=split, check_vma=False)(data, step)


def _draw_rows(spec: ResidentSpec, rows: int, grid: Grid, data: ResidentData, step: Array
               ) -> tuple[Array, GroundTruth]:
  """Draws this device's rows of the batch, from its part of the data."""
  key = jax.random.key(spec.seed, impl='threefry2x32')
  positions = (step.astype(jnp.uint32) * jnp.uint32(spec.batch_size)
               + jnp.arange(spec.batch_size, dtype=jnp.uint32))
  length = spec.repeats.num_shown if spec.repeats else spec.num_images
  epochs, places = example_at(positions, length, jax.random.fold_in(key, _ORDER_TAG))
  indices = places if spec.repeats is None else repeated_images(
      epochs, places, spec.repeats, jax.random.fold_in(key, _REPEAT_TAG))
  drawn = collect_rows(data, indices.astype(jnp.int32), rows, grid, _GRID_AXES)
  first = jax.lax.axis_index(_GRID_AXES) * rows
  others = None
  if _images_per_row(spec) > 1:
    of_others = jax.random.fold_in(key, _OTHER_TAG)
    others = collect_rows(data, jax.vmap(lambda epoch, place: jax.random.randint(
        jax.random.fold_in(jax.random.fold_in(of_others, epoch), place), (), 0, spec.num_images))(
            epochs, places), rows, grid, _GRID_AXES)
  epochs, places = (jax.lax.dynamic_slice(a, (first,), (rows,)) for a in (epochs, places))

  def stored(example: ResidentData) -> Stored:
    height, width = sides_of(spec.stored_size)
    image = example.images.reshape(-1)[:3 * height * width].reshape(3, height, width)
    return Stored(image, example.size, GroundTruth(
        example.boxes.reshape(-1, 4), example.labels, example.crowd, example.valid))

  def augment(example: ResidentData, epoch: Array, place: Array, other: ResidentData | None
              ) -> tuple[Array, GroundTruth]:
    own_key = jax.random.fold_in(key, _AUGMENT_TAG)
    own_key = jax.random.fold_in(jax.random.fold_in(own_key, epoch), place)
    return spec.augmentation(*stored(example), own_key, other and stored(other))

  return jax.vmap(augment)(drawn, epochs, places, others)


def _images_per_row(spec: ResidentSpec) -> int:
  """Returns the number of stored images that are looked up for each row of a batch."""
  return 1 if spec.augmentation.mixup is None else 2


@functools.partial(jax.jit, donate_argnums=0)
def _insert(part: ResidentData, images: Array, size: Array, ground_truth: GroundTruth, at: Array
            ) -> ResidentData:
  """Writes a chunk of images u8 [n, R, R, 3] with ground truth to `part`, from row `at` on."""
  n, (_, lines, lanes) = len(images), part.images.shape
  flat = images.transpose(0, 3, 1, 2).reshape(n, -1)
  flat = jnp.pad(flat, ((0, 0), (0, lines * lanes - flat.shape[1]))).reshape(n, lines, lanes)
  chunk = ResidentData(flat, size, ground_truth.boxes.reshape(n, -1), *ground_truth[1:])
  return jax.tree.map(
      lambda whole, rows: jax.lax.dynamic_update_slice_in_dim(whole, rows, at, 0), part, chunk)


def _batches(examples: '_Subset', spec: ResidentSpec, chunk: int, threads: int) -> Iterable[Batch]:
  """Yields chunks of the examples, decoded and resized to the stored size."""
  if not len(examples):  # There are fewer images than devices.
    return ()
  return eval_batches(examples, image_size=spec.stored_size, max_boxes=spec.max_boxes,
                      batch_size=chunk, threads=threads, resize=spec.augmentation.kernel)


class _Subset:
  """Source with a subset of another source's examples."""

  def __init__(self, source: Source, numbers: range):
    self._source, self._numbers = source, numbers

  def __len__(self) -> int:
    return len(self._numbers)

  def __getitem__(self, index: int) -> Example:
    return self._source[self._numbers[index]]

  def open_example(self, index: int) -> Example:
    return open_example(self._source, self._numbers[index])


def _rows(spec: ResidentSpec, mesh: Mesh) -> int:
  """Returns the rows on each device, a multiple of the chunk: one program inserts all chunks."""
  chunk = _chunk(spec, mesh)
  return -(-_images_per_device(spec, mesh) // chunk) * chunk


def _chunk(spec: ResidentSpec, mesh: Mesh) -> int:
  """Returns how many images are copied to a device at a time.

  Padding to whole chunks is kept small, because the exchange expects all devices to hold as many.
  """
  images = _images_per_device(spec, mesh)
  return -(-images // -(-images // _CHUNK))


def _images_per_device(spec: ResidentSpec, mesh: Mesh) -> int:
  return -(-spec.num_images // mesh.size)


def _free_memory(device: jax.Device) -> int:
  """Returns free memory in bytes; devices without their own memory have a share of the host's."""
  stats = device.memory_stats() or {}
  if 'bytes_limit' in stats:
    return stats['bytes_limit'] - stats.get('bytes_in_use', 0)
  return available_memory() // jax.local_device_count()


def _gigabytes(count: float) -> str:
  return f'{count / 1e9:,.3g} GB'
