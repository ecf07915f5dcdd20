"""A training set in device memory, and batches drawn from it inside the step.

The images are decoded and reduced once, and lie as uint8 on the devices of the mesh, each of which
holds an equal part. What a step shows is a function of (seed, step), the same for any number of
devices and processes; there is no input to wait for and no state of it to save.
"""

import functools
import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from ppn_jax.data.loader import eval_batches
from ppn_jax.data.source import Source, open_example
from ppn_jax.detection.structures import Array, Batch, Example, GroundTruth
from ppn_jax.device_data.shuffle import example_at
from ppn_jax.device_data.transforms import Augmentation
from ppn_jax.distributed import sharding
from ppn_jax.errors import InputError
from ppn_jax.telemetry.host_memory import available_memory

_ORDER_TAG, _AUGMENT_TAG = 0x0de5, 0xa064  # Keep the uses of one seed apart.
_LANES, _SUBLANES = 128, 32  # Of a TPU's tile of bytes: rows of whole tiles waste and split none.
_CHUNK = 64  # Images that are on their way to a device at a time.
# What a training step holds for every pixel of its input. PPN takes 235 in bfloat16 by the TPU
# compiler's account (1.35 GB for 64 images of 300 px), twice that in float32, SSD and FPN less.
_STEP_BYTES_PER_PIXEL = 512


class ResidentData(NamedTuple):
  """N images and their truth, rows split over the mesh; rows from N on are never drawn."""
  images: Array  # u8 [N', K, 128]: 3 x R x R, channels first, filled up with zeros.
  size: Array  # i32 [N', 2], (height, width) of the originals in pixels.
  boxes: Array  # f32 [N', 4 G]
  labels: Array  # i32 [N', G]
  crowd: Array  # bool [N', G]
  valid: Array  # bool [N', G]


class Plan(NamedTuple):
  """All that decides what a step draws, apart from the data.

  Fields:
    num_images: N.
    batch_size: B, over all devices.
    max_boxes: G.
    stored_size: R, side of the images that are held.
    augmentation: what is made of them.
    seed: of order and augmentation.
  """
  num_images: int
  batch_size: int
  max_boxes: int
  stored_size: int
  augmentation: Augmentation
  seed: int


def check_plan(plan: Plan, mesh: Mesh, steps: int) -> None:
  """Raises InputError unless memory holds the data beside a step, and positions their 32 bits.

  A rough account, before anything is loaded; the step's share is an estimate.
  """
  if steps * plan.batch_size >= 2**32:
    raise InputError(f'train.steps={steps} of train.batch_size={plan.batch_size} are more than '
                     '2**32 images, which data.resident.enabled=True cannot count')
  data = bytes_of_data(plan, mesh)
  step = (plan.batch_size // mesh.size * plan.augmentation.image_size**2 * _STEP_BYTES_PER_PIXEL
          + 2 * plan.batch_size * 3 * plan.stored_size**2)
  free = min(map(_free_memory, mesh.local_devices))
  if data + step > free:
    raise InputError(
        f'data.resident: {plan.num_images:,} images of {plan.stored_size} px take '
        f'{_gigabytes(data)} on each of {mesh.size} device{"s" if mesh.size > 1 else ""} and a '
        f'step about {_gigabytes(step)}, but {_gigabytes(free)} are free; use more devices, a '
        'smaller data.resident.size, or data.resident.enabled=False')


def bytes_of_data(plan: Plan, mesh: Mesh) -> int:
  """What each device holds of the data."""
  shapes = abstract_data(plan, mesh)
  return sum(math.prod(a.shape[1:]) * a.dtype.itemsize for a in shapes) * _rows(plan, mesh)


def abstract_data(plan: Plan, mesh: Mesh) -> ResidentData:
  """Shapes, types and shardings of the data, to compile with."""
  split = sharding.by_rows(mesh)
  tile = _LANES * _SUBLANES
  lines = -(-3 * plan.stored_size**2 // tile) * _SUBLANES

  def array(*shape_and_type):
    *shape, dtype = shape_and_type
    return jax.ShapeDtypeStruct((_rows(plan, mesh) * mesh.size, *shape), dtype, sharding=split)

  g = plan.max_boxes
  return ResidentData(array(lines, _LANES, jnp.uint8), array(2, jnp.int32),
                      array(4 * g, jnp.float32), array(g, jnp.int32), array(g, jnp.bool_),
                      array(g, jnp.bool_))


def load(source: Source, plan: Plan, mesh: Mesh, *, threads: int = 0,
         on_images: Callable[[int], None] = lambda count: None) -> ResidentData:
  """Decodes the images and puts them on the devices.

  A process decodes what its own devices hold and keeps no more of it than a few chunks. Images are
  reduced, or enlarged, to R x R as `data.resize` says.

  Args:
    threads: as of `data.loader`.
    on_images: called now and then with how many of this process' images are there.

  Raises:
    InputError: an image cannot be read.
  """
  shapes = abstract_data(plan, mesh)
  total, rows, done = shapes.images.shape[0], _rows(plan, mesh), 0
  indices = sharding.by_rows(mesh).addressable_devices_indices_map((total,))
  parts = []
  for device, (index,) in indices.items():
    first = index.indices(total)[0]
    part = jax.tree.map(
        lambda a, device=device: jnp.zeros((rows, *a.shape[1:]), a.dtype, device=device), shapes)
    examples = _Part(source, range(min(first, len(source)), min(first + rows, len(source))))
    for number, batch in enumerate(_batches(examples, plan, min(_CHUNK, rows), threads)):
      chunk = batch.images, batch.size, batch.truth
      part = _insert(part, *jax.device_put(chunk, device), number * len(batch.images))
      done += int(batch.valid.sum())
      on_images(done)
    parts.append(part)
  return jax.tree.map(lambda a, *shards: jax.make_array_from_single_device_arrays(
      a.shape, a.sharding, shards), shapes, *parts)


def draw_batch(plan: Plan, mesh: Mesh, data: ResidentData, step: Array
               ) -> tuple[Array, GroundTruth]:
  """What a step shows: row r is the augmented example at position step * B + r.

  Each device looks up those of the batch's images that it holds, an all-to-all hands every device
  its rows, and each augments its own.

  Args:
    data: of `load`, on `mesh`.
    step: i32 [], how many steps have been taken before this one.

  Returns:
    Images u8 [B, S, S, 3] and their truth, split by rows.
  """
  here, split = PartitionSpec(), PartitionSpec(sharding.AXIS)
  draw = functools.partial(_draw_rows, plan, plan.batch_size // mesh.size)
  # The check of what varies over the mesh knows neither loops nor random bits that do not.
  return jax.shard_map(draw, mesh=mesh, in_specs=(split, here), out_specs=split,
                       check_vma=False)(data, step)


def _draw_rows(plan: Plan, rows: int, data: ResidentData, step: Array
               ) -> tuple[Array, GroundTruth]:
  """The part of the batch that belongs to this device, from its part of the data."""
  key = jax.random.key(plan.seed, impl='threefry2x32')
  positions = (step.astype(jnp.uint32) * jnp.uint32(plan.batch_size)
               + jnp.arange(plan.batch_size, dtype=jnp.uint32))
  epochs, indices = example_at(positions, plan.num_images, jax.random.fold_in(key, _ORDER_TAG))
  drawn = _exchange(data, indices.astype(jnp.int32), rows)
  first = jax.lax.axis_index(sharding.AXIS) * rows
  epochs, indices = (jax.lax.dynamic_slice(a, (first,), (rows,)) for a in (epochs, indices))

  def augment(example: ResidentData, epoch: Array, index: Array) -> tuple[Array, GroundTruth]:
    side = plan.stored_size
    image = example.images.reshape(-1)[:3 * side * side].reshape(3, side, side)
    truth = GroundTruth(example.boxes.reshape(-1, 4), example.labels, example.crowd, example.valid)
    own_key = jax.random.fold_in(key, _AUGMENT_TAG)
    own_key = jax.random.fold_in(jax.random.fold_in(own_key, epoch), index)
    return plan.augmentation(image, example.size, truth, own_key)

  return jax.vmap(augment)(drawn, epochs, indices)


def _exchange(data: ResidentData, indices: Array, rows: int) -> ResidentData:
  """This device's `rows` of the batch of `indices`, [B], from all devices' parts of the data."""
  held, device = len(data.size), jax.lax.axis_index(sharding.AXIS)
  owners = jax.lax.dynamic_slice(indices // held, (device * rows,), (rows,))

  def column(array: Array) -> Array:
    # Of rows that it does not hold, a device sends some other, which nobody looks at.
    sent = array.at[indices - device * held].get(mode='clip')
    received = jax.lax.all_to_all(sent, sharding.AXIS, 0, 0, tiled=True)
    return received.reshape(-1, rows, *array.shape[1:])[owners, jnp.arange(rows)]

  return jax.tree.map(column, data)


@functools.partial(jax.jit, donate_argnums=0)
def _insert(part: ResidentData, images: Array, size: Array, truth: GroundTruth, at: Array
            ) -> ResidentData:
  """`part` with a chunk of images u8 [n, R, R, 3] and their truth from row `at` on."""
  n, (_, lines, lanes) = len(images), part.images.shape
  flat = images.transpose(0, 3, 1, 2).reshape(n, -1)
  flat = jnp.pad(flat, ((0, 0), (0, lines * lanes - flat.shape[1]))).reshape(n, lines, lanes)
  chunk = ResidentData(flat, size, truth.boxes.reshape(n, -1), *truth[1:])
  return jax.tree.map(
      lambda whole, rows: jax.lax.dynamic_update_slice_in_dim(whole, rows, at, 0), part, chunk)


def _batches(examples: '_Part', plan: Plan, chunk: int, threads: int) -> Iterable[Batch]:
  if not len(examples):  # Fewer images than devices.
    return ()
  return eval_batches(examples, image_size=plan.stored_size, max_boxes=plan.max_boxes,
                      batch_size=chunk, threads=threads, resize=plan.augmentation.kernel)


class _Part:
  """Some of a source's examples."""

  def __init__(self, source: Source, numbers: range):
    self._source, self._numbers = source, numbers

  def __len__(self) -> int:
    return len(self._numbers)

  def __getitem__(self, index: int) -> Example:
    return self._source[self._numbers[index]]

  def open_example(self, index: int) -> Example:
    return open_example(self._source, self._numbers[index])


def _rows(plan: Plan, mesh: Mesh) -> int:
  """Rows that each device holds: a multiple of the chunk, so that one program inserts them all."""
  rows = -(-plan.num_images // mesh.size)
  chunk = min(_CHUNK, rows)
  return -(-rows // chunk) * chunk


def _free_memory(device: jax.Device) -> int:
  """Bytes; devices without a memory of their own have a part of the host's."""
  stats = device.memory_stats() or {}
  if 'bytes_limit' in stats:
    return stats['bytes_limit'] - stats.get('bytes_in_use', 0)
  return available_memory() // jax.local_device_count()


def _gigabytes(count: float) -> str:
  return f'{count / 1e9:,.3g} GB'
