"""Learning-rate schedule, optimizer, weight decay and the moving average of weights."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from ppn_jax.detection.structures import Array
from ppn_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class Optimizer:
  """How parameters follow gradients.

  Attributes:
    transform: gradients -> parameter updates.
    schedule: step -> learning rate.
    weight_decay: rate of `weight_penalty`, which the step adds to the loss.
    ema_decay: decay of the moving average of the variables; 0 keeps none.
    micro_batches: parts of a batch whose gradients are computed one after another.
    shard_state: whether each device holds and updates a part of `transform`'s state and of the
      moving average, instead of all of them.
  """
  transform: optax.GradientTransformation
  schedule: optax.Schedule
  weight_decay: float
  ema_decay: float
  micro_batches: int = 1
  shard_state: bool = False


def build_optimizer(*, steps: int, batch_size: int, learning_rate: float = 0.7,
                    rate_batch_size: int = 512, warmup_fraction: float = 0.04,
                    warmup_factor: float = 0.1333 / 0.7, momentum: float = 0.9,
                    weight_decay: float = 4e-5, clip_norm: float = 0.0,
                    ema_decay: float = 0.0, micro_batches: int = 1, shard_state: bool = False
                    ) -> Optimizer:
  """Momentum SGD after a linear warm-up and a cosine decay, the reference's recipe.

  a <- momentum a + g and w <- w - rate a, where g includes the weight penalty's gradient.

  Args:
    steps, batch_size: of the run.
    learning_rate: the highest rate.
    rate_batch_size: the batch size that `learning_rate` is meant for; the rates scale with
      batch_size / rate_batch_size. 0 takes them as they are.
    warmup_fraction: share of the steps that warms up, 0 to below 1.
    warmup_factor: the rate at step 0 as a share of `learning_rate`, which it follows. A config
      may have `warmup_learning_rate`, the rate itself, instead.
    momentum: 0 to below 1, without Nesterov's correction.
    weight_decay: see `weight_penalty`.
    clip_norm: gradients longer than this (Euclidean norm over all parameters) are shortened to
      it. 0 does not clip.
    ema_decay: 0 to below 1, see `update_average`. 0 keeps no average.
    micro_batches: gradient accumulation: a step's gradient is the mean of those of so many
      equal parts of its batch, so that a batch may be larger than memory. Batch statistics and
      the loss's normaliser are then those of a part. 1 takes the batch whole.
    shard_state: weight-update sharding (Xu et al., arXiv 2004.13336): momentum and moving
      average are split over the devices. Less memory and arithmetic on each, the same values.

  Raises:
    InputError: a value outside its range.
  """
  for name, value, below in [
      ('learning_rate', learning_rate, None), ('rate_batch_size', rate_batch_size, None),
      ('warmup_factor', warmup_factor, None), ('warmup_fraction', warmup_fraction, 1),
      ('momentum', momentum, 1), ('weight_decay', weight_decay, None),
      ('clip_norm', clip_norm, None), ('ema_decay', ema_decay, 1)]:
    if not (0 <= value and (below is None or value < below)):
      limit = '' if below is None else f' and below {below}'
      raise InputError(f'optim.{name}={value} must be at least 0{limit}')
  whole = isinstance(micro_batches, int) and micro_batches >= 1
  if not whole or batch_size % micro_batches:
    raise InputError(f'optim.micro_batches={micro_batches} must be a whole number, at least 1, '
                     f'that divides train.batch_size={batch_size}')
  scale = batch_size / rate_batch_size if rate_batch_size else 1.0
  schedule = warmup_cosine(scale * learning_rate, steps=steps,
                           warmup_steps=round(warmup_fraction * steps),
                           warmup_rate=scale * (learning_rate * warmup_factor))
  clip = optax.clip_by_global_norm(clip_norm) if clip_norm else optax.identity()
  return Optimizer(optax.chain(clip, optax.sgd(schedule, momentum=momentum)), schedule,
                   weight_decay, ema_decay, micro_batches, bool(shard_state))


def warmup_cosine(base_rate: float, *, steps: int, warmup_steps: int,
                  warmup_rate: float) -> optax.Schedule:
  """Linear from `warmup_rate` to `base_rate`, then half a cosine to 0 at `steps`; 0 afterwards.

  As the reference's `cosine_decay_learning_rate`: step 0 has `warmup_rate`, step `warmup_steps`
  has `base_rate`.
  """
  def rate(step: Array) -> Array:
    step = jnp.asarray(step, jnp.float32)
    warmup = warmup_rate + (base_rate - warmup_rate) * step / max(warmup_steps, 1)
    progress = (step - warmup_steps) / max(steps - warmup_steps, 1)
    cosine = 0.5 * base_rate * (1 + jnp.cos(jnp.pi * progress))
    return jnp.where(step < warmup_steps, warmup, jnp.where(step > steps, 0.0, cosine))

  return rate


def weight_penalty(params: Any, weight_decay: float) -> Array:
  """weight_decay / 2 times the sum of squares of every kernel, f32.

  Kernels of convolutions, depthwise ones too, are decayed; biases and batch norm's scales and
  biases are not. A part of the loss, so it passes through momentum (coupled decay).
  """
  kernels = [p for path, p in jax.tree_util.tree_leaves_with_path(params)
             if path[-1].key.endswith('kernel')]
  return 0.5 * weight_decay * sum(jnp.sum(jnp.square(k)) for k in kernels)


def update_average(average: Any, current: Any, *, decay: float, step: Array) -> Any:
  """One step of the exponential moving average of a tree.

  The decay starts at 1/10 and rises with the steps, (1 + step) / (10 + step), up to `decay`, so
  that the average does not remember the random start (as TensorFlow's `num_updates` does).
  """
  step = jnp.asarray(step, jnp.float32)
  rate = jnp.minimum(decay, (1 + step) / (10 + step))
  return jax.tree.map(lambda a, c: a + (1 - rate) * (c - a), average, current)
