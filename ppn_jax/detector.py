"""Where network and mathematics meet: one object that knows how to learn and how to detect.

Training, evaluation, export, planning and notebooks all call `Detector.loss` and
`Detector.detect`; there is no second definition of either.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from ppn_jax import registry
from ppn_jax.detection.anchors import anchors_per_cell, ssd_anchors
from ppn_jax.detection.class_logits import ClassColumns
from ppn_jax.detection.losses import LOSSES, DetectionLoss
from ppn_jax.detection.matching import assign
from ppn_jax.detection.nms import postprocess as postprocess_outputs
from ppn_jax.detection.structures import Anchors, Array, Detections, GroundTruth, Outputs, Targets
from ppn_jax.errors import InputError, did_you_mean
from ppn_jax.models.layers import LayerPolicy
from ppn_jax.models.network import build_network

# {'params': ..., 'batch_stats': ...}, as Flax has them.
Variables = Mapping[str, Any]

# float64 is for tests of equality; JAX has it with jax_enable_x64 only.
DTYPES = {'float32': jnp.float32, 'bfloat16': jnp.bfloat16, 'float64': jnp.float64}


@dataclasses.dataclass(frozen=True, eq=False)
class Detector:
  """A network with its anchors and the functions that give its outputs meaning.

  It holds no learned values: those are `Variables`, made by `init` and passed to every call.

  Attributes:
    network: images u8 [B, S, S, 3] -> Outputs.
    anchors: one for each row of the outputs.
    image_size: S.
    columns: what the C or 1 + C columns of the class logits mean.
    assign: (anchors, truth) -> Targets.
    outputs_loss: (outputs, targets) -> DetectionLoss.
    postprocess: (outputs, anchors) -> Detections.
  """
  network: nn.Module
  anchors: Anchors
  image_size: int
  columns: ClassColumns
  assign: Callable[[Anchors, GroundTruth], Targets]
  outputs_loss: Callable[[Outputs, Targets], DetectionLoss]
  postprocess: Callable[[Outputs, Anchors], Detections]

  @property
  def num_classes(self) -> int:
    """C, the background not counted."""
    return self.columns.num_classes

  @property
  def num_levels(self) -> int:
    """L, of the pyramid."""
    return int(self.anchors.level[-1]) + 1

  def init(self, key: Array) -> Variables:
    """Fresh variables: `{'params', 'batch_stats'}`, float32."""
    return self._first_pass(key)[1]

  @functools.cached_property
  def _first_pass(self) -> Callable[[Array], tuple[Outputs, Variables]]:
    """key -> (outputs for a blank image, fresh variables).

    Shapes are asked for many times before the first step; each trace takes a second or so, and
    this has one, which other programs take over as if it were their own.
    """
    return jax.jit(lambda key: self.network.init_with_output(key, self.blank_images(),
                                                             train=False), inline=True)

  def forward(self, variables: Variables, images: Array) -> Outputs:
    """The network at inference: batch norm uses its moving averages."""
    return self.network.apply(variables, images, train=False)

  def forward_train(self, variables: Variables, images: Array) -> tuple[Outputs, Variables]:
    """The network in training -> (outputs, updated batch_stats).

    Batch norm uses the statistics of the batch and moves its averages towards them.
    """
    outputs, updates = self.network.apply(variables, images, train=True, mutable=['batch_stats'])
    return outputs, updates['batch_stats']

  def loss(self, outputs: Outputs, truth: GroundTruth) -> DetectionLoss:
    """How wrong the outputs are, over the whole batch."""
    return self.outputs_loss(outputs, self.assign(self.anchors, truth))

  def detect(self, variables: Variables, images: Array) -> Detections:
    """Pixels to detections: images u8 [B, S, S, 3] -> K detections each."""
    return self.postprocess(self.forward(variables, images), self.anchors)

  def blank_images(self) -> Array:
    """One black image, to trace or warm up with: u8 [1, S, S, 3]."""
    return jnp.zeros((1, self.image_size, self.image_size, 3), jnp.uint8)


def build(*, image_size: int, num_classes: int, backbone: Mapping[str, Any],
          neck: Mapping[str, Any], head: Mapping[str, Any], anchors: Mapping[str, Any],
          layers: Mapping[str, Any], matching: Mapping[str, Any], loss: Mapping[str, Any],
          postprocess: Mapping[str, Any], background_column: bool = False,
          score_activation: str = 'sigmoid') -> Detector:
  """Builds a detector from config blocks and checks that its parts fit.

  Args:
    image_size: S, the side of the square input in pixels.
    num_classes: C, background not counted.
    backbone, neck, head: a `name` or dotted path each, and its arguments.
    anchors: arguments of `anchors.ssd_anchors`; the grids come from the neck.
    layers: arguments of `LayerPolicy`, with `dtype` by name: 'float32' or 'bfloat16'.
    loss: a `name` of `losses.LOSSES` or a dotted path, and its arguments.
    matching, postprocess: arguments of `matching.assign` and `postprocess.postprocess`.
    background_column: whether the class logits begin with a column for the background.
    score_activation: 'sigmoid' scores each class by itself, 'softmax' all columns together.

  Raises:
    InputError: an unknown name or option, or parts that do not fit, with both numbers. Nothing
      is compiled or allocated before that is known.
  """
  if image_size < 1 or num_classes < 1:
    raise InputError(f'image_size={image_size} and num_classes={num_classes} must be positive')
  columns = ClassColumns(num_classes, background_column, score_activation)
  policy = _layer_policy(layers)
  network = functools.partial(build_network, backbone=backbone, neck=neck, head=head,
                              num_classes=columns.count, policy=policy)
  lay_anchors = registry.bind('anchors', ssd_anchors, anchors, given=['grid_sizes'])
  # All forms of an operation have the same shapes, and one is sooner traced than all.
  plain = dataclasses.replace(policy, conv_form='native')
  grids = grid_sizes(network(anchors_per_cell=(1,), policy=plain), image_size)
  laid = lay_anchors(grids)
  per_cell = anchors_per_cell(laid, grids)
  if len(set(per_cell)) == 1:
    columns = dataclasses.replace(columns, cell_anchors=per_cell[0])
  outputs_loss = registry.select('loss', loss, LOSSES, given=['outputs', 'targets', 'columns'])
  report = registry.bind('postprocess', postprocess_outputs, postprocess,
                         given=['outputs', 'anchors', 'columns'])
  detector = Detector(
      network=network(anchors_per_cell=per_cell),
      anchors=laid,
      image_size=image_size,
      columns=columns,
      assign=registry.bind('matching', assign, matching, given=['anchors', 'truth']),
      outputs_loss=functools.partial(outputs_loss, columns=columns),
      postprocess=functools.partial(report, columns=columns))
  _check_rows(detector)
  return detector


def configured_grid_sizes(
    *, image_size: int, backbone: Mapping[str, Any], neck: Mapping[str, Any],
    head: Mapping[str, Any], layers: Mapping[str, Any]) -> list[tuple[int, int]]:
  """Returns (rows, columns) of each pyramid level, finest first; nothing is compiled.

  Args: As of `build`.

  Raises:
    InputError: As `build`.
  """
  policy = dataclasses.replace(_layer_policy(layers), conv_form='native')
  network = build_network(backbone=backbone, neck=neck, head=head, num_classes=1,
                          anchors_per_cell=(1,), policy=policy)
  return grid_sizes(network, image_size)


def _layer_policy(options: Mapping[str, Any]) -> LayerPolicy:
  options = dict(options)
  dtype = options.pop('dtype', 'float32')
  if dtype not in DTYPES:
    raise InputError(f'layers.dtype={dtype!r}; {did_you_mean(str(dtype), DTYPES)}')
  if dtype == 'float64' and not jax.config.jax_enable_x64:  # pyright: ignore
    raise InputError("layers.dtype='float64' needs JAX_ENABLE_X64=1 in the environment")
  return registry.bind('layers', LayerPolicy, options, given=['dtype'])(dtype=DTYPES[dtype])


def grid_sizes(network: nn.Module, image_size: int) -> list[tuple[int, int]]:
  """(rows, columns) of each pyramid level, found by tracing the shapes alone."""
  images = jax.ShapeDtypeStruct((1, image_size, image_size, 3), jnp.uint8)

  def pyramid(images):
    maps, _ = network.init_with_output(jax.random.key(0), images, train=False, method='pyramid')
    return maps

  return [m.shape[1:3] for m in jax.eval_shape(pyramid, images)]


def _check_rows(detector: Detector) -> None:
  """Every output row must have its anchor, and loss and postprocess take what comes.

  Shapes only, nothing is compiled.
  """
  outputs, _ = jax.eval_shape(lambda: detector._first_pass(jax.random.key(0)))
  rows, columns = outputs.class_logits.shape[1:]
  if rows != len(detector.anchors.boxes) or columns != detector.columns.count:
    raise InputError(
        f'the head gives {rows} rows of {columns} class columns, but there are '
        f'{len(detector.anchors.boxes)} anchors and {detector.columns.count} columns to fill')
  one_box = GroundTruth(*(jnp.zeros((1, 1, *tail), dtype) for tail, dtype in [
      ((4,), jnp.float32), ((), jnp.int32), ((), jnp.bool_), ((), jnp.bool_)]))
  jax.eval_shape(detector.loss, outputs, one_box)
  jax.eval_shape(lambda o: detector.postprocess(o, detector.anchors), outputs)
