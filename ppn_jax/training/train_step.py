"""The training step, and its compilation over a mesh of devices."""

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding

from ppn_jax.detection.frame import ImageSize, sides_of
from ppn_jax.detection.losses import DetectionLoss
from ppn_jax.detection.structures import Array, GroundTruth
from ppn_jax.detector import Detector, Variables
from ppn_jax.device_data.dataset import ResidentData, ResidentSpec, draw_batch
from ppn_jax.distributed import sharding
from ppn_jax.training.optimizer import Optimizer, update_average, weight_penalty
from ppn_jax.training.parameter_paths import (
  Path,
  changed,
  check_frozen,
  frozen_modules,
  merged,
  part_of,
  trainable,
)
from ppn_jax.training.state import TrainState, first_state, init_state


class StepMetrics(NamedTuple):
  """Scalars of one step, f32, over the whole batch."""
  loss: Array  # Sum of the three parts below, of which the gradient is taken.
  classification: Array
  localization: Array
  regularization: Array
  num_positive: Array  # Positive anchors.
  gradient_norm: Array  # Euclidean, over all parameters that are trained, before clipping.
  parameter_norm: Array  # Euclidean, over all parameters, after the step.
  learning_rate: Array


class _Part(NamedTuple):
  """Results of one pass over a batch or a part of it."""
  gradient: Variables  # Of the parameters that are trained.
  batch_stats: Variables  # Those that have changed.
  loss: DetectionLoss

_STEPS_IN_FLIGHT = 2
# XLA frees the buffers of a step a moment after its results are ready. A step that is queued before
# that needs others.
_FREEING_SECONDS = 0.001


def train_step(detector: Detector, optimizer: Optimizer, state: TrainState, images: Array,
               ground_truth: GroundTruth) -> tuple[TrainState, StepMetrics]:
  """Takes one step of gradient descent. Pure, to be jitted.

  Args:
    detector: What is trained.
    optimizer: How.
    state: State before the step.
    images: u8 [B, S, S, 3].
    ground_truth: Boxes of these images.

  Returns:
    The state after the step, and its metrics.
  """
  everything = state.variables['params']
  params = trainable(everything, optimizer.freeze)
  frozen = frozen_modules(everything, optimizer.freeze)
  penalty, decay = jax.value_and_grad(weight_penalty)(params, optimizer.weight_decay)
  part = _mean_over_parts(
      lambda *batch: _forward_backward(detector, state.variables, params, frozen, *batch),
      (images, ground_truth), optimizer.micro_batches)
  gradient = jax.tree.map(jnp.add, part.gradient, decay)
  updates, opt_state = optimizer.transform.update(gradient, state.opt_state, params)
  # Whatever is not in here keeps its bits, in the moving average too.
  moved = {'params': optax.apply_updates(params, updates), 'batch_stats': part.batch_stats}
  variables, average = merged(state.variables, moved), state.average
  if optimizer.ema_decay:
    average = merged(average, update_average(part_of(average, moved), moved,
                                             decay=optimizer.ema_decay, step=state.step))
  classification, localization, num_positive = part.loss
  metrics = StepMetrics(
      loss=classification + localization + penalty, classification=classification,
      localization=localization, regularization=penalty,
      num_positive=num_positive * optimizer.micro_batches,
      gradient_norm=optax.tree.norm(gradient),
      parameter_norm=optax.tree.norm(variables['params']),
      learning_rate=optimizer.schedule(state.step))
  return TrainState(state.step + 1, variables, opt_state, average), metrics


def _forward_backward(detector: Detector, variables: Variables, params: Variables,
                      frozen: frozenset[Path], images: Array, ground_truth: GroundTruth) -> _Part:
  """Computes loss and gradient of a batch, without the weight penalty.

  Args:
    detector: What is trained.
    variables: Its variables.
    params: The parameters among them of which the gradient is taken. It goes back no further than
      the first layer that has one of them.
    frozen: Modules without any of them.
    images, ground_truth: The batch.
  """
  def objective(params):
    outputs, batch_stats = detector.forward_train(merged(variables, {'params': params}), images,
                                                  frozen=frozen)
    loss = detector.loss(outputs, ground_truth)
    moved = changed(batch_stats, variables['batch_stats'])
    check_frozen(moved, frozen)
    return loss.classification + loss.localization, (loss, moved)

  (_, (loss, batch_stats)), gradient = jax.value_and_grad(objective, has_aux=True)(params)
  return _Part(gradient, batch_stats, loss)


def _mean_over_parts(function: Callable[..., _Part], batch: Any, count: int) -> _Part:
  """Returns the mean of `function` over `count` equal parts of the rows of `batch`.

  Part m has rows m, m + count, ...: every device then has its share of each part.
  """
  if count == 1:
    return function(*batch)
  parts = jax.tree.map(lambda x: jnp.swapaxes(x.reshape(-1, count, *x.shape[1:]), 0, 1), batch)
  shapes = jax.eval_shape(lambda: function(*jax.tree.map(lambda x: x[0], parts)))
  zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
  total, _ = jax.lax.scan(lambda sums, part: (jax.tree.map(jnp.add, sums, function(*part)), None),
                          zeros, parts)
  return jax.tree.map(lambda x: x / count, total)


def wait_for_steps(pending: Sequence[Any], mesh: Mesh) -> None:
  """Waits until no more steps are queued on the devices than is good for them.

  Accelerators may have two in front of the newest: enough to keep them busy, and few enough that
  their batches do not fill the memory. CPUs none: XLA allocates the temporary buffers of a step,
  gigabytes at 300 px and batch 32, when it is queued, and a step takes so long that queuing it late
  costs nothing.

  Args:
    pending: Results of the last steps, in order.
    mesh: The devices.
  """
  if mesh.devices.flat[0].platform == 'cpu':
    jax.block_until_ready(pending[-1:])
    time.sleep(_FREEING_SECONDS)
  elif len(pending) > _STEPS_IN_FLIGHT:
    jax.block_until_ready(pending[-1 - _STEPS_IN_FLIGHT])


def jit_init(detector: Detector, optimizer: Optimizer, mesh: Mesh) -> Callable[[int], TrainState]:
  """Returns a function from a seed to the first state, created on the devices of the mesh."""
  # It runs once. At its usual optimization level LLVM takes three times as long to compile the
  # random numbers, for the same bits.
  on_cpu = mesh.devices.flat[0].platform == 'cpu'
  return jax.jit(lambda seed: init_state(detector, optimizer, seed),
                 out_shardings=_shardings(abstract_state(detector, optimizer, mesh)),
                 compiler_options={'xla_backend_optimization_level': 1} if on_cpu else None)


def jit_first_state(detector: Detector, optimizer: Optimizer, mesh: Mesh
                    ) -> Callable[[Variables], TrainState]:
  """Returns a function from variables to the first state with them, on the devices of the mesh."""
  return jax.jit(lambda variables: first_state(variables, optimizer),
                 out_shardings=_shardings(abstract_state(detector, optimizer, mesh)))


def abstract_state(detector: Detector, optimizer: Optimizer, mesh: Mesh) -> TrainState:
  """Returns shapes, types and shardings of the state; allocates nothing.

  Variables are replicated, since every device computes with them. What only the update reads is
  split over the devices if `optimizer.shard_state` is set.

  Raises:
    InputError: If a pattern of the optimizer matches no parameter.
  """
  state = abstract_state_to_read(detector, mesh, average=bool(optimizer.ema_decay),
                                 shard_state=optimizer.shard_state)
  return state._replace(opt_state=_placed(
      jax.eval_shape(optimizer.init, state.variables['params']), mesh, optimizer.shard_state))


def abstract_state_to_read(detector: Detector, mesh: Mesh, *, average: bool, shard_state: bool
                           ) -> TrainState:
  """Returns `abstract_state` without the optimizer's state, which only training needs.

  Args:
    detector: The detector.
    mesh: The devices.
    average: Whether a moving average is kept.
    shard_state: Whether it is split over the devices.
  """
  variables = jax.eval_shape(lambda: detector.init(jax.random.key(0)))
  return TrainState(step=_placed(jax.ShapeDtypeStruct((), jnp.int32), mesh, False),
                    variables=_placed(variables, mesh, False), opt_state=None,
                    average=_placed(variables, mesh, shard_state) if average else {})


def _placed(shapes: Any, mesh: Mesh, split: bool) -> Any:
  """Returns shapes with shardings: each leaf split over the devices, or replicated."""
  def place(x: Any) -> jax.ShapeDtypeStruct:
    where = sharding.by_largest_axis(x.shape, mesh) if split else sharding.replicated(mesh)
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)

  return jax.tree.map(place, shapes)


def _shardings(tree: Any) -> Any:
  return jax.tree.map(lambda x: x.sharding, tree)


def abstract_batch(batch_size: int, image_size: ImageSize, max_boxes: int, mesh: Mesh
                   ) -> tuple[Array, GroundTruth]:
  """Returns shapes, types and shardings of a step's (images, ground truth), to compile with."""
  split = sharding.by_rows(mesh)

  def array(shape, dtype):
    return jax.ShapeDtypeStruct((batch_size, *shape), dtype, sharding=split)

  boxes = (max_boxes,)
  return array((*sides_of(image_size), 3), jnp.uint8), GroundTruth(
      array((*boxes, 4), jnp.float32), array(boxes, jnp.int32), array(boxes, jnp.bool_),
      array(boxes, jnp.bool_))


def jit_train_step(detector: Detector, optimizer: Optimizer, mesh: Mesh
                   ) -> Callable[[TrainState, Array, GroundTruth], tuple[TrainState, StepMetrics]]:
  """Jits `train_step` over the mesh.

  The state has the shardings of `abstract_state` and is donated; the batch is split by rows.
  """
  split = sharding.by_rows(mesh)
  return _jit_step(lambda *arguments: train_step(detector, optimizer, *arguments),
                   detector, optimizer, mesh, (split, split))


def jit_resident_step(detector: Detector, optimizer: Optimizer, mesh: Mesh, spec: ResidentSpec
                      ) -> Callable[[TrainState, ResidentData], tuple[TrainState, StepMetrics]]:
  """Jits a step that draws its batch from the data on the devices; see `jit_train_step`."""
  def step(state: TrainState, data: ResidentData) -> tuple[TrainState, StepMetrics]:
    batch = draw_batch(spec, mesh, data, state.step)
    return train_step(detector, optimizer, state, *batch)

  return _jit_step(step, detector, optimizer, mesh, (sharding.by_rows(mesh),))


def _jit_step(step: Callable, detector: Detector, optimizer: Optimizer, mesh: Mesh,
              data: tuple[NamedSharding, ...]) -> Callable:
  state = _shardings(abstract_state(detector, optimizer, mesh))
  return jax.jit(step, in_shardings=(state, *data),
                 out_shardings=(state, sharding.replicated(mesh)), donate_argnums=0)
