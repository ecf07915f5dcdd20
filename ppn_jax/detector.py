"""Detector: a network with its anchors, loss and post-processing.

Training, evaluation, export, planning and notebooks all call `Detector.loss` and
`Detector.detect`; there is no second definition of either.
"""

import contextlib
import dataclasses
import functools
import inspect
from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import Mesh

from ppn_jax import registry
from ppn_jax.detection.anchors import anchors_per_cell, ssd_anchors
from ppn_jax.detection.class_logits import ClassLogitsSpec
from ppn_jax.detection.frame import ImageSize, check_image_size, sides_of
from ppn_jax.detection.losses import LOSSES, DetectionLoss
from ppn_jax.detection.matching import assign_targets
from ppn_jax.detection.nms import postprocess as postprocess_outputs
from ppn_jax.detection.structures import Anchors, Array, Detections, GroundTruth, Outputs, Targets
from ppn_jax.distributed import sharding
from ppn_jax.errors import InputError, did_you_mean
from ppn_jax.models.layers import LayerPolicy
from ppn_jax.models.network import build_network

# Flax variables: {'params': ..., 'batch_stats': ...}.
Variables = Mapping[str, Any]

# float64 is for tests of equality; JAX only has it with jax_enable_x64.
DTYPES = {'float32': jnp.float32, 'bfloat16': jnp.bfloat16, 'float64': jnp.float64}


@dataclasses.dataclass(frozen=True, eq=False)
class Detector:
  """Network with its anchors, and functions for its loss and its detections.

  It holds no learned values: those are `Variables`, made by `init` and passed to every call.

  Attributes:
    network: maps images u8 [B, S, S, 3] to Outputs.
    anchors: A anchors, one for each row of the outputs.
    image_size: S, side of the network's input in pixels, or (height, width).
    class_spec: layout of the class logits, C or 1 + C for each anchor.
    assign_targets: maps (anchors, ground_truth) to Targets.
    outputs_loss: maps (outputs, targets) to DetectionLoss.
    postprocess: maps (outputs, anchors) to Detections.
  """
  network: nn.Module
  anchors: Anchors
  image_size: ImageSize
  class_spec: ClassLogitsSpec
  assign_targets: Callable[[Anchors, GroundTruth], Targets]
  outputs_loss: Callable[[Outputs, Targets], DetectionLoss]
  postprocess: Callable[[Outputs, Anchors], Detections]

  @property
  def num_classes(self) -> int:
    """C, the background not counted."""
    return self.class_spec.num_classes

  @property
  def num_levels(self) -> int:
    """L, levels of the pyramid."""
    return int(self.anchors.level[-1]) + 1

  def init(self, key: Array) -> Variables:
    """Returns initial variables, float32, drawn from a random key."""
    return self._first_pass(key)[1]

  @functools.cached_property
  def _first_pass(self) -> Callable[[Array], tuple[Outputs, Variables]]:
    """Function from a key to (outputs for a blank image, initial variables).

    Shapes are needed many times before the first step, and each trace of the network takes about a
    second. This function is traced once and inlined into other programs.
    """
    return jax.jit(lambda key: self.network.init_with_output(key, self.blank_images(),
                                                             train=False), inline=True)

  def forward(self, variables: Variables, images: Array) -> Outputs:
    """Applies the network for inference: batch norm uses its moving averages."""
    return self.network.apply(variables, images, train=False)

  def forward_scaled(self, variables: Variables, x: Array) -> Outputs:
    """Applies the network for inference to images float32 [B, S, S, 3], in [-1, 1]."""
    return self.network.apply(variables, x, method='predict_scaled')

  def forward_train(self, variables: Variables, images: Array, *,
                    frozen: Collection[tuple[str, ...]] = ()) -> tuple[Outputs, Variables]:
    """Applies the network in training; returns (outputs, updated batch_stats).

    Batch norm uses the statistics of the batch and moves its averages towards them, except in the
    modules with the paths `frozen`, which are applied as for inference.
    """
    with nn.intercept_methods(_as_for_inference(frozen)) if frozen else contextlib.nullcontext():
      outputs, updates = self.network.apply(variables, images, train=True, mutable=['batch_stats'])
    return outputs, updates['batch_stats']

  def loss(self, outputs: Outputs, ground_truth: GroundTruth) -> DetectionLoss:
    """Computes the loss of the outputs over the whole batch."""
    return self.outputs_loss(outputs, self.assign_targets(self.anchors, ground_truth))

  def detect(self, variables: Variables, images: Array) -> Detections:
    """Returns K detections for each image u8 [B, S, S, 3]."""
    return self.postprocess(self.forward(variables, images), self.anchors)

  def blank_images(self) -> Array:
    """Returns one black image, u8 [1, S, S, 3], to trace or warm up with."""
    return jnp.zeros((1, *sides_of(self.image_size), 3), jnp.uint8)


def build(*, image_size: ImageSize, num_classes: int, backbone: Mapping[str, Any],
          neck: Mapping[str, Any], head: Mapping[str, Any], anchors: Mapping[str, Any],
          layers: Mapping[str, Any], matching: Mapping[str, Any], loss: Mapping[str, Any],
          postprocess: Mapping[str, Any], background_column: bool = False,
          score_activation: str = 'sigmoid') -> Detector:
  """Builds a detector from config blocks and checks that its parts fit.

  Args:
    image_size: S, the side of the square input in pixels; or (height, width).
    num_classes: C, the background not counted.
    backbone, neck, head: a `name` or dotted path each, and its arguments.
    anchors: arguments of `anchors.ssd_anchors`; the grids come from the neck.
    layers: arguments of `LayerPolicy`, with `dtype` by name: 'float32' or 'bfloat16'.
    loss: a `name` of `losses.LOSSES` or a dotted path, and its arguments.
    matching, postprocess: arguments of `matching.assign_targets` and `nms.postprocess`.
    background_column: whether the class logits of an anchor begin with one for the background.
    score_activation: 'sigmoid' scores each class by itself, 'softmax' all of an anchor together.

  Raises:
    InputError: If a name or option is unknown, or parts do not fit together. Nothing is compiled or
      allocated before this is checked.
  """
  image_size = check_image_size('model.image_size', image_size)
  if num_classes < 1:
    raise InputError(f'num_classes={num_classes} must be positive')
  class_spec = ClassLogitsSpec(num_classes, background_column, score_activation)
  policy = _layer_policy(layers)
  network = functools.partial(build_network, backbone=backbone, neck=neck, head=head,
                              num_classes=class_spec.num_logits, policy=policy)
  anchors_of = registry.bind('anchors', ssd_anchors, anchors,
                            given=['grid_sizes', 'image_size'])
  # All forms of an operation have the same shapes, and tracing one is faster than tracing all.
  plain = dataclasses.replace(policy, conv_form='native')
  grids = grid_sizes(network(anchors_per_cell=(1,), policy=plain), image_size)
  placed = anchors_of(grids, image_size)
  per_cell = anchors_per_cell(placed, grids)
  if len(set(per_cell)) == 1:
    class_spec = dataclasses.replace(class_spec, anchors_per_cell=per_cell[0])
  outputs_loss = registry.select('loss', loss, LOSSES,
                                 given=['outputs', 'targets', 'class_spec', 'anchors'])
  # A user's own loss may have no use for them.
  takes_anchors = 'anchors' in inspect.signature(outputs_loss).parameters
  bound_postprocess = registry.bind('postprocess', postprocess_outputs, postprocess,
                                    given=['outputs', 'anchors', 'class_spec'])
  detector = Detector(
      network=network(anchors_per_cell=per_cell),
      anchors=placed,
      image_size=image_size,
      class_spec=class_spec,
      assign_targets=registry.bind('matching', assign_targets, matching,
                                   given=['anchors', 'ground_truth']),
      outputs_loss=functools.partial(outputs_loss, class_spec=class_spec,
                                     **({'anchors': placed} if takes_anchors else {})),
      postprocess=functools.partial(bound_postprocess, class_spec=class_spec))
  _check_rows(detector)
  return detector


def configured_grid_sizes(
    *, image_size: ImageSize, backbone: Mapping[str, Any], neck: Mapping[str, Any],
    head: Mapping[str, Any], layers: Mapping[str, Any]) -> list[tuple[int, int]]:
  """Returns (rows, columns) of each pyramid level, finest first; nothing is compiled.

  Args:
    image_size, backbone, neck, head, layers: see `build`.

  Raises:
    InputError: If a name or option is unknown, or parts do not fit together.
  """
  policy = dataclasses.replace(_layer_policy(layers), conv_form='native')
  network = build_network(backbone=backbone, neck=neck, head=head, num_classes=1,
                          anchors_per_cell=(1,), policy=policy)
  return grid_sizes(network, image_size)


def _as_for_inference(modules: Collection[tuple[str, ...]]) -> Callable[..., Any]:
  """Returns a Flax interceptor that calls these modules with `train=False` in any case."""
  def intercept(function, args, kwargs, context):
    if kwargs.get('train') and context.module.path in modules:
      kwargs = {**kwargs, 'train': False}
    return function(*args, **kwargs)

  return intercept


def jit_detect(detector: Detector, mesh: Mesh) -> Callable[[Variables, Array], Detections]:
  """Compiles `Detector.detect` for a mesh.

  Images and detections are split by rows; variables are replicated.
  """
  whole, split = sharding.replicated(mesh), sharding.by_rows(mesh)

  def detect(variables: Variables, images: Array) -> Detections:
    return detector.detect(jax.lax.with_sharding_constraint(variables, whole), images)

  # A moving average keeps its sharding of training, which may be split over the devices.
  return jax.jit(detect, in_shardings=(None, split), out_shardings=split)


def _layer_policy(options: Mapping[str, Any]) -> LayerPolicy:
  """Builds the policy of a `layers` block, whose `dtype` is a name."""
  options = dict(options)
  dtype = options.pop('dtype', 'float32')
  if dtype not in DTYPES:
    raise InputError(f'layers.dtype={dtype!r} is unknown; {did_you_mean(str(dtype), DTYPES)}')
  if dtype == 'float64' and not jax.config.jax_enable_x64:  # pyright: ignore
    raise InputError("layers.dtype='float64' needs JAX_ENABLE_X64=1 in the environment")
  return registry.bind('layers', LayerPolicy, options, given=['dtype'])(dtype=DTYPES[dtype])


def grid_sizes(network: nn.Module, image_size: ImageSize) -> list[tuple[int, int]]:
  """Returns (rows, columns) of each pyramid level, finest first, by tracing shapes alone."""
  images = jax.ShapeDtypeStruct((1, *sides_of(image_size), 3), jnp.uint8)

  def pyramid(images):
    maps, _ = network.init_with_output(jax.random.key(0), images, train=False, method='pyramid')
    return maps

  return [m.shape[1:3] for m in jax.eval_shape(pyramid, images)]


def _check_rows(detector: Detector) -> None:
  """Checks that each output row has an anchor, and that the loss and post-processing accept them.

  Only shapes are traced; nothing is compiled.
  """
  outputs, _ = jax.eval_shape(lambda: detector._first_pass(jax.random.key(0)))
  rows, logits = outputs.class_logits.shape[1:]
  if rows != len(detector.anchors.boxes) or logits != detector.class_spec.num_logits:
    raise InputError(
        f'the head returns {rows} rows of {logits} class logits, but the detector needs '
        f'{len(detector.anchors.boxes)} rows (anchors) of {detector.class_spec.num_logits}')
  one_box = GroundTruth(*(jnp.zeros((1, 1, *tail), dtype) for tail, dtype in [
      ((4,), jnp.float32), ((), jnp.int32), ((), jnp.bool_), ((), jnp.bool_)]))
  jax.eval_shape(detector.loss, outputs, one_box)
  jax.eval_shape(lambda o: detector.postprocess(o, detector.anchors), outputs)
