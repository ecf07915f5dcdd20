"""Implements JAX's primitives by TensorFlow operations that TensorFlow Lite has built in.

`jax2tf` is no alternative: it wraps an XLA program in a version of StableHLO that TensorFlow 2.21
cannot read, and a converter that reads it does not recognise depthwise convolutions. Each method
here takes an equation of a jaxpr and its inputs, and returns its output; `jaxpr.evaluate` calls
them. Only the batch size may be unknown.

bfloat16 is computed in float32, and uint32 as the int32 with the same bits, because TensorFlow Lite
supports few operations on either.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from ppn_jax.errors import InputError
from ppn_jax.export.jaxpr import evaluate

_WIDER = {'bfloat16': 'float32', 'uint32': 'int32'}


def convert(closed: Any, images: tf.Tensor, output_format: str) -> list[tf.Tensor]:
  """Returns the outputs of a jaxpr with one input, images [B, S, S, 3], as TensorFlow tensors.

  Raises:
    InputError: If a primitive has no counterpart here.
  """
  operations = Operations(tf.shape(images)[0], output_format)
  outputs = evaluate(closed, [images], operations, output_format)
  return [operations.whole(x, v) for x, v in zip(outputs, closed.jaxpr.outvars, strict=True)]


def _elementwise(function):
  def operation(self, equation, *inputs):
    return function(*(_tensor(x) for x in inputs))
  return operation


def _by_type(for_floats, for_integers):
  def operation(self, equation, *inputs):
    is_integer = np.issubdtype(equation.invars[0].aval.dtype, np.integer)
    return (for_integers if is_integer else for_floats)(*map(_tensor, inputs))
  return operation


def _divide_integers(a, b):
  """Divides integers, rounding towards zero; TensorFlow Lite rounds down."""
  quotient = tf.abs(a) // tf.abs(b)
  return tf.where((a < 0) == (b < 0), quotient, -quotient)


def _common_bits(a, b):
  """Returns a & b for int32, which has no built-in operation: 2 (a & b) = a + b - (a ^ b).

  The halves of each number are computed separately, so that nothing overflows.
  """
  def halves(x):
    high = tf.bitwise.right_shift(x, tf.constant(16))
    return high, x - high * 65536

  def common(x, y):
    return tf.bitwise.right_shift(x + y - tf.bitwise.bitwise_xor(x, y), tf.constant(1))

  (a_high, a_low), (b_high, b_low) = halves(a), halves(b)
  return common(a_high, b_high) * 65536 + common(a_low, b_low)


def _reduce(function):
  def operation(self, equation, x):
    return function(self.whole(x, equation.invars[0]), axis=list(map(int, equation.params['axes'])))
  return operation


class Operations:
  """Operations by the names of JAX's primitives, one method for each.

  Attributes:
    batch: i32 [], the batch size, if it is not known in advance.
    output_format: the export format, for messages.
  """

  def __init__(self, batch: tf.Tensor, output_format: str):
    self.batch, self.output_format = batch, output_format

  # Shapes.

  def side(self, size: Any) -> Any:
    """Returns a side of a shape: a number, or the batch size."""
    if isinstance(size, (int, np.integer)):
      return int(size)
    if len(str(size)) > 1:
      raise InputError(f'this model does not support a free batch size, since it computes {size}; '
                       'give --batch_size=N')
    return self.batch

  def whole(self, x: Any, variable: Any) -> tf.Tensor:
    """Returns `x` broadcast to the shape that the jaxpr gives it."""
    x, shape = _tensor(x), variable.aval.shape
    if len(x.shape) == len(shape) and all(a == b or a is None for a, b in zip(
        x.shape, shape, strict=True)):
      return x
    return tf.broadcast_to(x, [self.side(d) for d in shape])

  def _reshaped(self, x: tf.Tensor, shape: Sequence[Any]) -> tf.Tensor:
    free = [not isinstance(d, (int, np.integer)) for d in shape]
    if sum(free) < 2:
      return tf.reshape(x, [-1 if f else int(d) for f, d in zip(free, shape, strict=True)])
    return tf.reshape(x, [self.side(d) for d in shape])

  def broadcast_in_dim(self, equation, x, *_):
    # Most operations broadcast by themselves; the others call `whole`.
    shape, axes = equation.params['shape'], equation.params['broadcast_dimensions']
    sides = dict(zip(axes, x.shape, strict=True))
    if isinstance(x, np.ndarray):
      return x.reshape([sides.get(axis, 1) for axis in range(len(shape))])
    free = [axis for axis, side in sides.items() if side is None]
    return tf.reshape(x, [-1 if axis in free else sides.get(axis, 1)
                          for axis in range(len(shape))])

  def reshape(self, equation, x):
    return self._reshaped(self.whole(x, equation.invars[0]), equation.params['new_sizes'])

  def squeeze(self, equation, x):
    return tf.squeeze(_tensor(x), list(map(int, equation.params['dimensions'])))

  def transpose(self, equation, x):
    return tf.transpose(_tensor(x), list(map(int, equation.params['permutation'])))

  def concatenate(self, equation, *inputs):
    return tf.concat([self.whole(x, v) for x, v in zip(inputs, equation.invars, strict=True)],
                     int(equation.params['dimension']))

  def split(self, equation, x):
    return tf.split(self.whole(x, equation.invars[0]), list(map(int, equation.params['sizes'])),
                    int(equation.params['axis']))

  def stack(self, equation, *inputs):
    return tf.stack([self.whole(x, v) for x, v in zip(inputs, equation.invars, strict=True)],
                    int(equation.params.get('axis', 0)))

  def slice(self, equation, x):
    params = equation.params
    steps = params['strides'] or [1] * len(params['start_indices'])
    return self.whole(x, equation.invars[0])[tuple(
        slice(int(start), int(stop) if isinstance(stop, (int, np.integer)) else None, int(step))
        for start, stop, step in zip(params['start_indices'], params['limit_indices'], steps,
                                     strict=True))]

  def dynamic_slice(self, equation, x, *starts):
    shape, sizes = equation.invars[0].aval.shape, equation.params['slice_sizes']
    begin = [0 if size == side else tf.clip_by_value(_tensor(start), 0, int(side) - int(size))
             for start, size, side in zip(starts, sizes, shape, strict=True)]
    sizes = [self.side(size) for size in sizes]
    return tf.slice(self.whole(x, equation.invars[0]), tf.stack(begin), tf.stack(sizes))

  def dim_as_value(self, equation):
    return self.side(equation.params['dim'])

  def iota(self, equation):
    params = equation.params
    axis, shape = int(params['dimension']), params['shape']
    count = tf.cast(tf.range(self.side(shape[axis])), _dtype(params['dtype']))
    return tf.reshape(count, [-1 if i == axis else 1 for i in range(len(shape))])

  # Elementwise operations.

  add = add_any = _elementwise(tf.add)
  sub = _elementwise(tf.subtract)
  mul = _elementwise(tf.multiply)
  max = _elementwise(tf.maximum)
  min = _elementwise(tf.minimum)
  eq = _elementwise(tf.equal)
  ne = _elementwise(tf.not_equal)
  gt = _elementwise(tf.greater)
  ge = _elementwise(tf.greater_equal)
  lt = _elementwise(tf.less)
  le = _elementwise(tf.less_equal)
  exp = _elementwise(tf.exp)
  log = _elementwise(tf.math.log)
  neg = _elementwise(tf.negative)
  abs = _elementwise(tf.abs)
  tanh = _elementwise(tf.tanh)
  sqrt = _elementwise(tf.sqrt)
  rsqrt = _elementwise(tf.math.rsqrt)
  square = _elementwise(tf.square)
  logistic = _elementwise(tf.sigmoid)
  not_ = _elementwise(tf.logical_not)
  or_ = _elementwise(tf.logical_or)
  copy = copy_p = stop_gradient = optimization_barrier = _elementwise(tf.identity)
  and_ = _by_type(tf.logical_and, _common_bits)
  div = _by_type(tf.divide, _divide_integers)
  rem = _by_type(tf.math.floormod, lambda a, b: a - _divide_integers(a, b) * b)
  sign = _by_type(tf.sign, lambda x: tf.cast(x > 0, x.dtype) - tf.cast(x < 0, x.dtype))
  # NaN is not below infinity. There is no built-in operation for this.
  is_finite = _elementwise(lambda x: tf.abs(x) < np.float32(np.inf))

  def integer_pow(self, equation, x):
    return _tensor(x) ** equation.params['y']

  def select_n(self, equation, which, *cases):
    return tf.where(_tensor(which), *map(_tensor, reversed(cases)))

  def clamp(self, equation, least, x, most):
    if (least, most) == (0, 6):
      return tf.nn.relu6(_tensor(x))
    return tf.minimum(tf.maximum(_tensor(x), _tensor(least)), _tensor(most))

  def convert_element_type(self, equation, x):
    return tf.cast(_tensor(x), _dtype(equation.params['new_dtype']))

  # Reductions and products.

  reduce_sum = _reduce(tf.reduce_sum)
  reduce_max = _reduce(tf.reduce_max)
  reduce_min = _reduce(tf.reduce_min)
  reduce_or = _reduce(tf.reduce_any)
  reduce_and = _reduce(tf.reduce_all)

  def cumsum(self, equation, x):
    return tf.cumsum(self.whole(x, equation.invars[0]), int(equation.params['axis']),
                     reverse=equation.params['reverse'])

  def dot_general(self, equation, a, b):
    (a_sum, b_sum), (a_batch, b_batch) = equation.params['dimension_numbers']
    letters = iter('abcdefghijklmnop')
    a_axes = [next(letters) for _ in equation.invars[0].aval.shape]
    b_axes = [next(letters) for _ in equation.invars[1].aval.shape]
    for i, j in (*zip(a_sum, b_sum, strict=True), *zip(a_batch, b_batch, strict=True)):
      b_axes[j] = a_axes[i]
    batch = [a_axes[i] for i in a_batch]
    rest = [[c for i, c in enumerate(axes) if i not in (*summed, *batched)]
            for axes, summed, batched in ((a_axes, a_sum, a_batch), (b_axes, b_sum, b_batch))]
    a, b = (self.whole(x, v) for x, v in zip((a, b), equation.invars, strict=True))
    a, b = (tf.cast(x, _dtype(equation.outvars[0].aval.dtype)) for x in (a, b))
    return tf.einsum(f'{"".join(a_axes)},{"".join(b_axes)}->'
                     f'{"".join(batch + rest[0] + rest[1])}', a, b)

  # Sorting and indexing.

  def top_k(self, equation, x):
    # As in JAX, the lower index comes first among equal values.
    return tf.math.top_k(self.whole(x, equation.invars[0]), int(equation.params['k']))

  def sort(self, equation, key, *others):
    params, rank = equation.params, len(equation.invars[0].aval.shape)
    if params['num_keys'] != 1 or int(params['dimension']) != rank - 1:
      raise self._unsupported(equation)
    key, *others = (self.whole(x, v) for x, v in zip((key, *others), equation.invars, strict=True))
    number = tf.cast(key, tf.int32) if key.dtype == tf.bool else key
    _, order = tf.math.top_k(-number, int(equation.invars[0].aval.shape[-1]))
    return [tf.gather(x, order, batch_dims=rank - 1) for x in (key, *others)]

  def gather(self, equation, x, indices):
    numbers, params = equation.params['dimension_numbers'], equation.params
    shape = equation.invars[0].aval.shape
    sizes, axes = params['slice_sizes'], tuple(map(int, numbers.start_index_map))
    collapsed = tuple(map(int, numbers.collapsed_slice_dims))
    x = self.whole(x, equation.invars[0])
    if isinstance(indices, np.ndarray) and indices.ndim == 1:
      return self._window(x, indices, numbers, shape, sizes)
    batched = tuple(map(int, numbers.operand_batching_dims))
    whole = all(sizes[i] is d or sizes[i] == d for i, d in enumerate(shape)
                if i not in (*collapsed, *batched))
    if (len(axes) != 1 or collapsed != axes or not whole
        or batched != tuple(range(len(batched)))
        or tuple(map(int, numbers.start_indices_batching_dims)) != batched):
      raise self._unsupported(equation)
    places = _tensor(indices)[..., 0]
    found = tf.gather(x, places, axis=axes[0], batch_dims=len(batched))
    return _with_offsets(found, axes[0], len(places.shape), len(batched), numbers.offset_dims)

  def _window(self, x, index, numbers, shape, sizes):
    """Gathers a single window whose position is a constant."""
    starts = dict(zip(map(int, numbers.start_index_map), map(int, index), strict=True))
    x = x[tuple(slice(None) if size is side or size == side
                else slice(starts.get(axis, 0), starts.get(axis, 0) + int(size))
                for axis, (side, size) in enumerate(zip(shape, sizes, strict=True)))]
    return tf.squeeze(x, list(map(int, numbers.collapsed_slice_dims)))

  def scatter(self, equation, x, indices, updates):
    """Sets values at distinct indices and ignores indices that are out of range.

    Compares every position with every index, because TensorFlow's scatter rejects indices that are
    out of range.
    """
    numbers = equation.params['dimension_numbers']
    rank = len(equation.invars[0].aval.shape)
    if numbers.update_window_dims or tuple(map(int, numbers.inserted_window_dims)) != (rank - 1,) \
        or tuple(map(int, numbers.operand_batching_dims)) not in ((), tuple(range(rank - 1))):
      raise self._unsupported(equation)
    x, indices, updates = (self.whole(v, w) for v, w in zip(
        (x, indices, updates), equation.invars, strict=True))
    if len(numbers.operand_batching_dims) != rank - 1:
      raise self._unsupported(equation)
    size = int(equation.invars[0].aval.shape[-1])
    here = tf.equal(tf.range(size)[:, None], indices[..., None, :, 0])
    which = tf.argmax(tf.cast(here, tf.int32), axis=-1, output_type=tf.int32)
    return tf.where(tf.reduce_any(here, axis=-1),
                    tf.gather(updates, which, batch_dims=rank - 1), x)

  def while_(self, equation, *inputs):
    params = equation.params
    split, end = params['cond_nconsts'], params['cond_nconsts'] + params['body_nconsts']
    condition_constants, body_constants = list(inputs[:split]), list(inputs[split:end])
    by_row = bool(params['cond_jaxpr'].jaxpr.outvars[0].aval.shape)
    carried = [self.whole(x, v) for x, v in zip(inputs[end:], equation.invars[end:], strict=True)]

    def condition(state):
      found, = evaluate(params['cond_jaxpr'], [*condition_constants, *state], self,
                        self.output_format)
      return _tensor(found)

    def select(active, new, old):
      if active is None:
        return new
      active = tf.reshape(active, [-1, *[1] * (new.shape.rank - 1)])
      return tf.where(active, new, old)

    def body(*state):
      # A loop over a batch may have a condition for each row; rows that are done keep their state.
      active = condition(state) if by_row else None
      found = evaluate(params['body_jaxpr'], [*body_constants, *state], self, self.output_format)
      return [select(active, self.whole(x, v), old) for x, v, old in zip(
          found, params['body_jaxpr'].jaxpr.outvars, state, strict=True)]

    invariants = [tf.TensorShape([d if isinstance(d, int) else None for d in v.aval.shape])
                  for v in equation.invars[end:]]
    return list(tf.while_loop(lambda *state: tf.reduce_any(condition(state)), body, carried,
                              shape_invariants=invariants))

  # The network.

  def conv_general_dilated(self, equation, x, kernel):
    params, shape = equation.params, equation.invars[1].aval.shape
    numbers, strides = params['dimension_numbers'], list(params['window_strides'])
    if (tuple(numbers.lhs_spec) != (0, 3, 1, 2) or tuple(numbers.rhs_spec) != (3, 2, 0, 1)
        or params['batch_group_count'] != 1 or set(params['lhs_dilation']) != {1}):
      raise self._unsupported(equation)
    groups, dilations = params['feature_group_count'], list(params['rhs_dilation'])
    x, padding = _padded(_tensor(x), shape[:2], strides, params['padding'], 0.0, dilations)
    if groups == 1:
      return tf.nn.conv2d(x, _tensor(kernel), strides, padding, dilations=dilations)
    if shape[2] != 1 or groups != x.shape[-1]:
      raise self._unsupported(equation)
    kernel = tf.reshape(_tensor(kernel), [*shape[:2], groups, shape[3] // groups])
    return tf.nn.depthwise_conv2d(x, kernel, [1, *strides, 1], padding, dilations=dilations)

  def reduce_window_max(self, equation, x):
    params = equation.params
    window, strides = params['window_dimensions'], params['window_strides']
    if (window[0], window[3], strides[0], strides[3]) != (1, 1, 1, 1):
      raise self._unsupported(equation)
    x, padding = _padded(_tensor(x), window[1:3], strides[1:3], params['padding'][1:3],
                         -np.inf, [1, 1])
    return tf.nn.max_pool2d(x, window[1:3], strides[1:3], padding)

  def _unsupported(self, equation) -> InputError:
    return InputError(f'this model has a form of {equation.primitive.name} that format '
                      f'{self.output_format} cannot express; --format=stablehlo can')


def _tensor(x: Any) -> tf.Tensor:
  """Converts a constant to a type that TensorFlow Lite supports; returns tensors unchanged."""
  if not isinstance(x, (np.ndarray, np.generic)):
    return x
  if x.dtype == np.uint32:
    return tf.constant(x.view(np.int32))
  return tf.constant(x, _dtype(x.dtype))


def _dtype(dtype: Any) -> tf.DType:
  name = np.dtype(dtype).name
  return tf.dtypes.as_dtype(_WIDER.get(name, name))


def _with_offsets(x: tf.Tensor, axis: int, places_rank: int, batched: int,
                  offset_dims: Sequence[int]) -> tf.Tensor:
  """Transposes the result of `tf.gather` so that the slices' axes are at JAX's `offset_dims`."""
  inserted = list(range(axis, axis + places_rank - batched))
  ours = list(range(batched)) + inserted
  theirs = [i for i in range(len(x.shape)) if i not in ours]
  offsets = list(map(int, offset_dims))
  ours, theirs = iter(ours), iter(theirs)
  order = [next(theirs) if i in offsets else next(ours) for i in range(len(x.shape))]
  return x if order == sorted(order) else tf.transpose(x, order)


def _padded(x: tf.Tensor, window: Sequence[int], strides: Sequence[int],
            padding: Sequence[tuple[int, int]], fill: float, dilations: Sequence[int]
            ) -> tuple[tf.Tensor, str]:
  """Pads `x` explicitly unless the padding is SAME; returns it and TensorFlow's padding mode."""
  def same(size, window, stride, dilation):
    total = max((-(-size // stride) - 1) * stride + (window - 1) * dilation + 1 - size, 0)
    return total // 2, total - total // 2

  padding = [tuple(map(int, p)) for p in padding]
  if padding == [same(*sides) for sides in zip(x.shape[1:3], window, strides, dilations,
                                               strict=True)]:
    return x, 'SAME'
  if any(map(any, padding)):
    x = tf.pad(x, [(0, 0), *padding, (0, 0)], constant_values=fill)
  return x, 'VALID'
