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
  """Turns gradients into new parameters.

  Attributes:
    transform: Maps gradients to parameter updates.
    schedule: Maps a step to its learning rate.
    weight_decay: Factor of `weight_penalty`, which the step adds to the loss.
    ema_decay: Decay of the moving average of the variables; 0 keeps none.
    micro_batches: Number of parts of a batch whose gradients are computed one after another.
    shard_state: Whether each device holds and updates only a part of `transform`'s state and of
      the moving average.
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
  """Builds momentum SGD with a linear warm-up and a cosine decay, the reference's recipe.

  a <- momentum a + g and w <- w - rate a, where g includes the gradient of the weight penalty.

  Args:
    steps: Number of steps of the run.
    batch_size: Images in a batch.
    learning_rate: Highest learning rate.
    rate_batch_size: Batch size that `learning_rate` is meant for; rates are scaled by
      batch_size / rate_batch_size. 0 takes them as they are.
    warmup_fraction: Fraction of the steps that warms up, 0 to below 1.
    warmup_factor: Learning rate at step 0 as a fraction of `learning_rate`. A config may have
      `warmup_learning_rate`, the rate itself, instead.
    momentum: Momentum, 0 to below 1, without Nesterov's correction.
    weight_decay: See `weight_penalty`.
    clip_norm: Longest gradient (Euclidean norm over all parameters); longer ones are scaled down
      to it. 0 does not clip.
    ema_decay: Decay of the moving average, 0 to below 1, see `update_average`. 0 keeps none.
    micro_batches: Gradient accumulation: the gradient of a step is the mean of the gradients of
      this many equal parts of its batch, so that a batch may be larger than memory. Batch
      statistics and the loss's normaliser are then those of a part. 1 takes the batch whole.
    shard_state: Weight-update sharding (Xu et al., arXiv 2004.13336): momentum and moving
      average are split over the devices. Less memory and arithmetic on each, the same values.

  Raises:
    InputError: If a value is outside its range.
  """
  for name, value, below in [
      ('learning_rate', learning_rate, None), ('rate_batch_size', rate_batch_size, None),
      ('warmup_factor', warmup_factor, None), ('warmup_fraction', warmup_fraction, 1),
      ('momentum', momentum, 1), ('weight_decay', weight_decay, None),
      ('clip_norm', clip_norm, None), ('ema_decay', ema_decay, 1)]:
    if not (0 <= value and (below is None or value < below)):
      limit = '' if below is None else f' and below {below}'
      raise InputError(f'optim.{name}={value} must be at least 0{limit}')
  is_count = isinstance(micro_batches, int) and micro_batches >= 1
  if not is_count or batch_size % micro_batches:
    raise InputError(f'optim.micro_batches={micro_batches} must be a positive integer '
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
  """Returns a linear warm-up to `base_rate`, then half a cosine to 0 at `steps`; 0 afterwards.

  Same as the reference's `cosine_decay_learning_rate`: step 0 has `warmup_rate`, step
  `warmup_steps` has `base_rate`.
  """
  # optax.warmup_cosine_decay_schedule differs in the last bits and needs warmup_steps < steps.
  def rate(step: Array) -> Array:
    step = jnp.asarray(step, jnp.float32)
    warmup = warmup_rate + (base_rate - warmup_rate) * step / max(warmup_steps, 1)
    progress = (step - warmup_steps) / max(steps - warmup_steps, 1)
    cosine = 0.5 * base_rate * (1 + jnp.cos(jnp.pi * progress))
    return jnp.where(step < warmup_steps, warmup, jnp.where(step > steps, 0.0, cosine))

  return rate


def weight_penalty(params: Any, weight_decay: float) -> Array:
  """Computes weight_decay / 2 times the sum of squares of every kernel, f32 [].

  Kernels of convolutions, also depthwise ones, are decayed; biases and batch norm's scales are
  not. The penalty is a part of the loss, so it passes through momentum (coupled decay).
  """
  kernels = [p for path, p in jax.tree_util.tree_leaves_with_path(params)
             if path[-1].key.endswith('kernel')]
  return 0.5 * weight_decay * sum(jnp.sum(jnp.square(k)) for k in kernels)


def update_average(average: Any, current: Any, *, decay: float, step: Array) -> Any:
  """Returns the exponential moving average of a tree after one more step.

  The decay starts at 1/10 and rises with the steps, (1 + step) / (10 + step), up to `decay`, so
  that the average forgets the random start (as with TensorFlow's `num_updates`).
  """
  step = jnp.asarray(step, jnp.float32)
  rate = jnp.minimum(decay, (1 + step) / (10 + step))
  return jax.tree.map(lambda a, c: a + (1 - rate) * (c - a), average, current)
