"""The optimizer of a run: rates, frozen parameters, weight decay and the moving average."""

import dataclasses
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax.traverse_util import flatten_dict, path_aware_map

from ppn_jax.detection.structures import Array
from ppn_jax.errors import InputError
from ppn_jax.training.parameter_paths import is_kernel, matching, trainable
from ppn_jax.training.schedules import build_schedule
from ppn_jax.training.update_rules import build_update_rule

_SGD = MappingProxyType({'name': 'sgd', 'momentum': 0.9, 'nesterov': False})
_COSINE = MappingProxyType({'name': 'cosine'})
_NO_SCALES = MappingProxyType({})


@dataclasses.dataclass(frozen=True)
class Optimizer:
  """Turns gradients into new parameters.

  Attributes:
    transform: Maps gradients to parameter updates, of the parameters that are not frozen.
    schedule: Maps a step to its learning rate.
    weight_decay: Factor of `weight_penalty`, which the step adds to the loss; 0 if `transform`
      decays the weights by itself.
    ema_decay: Decay of the moving average of the variables; 0 keeps none.
    micro_batches: Number of parts of a batch whose gradients are computed one after another.
    shard_state: Whether each device holds and updates only a part of `transform`'s state and of
      the moving average.
    freeze: Patterns of the parameters that are not trained, see `parameter_paths`.
  """
  transform: optax.GradientTransformation
  schedule: optax.Schedule
  weight_decay: float
  ema_decay: float
  micro_batches: int = 1
  shard_state: bool = False
  freeze: tuple[str, ...] = ()

  def init(self, params: Mapping[str, Any]) -> optax.OptState:
    """Returns the state before the first step, which has nothing of frozen parameters."""
    return self.transform.init(trainable(params, self.freeze))


def build_optimizer(*, steps: int, batch_size: int, optimizer: Mapping[str, Any] = _SGD,
                    schedule: Mapping[str, Any] = _COSINE, learning_rate: float = 0.7,
                    rate_batch_size: int = 512, rate_batch_exponent: float = 1.0,
                    warmup_fraction: float = 0.04, warmup_factor: float = 0.1333 / 0.7,
                    weight_decay: float = 4e-5, clip_norm: float = 0.0, ema_decay: float = 0.0,
                    freeze: Sequence[str] = (), rate_scale: Mapping[str, float] = _NO_SCALES,
                    micro_batches: int = 1, shard_state: bool = False) -> Optimizer:
  """Builds the optimizer of a run, by default the reference's.

  That is momentum SGD with a linear warm-up and a cosine decay: a <- momentum a + g and
  w <- w - rate a, where g includes the gradient of the weight penalty.

  Args:
    steps: Number of steps of the run.
    batch_size: Images in a batch.
    optimizer: A `name` of `update_rules.OPTIMIZERS` or a dotted path, and its options.
    schedule: A `name` of `schedules.SCHEDULES` or a dotted path, and its options.
    learning_rate: Highest learning rate.
    rate_batch_size: Batch size that `learning_rate` is meant for; rates are scaled by
      (batch_size / rate_batch_size) ** rate_batch_exponent. 0 takes them as they are.
    rate_batch_exponent: 1 for SGD (Goyal et al., arXiv 1706.02677), 0.5 for Adam, whose steps do
      not shrink with the noise of the gradient (Malladi et al., arXiv 2205.10287).
    warmup_fraction: Fraction of the steps that warms up, 0 to below 1.
    warmup_factor: Learning rate at step 0 as a fraction of `learning_rate`. A config may have
      `warmup_learning_rate`, the rate itself, instead.
    weight_decay: Decay of kernels: of sgd and rmsprop by a penalty in the loss, see
      `weight_penalty`; adamw and lars, and others that take a decay and a mask, do it themselves.
    clip_norm: Longest gradient (Euclidean norm over all parameters that are trained); longer ones
      are scaled down to it. 0 does not clip.
    ema_decay: Decay of the moving average, 0 to below 1, see `update_average`. 0 keeps none.
    freeze: Patterns of parameters that are not trained, such as 'backbone/conv2d_[0-5]': fnmatch's,
      of the path of a module or parameter; everything in a module belongs to it. Frozen parameters
      have no gradient, weight decay or optimizer state, and the batch norm of modules that are
      frozen as a whole uses its averages.
    rate_scale: Patterns, as of `freeze`, and factors of the learning rate of what they match,
      {'backbone/*': 0.1}. Factors of patterns that match the same parameter are multiplied.
    micro_batches: Gradient accumulation: the gradient of a step is the mean of the gradients of
      this many equal parts of its batch, so that a batch may be larger than memory. Batch
      statistics and the loss's normaliser are then those of a part. 1 takes the batch whole.
    shard_state: Weight-update sharding (Xu et al., arXiv 2004.13336): the optimizer's state and the
      moving average are split over the devices. Less memory and arithmetic on each, the same
      values.

  Raises:
    InputError: If a value is outside its range, or a name or option is unknown. Whether patterns
      match something is found out by `Optimizer.init`.
  """
  for name, value, below in [
      ('learning_rate', learning_rate, None), ('rate_batch_size', rate_batch_size, None),
      ('rate_batch_exponent', rate_batch_exponent, None), ('warmup_factor', warmup_factor, None),
      ('warmup_fraction', warmup_fraction, 1), ('weight_decay', weight_decay, None),
      ('clip_norm', clip_norm, None), ('ema_decay', ema_decay, 1)]:
    if not (0 <= value and (below is None or value < below)):
      limit = '' if below is None else f' and below {below}'
      raise InputError(f'optim.{name}={value} must be at least 0{limit}')
  is_count = isinstance(micro_batches, int) and micro_batches >= 1
  if not is_count or batch_size % micro_batches:
    raise InputError(f'optim.micro_batches={micro_batches} must be a positive integer '
                     f'that divides train.batch_size={batch_size}')
  if isinstance(freeze, str) or not all(isinstance(pattern, str) for pattern in freeze):
    raise InputError(f'optim.freeze={freeze!r} must be a tuple of patterns')
  scale = (batch_size / rate_batch_size) ** rate_batch_exponent if rate_batch_size else 1.0
  rate = build_schedule(schedule, base_rate=scale * learning_rate, steps=steps,
                        warmup_steps=round(warmup_fraction * steps),
                        warmup_rate=scale * (learning_rate * warmup_factor))
  rule, decays = build_update_rule(optimizer, learning_rate=rate, weight_decay=weight_decay)
  clip = optax.clip_by_global_norm(clip_norm) if clip_norm else optax.identity()
  transform = optax.chain(clip, rule)
  if rate_scale:
    transform = _with_scaled_rates(transform, rate_scale)
  return Optimizer(transform, rate, 0.0 if decays else weight_decay, ema_decay, micro_batches,
                   bool(shard_state), tuple(freeze))


def _with_scaled_rates(transform: optax.GradientTransformation, factors: Mapping[str, float]
                       ) -> optax.GradientTransformation:
  """Multiplies updates, and thus learning rates, by the factors of `rate_scale`.

  Scaling has no state to keep. It is left out, so that factors may change within a run.
  """
  scaling = optax.chain(*(_scale_matching(*item) for item in sorted(factors.items())))

  def init(params: Any) -> optax.OptState:
    scaling.init(params)  # Checks the patterns.
    return transform.init(params)

  def update(updates: Any, state: optax.OptState, params: Any = None) -> tuple[Any, Any]:
    updates, state = transform.update(updates, state, params)
    return scaling.update(updates, scaling.init(updates), params)[0], state

  return optax.GradientTransformation(init, update)


def _scale_matching(pattern: str, factor: float) -> optax.GradientTransformation:
  """Multiplies the updates of the parameters that a pattern matches."""
  if not factor > 0:
    raise InputError(f'optim.rate_scale[{pattern!r}]={factor} must be above 0; '
                     'optim.freeze is for what is not trained')

  def labels(params: Mapping[str, Any]) -> Any:
    scaled = matching({*flatten_dict(params)}, pattern, 'optim.rate_scale')
    return path_aware_map(lambda path, _: 'scaled' if path in scaled else 'as_it_is', params)

  return optax.multi_transform({'scaled': optax.scale(factor), 'as_it_is': optax.identity()},
                               labels)


def weight_penalty(params: Any, weight_decay: float) -> Array:
  """Computes weight_decay / 2 times the sum of squares of every kernel, f32 [].

  Kernels of convolutions, also depthwise ones, are decayed; biases and batch norm's scales are
  not. The penalty is a part of the loss, so it passes through momentum (coupled decay).
  """
  kernels = [p for path, p in jax.tree_util.tree_leaves_with_path(params)
             if is_kernel(tuple(entry.key for entry in path))]
  return 0.5 * weight_decay * sum(jnp.sum(jnp.square(k)) for k in kernels)


def update_average(average: Any, current: Any, *, decay: float, step: Array) -> Any:
  """Returns the exponential moving average of a tree after one more step.

  The decay starts at 1/10 and rises with the steps, (1 + step) / (10 + step), up to `decay`, so
  that the average forgets the random start (as with TensorFlow's `num_updates`).
  """
  step = jnp.asarray(step, jnp.float32)
  rate = jnp.minimum(decay, (1 + step) / (10 + step))
  return jax.tree.map(lambda a, c: a + (1 - rate) * (c - a), average, current)
