"""The compiled step."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from ppn_jax.detection.structures import Array, Detections, GroundTruth
from ppn_jax.detector import Detector, Variables
from ppn_jax.training import partition
from ppn_jax.training.optim import Optimizer, update_average, weight_penalty
from ppn_jax.training.resident import Plan, ResidentData, draw_batch
from ppn_jax.training.state import TrainState, init_state


class StepMetrics(NamedTuple):
  """Scalars of one step, f32, over the whole batch."""
  loss: Array  # What was differentiated: the three parts below together.
  classification: Array
  localization: Array
  regularization: Array
  num_positive: Array  # Positive anchors.
  gradient_norm: Array  # Euclidean, over all parameters, before clipping.
  parameter_norm: Array  # Euclidean, of the kernels and biases that the step leaves.
  learning_rate: Array


def train_step(detector: Detector, optimizer: Optimizer, state: TrainState, images: Array,
               truth: GroundTruth) -> tuple[TrainState, StepMetrics]:
  """One step of gradient descent; pure, to be jitted.

  Args:
    state: before the step.
    images: u8 [B, S, S, 3].
    truth: of those images.
  """
  def objective(params):
    outputs, batch_stats = detector.forward_train({**state.variables, 'params': params}, images)
    loss = detector.loss(outputs, truth)
    penalty = weight_penalty(params, optimizer.weight_decay)
    return loss.classification + loss.localization + penalty, (loss, penalty, batch_stats)

  params = state.variables['params']
  (total, (loss, penalty, batch_stats)), gradient = jax.value_and_grad(
      objective, has_aux=True)(params)
  updates, opt_state = optimizer.transform.update(gradient, state.opt_state, params)
  variables = {'params': optax.apply_updates(params, updates), 'batch_stats': batch_stats}
  average = state.average
  if optimizer.ema_decay:
    average = update_average(average, variables, decay=optimizer.ema_decay, step=state.step)
  metrics = StepMetrics(
      loss=total, classification=loss.classification, localization=loss.localization,
      regularization=penalty, num_positive=loss.num_positive,
      gradient_norm=optax.tree.norm(gradient),
      parameter_norm=optax.tree.norm(variables['params']),
      learning_rate=optimizer.schedule(state.step))
  return TrainState(state.step + 1, variables, opt_state, average), metrics


def jit_init(detector: Detector, optimizer: Optimizer, mesh: Mesh) -> Callable[[int], TrainState]:
  """seed -> the first state, made in place on every device of the mesh."""
  return jax.jit(lambda seed: init_state(detector, optimizer, seed),
                 out_shardings=partition.replicated(mesh))


def abstract_state(detector: Detector, optimizer: Optimizer, mesh: Mesh) -> TrainState:
  """Shapes, types and shardings of the state; allocates nothing."""
  shapes = jax.eval_shape(lambda: init_state(detector, optimizer, 0))
  whole = partition.replicated(mesh)
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole), shapes)


def abstract_batch(batch_size: int, image_size: int, max_boxes: int, mesh: Mesh
                   ) -> tuple[Array, GroundTruth]:
  """Shapes, types and shardings of a step's (images, truth), to compile with."""
  split = partition.by_rows(mesh)

  def array(shape, dtype):
    return jax.ShapeDtypeStruct((batch_size, *shape), dtype, sharding=split)

  boxes = (max_boxes,)
  return array((image_size, image_size, 3), jnp.uint8), GroundTruth(
      array((*boxes, 4), jnp.float32), array(boxes, jnp.int32), array(boxes, jnp.bool_),
      array(boxes, jnp.bool_))


def jit_train_step(detector: Detector, optimizer: Optimizer, mesh: Mesh
                   ) -> Callable[[TrainState, Array, GroundTruth], tuple[TrainState, StepMetrics]]:
  """`train_step` over the mesh: state replicated and donated, the batch split by rows."""
  whole, split = partition.replicated(mesh), partition.by_rows(mesh)
  return jax.jit(lambda *arguments: train_step(detector, optimizer, *arguments),
                 in_shardings=(whole, split, split), out_shardings=whole, donate_argnums=0)


def jit_resident_step(detector: Detector, optimizer: Optimizer, mesh: Mesh, plan: Plan
                      ) -> Callable[[TrainState, ResidentData], tuple[TrainState, StepMetrics]]:
  """As `jit_train_step`, of a step that draws its batch from the data on the devices."""
  whole, split = partition.replicated(mesh), partition.by_rows(mesh)

  def step(state: TrainState, data: ResidentData) -> tuple[TrainState, StepMetrics]:
    batch = draw_batch(plan, mesh, data, state.step)
    return train_step(detector, optimizer, state, *batch)

  return jax.jit(step, in_shardings=(whole, split), out_shardings=whole, donate_argnums=0)


def jit_detect(detector: Detector, mesh: Mesh) -> Callable[[Variables, Array], Detections]:
  """`Detector.detect` over the mesh: variables replicated, images and detections split by rows."""
  whole, split = partition.replicated(mesh), partition.by_rows(mesh)
  return jax.jit(detector.detect, in_shardings=(whole, split), out_shardings=split)
