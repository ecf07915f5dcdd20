"""Detector as a whole: shapes, perfect outputs, and parts that do not fit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import tiny_config

from ppn_jax.config import base_config
from ppn_jax.data.loader import eval_batches, required_boxes
from ppn_jax.data.source import build_source
from ppn_jax.detection.structures import GroundTruth, Outputs
from ppn_jax.errors import InputError
from ppn_jax.metrics import coco
from ppn_jax.run import build_detector


def ppn_300(num_classes=90, **model):
  config = base_config()
  config.model.num_classes = num_classes
  config.model.update(model)
  return build_detector(config)


@pytest.mark.slow
def test_ppn_at_300_px():
  detector = ppn_300()
  assert detector.anchors.boxes.shape == (3000, 4)
  cells = np.bincount(detector.anchors.level) // 6
  assert np.sqrt(cells).tolist() == [19, 10, 5, 3, 2, 1]
  variables = jax.eval_shape(detector.init, jax.random.key(0))
  images = jax.ShapeDtypeStruct((2, 300, 300, 3), jnp.uint8)
  outputs = jax.eval_shape(detector.forward, variables, images)
  assert outputs.box_codes.shape == (2, 3000, 4) and outputs.class_logits.shape == (2, 3000, 90)
  found = jax.eval_shape(detector.detect, variables, images)
  assert found.boxes.shape == (2, 100, 4) and found.level.shape == (2, 100)


def test_parameters_are_those_of_the_reference():
  variables = jax.eval_shape(ppn_300(background_column=True).init, jax.random.key(0))
  count = lambda tree: sum(x.size for x in jax.tree.leaves(tree))
  assert count(variables['params']) == 2_173_818
  assert count(variables) == 2_194_682


@pytest.mark.slow
def test_perfect_outputs_score_one():
  """Outputs made from the targets must score an AP of one."""
  config = tiny_config()
  config.unlock()
  config.model.num_classes = 5
  detector = build_detector(config)
  source = build_source({'name': 'synthetic_shapes', 'num_images': 24, 'split': 'eval'})
  rows = []
  for batch in eval_batches(source, image_size=64, max_boxes=required_boxes(source),
                            batch_size=8):
    targets = detector.assign_targets(detector.anchors, batch.ground_truth)
    correct = jax.nn.one_hot(targets.labels, 5) * targets.positive[..., None]
    outputs = Outputs(targets.box_codes, 40 * correct - 20)
    found = jax.device_get(detector.postprocess(outputs, detector.anchors))
    rows += coco.to_rows(found, batch.image_id, batch.size, batch.valid, source.categories)
  figures = coco.score(source.ground_truth(), rows).metrics
  # An anchor can only predict one object; in this data no two objects share one.
  assert figures['AP'] == pytest.approx(1.0) and figures['AR100'] == pytest.approx(1.0)


def random_ground_truth(rng, batch, boxes, valid, num_classes=5):
  corners = np.sort(rng.uniform(0, 1, (batch, boxes, 2, 2)), axis=2).reshape(batch, boxes, 4)
  mask = np.arange(boxes) < valid
  return GroundTruth(np.where(mask[:, None], corners, 0).astype('f'),
                     np.where(mask, rng.integers(0, num_classes, (batch, boxes)), 0).astype('i'),
                     np.zeros((batch, boxes), bool), np.broadcast_to(mask, (batch, boxes)))


def test_padding_of_ground_truth_changes_neither_loss_nor_gradient():
  config = tiny_config()
  config.unlock()
  config.model.num_classes = 5
  detector = build_detector(config)
  rng = np.random.default_rng(0)
  narrow = random_ground_truth(rng, 2, 8, 3)
  wide = jax.tree.map(lambda x: np.pad(x, [(0, 0), (0, 56)] + [(0, 0)] * (x.ndim - 2)), narrow)
  rows = len(detector.anchors.boxes)
  outputs = Outputs(jnp.asarray(rng.normal(size=(2, rows, 4)), jnp.float32),
                    jnp.asarray(rng.normal(size=(2, rows, 5)), jnp.float32))
  total = lambda o, t: sum(detector.loss(o, t)[:2])
  both = [jax.jit(jax.value_and_grad(total))(outputs, t) for t in (narrow, wide)]
  jax.tree.map(np.testing.assert_array_equal, *both)


@pytest.mark.parametrize('block, entry, value, message', [
    ('head', 'depht', 3, "head 'shared_box_predictor' has no option 'depht'; did you mean 'depth'"),
    ('backbone', 'name', 'mobilenet_v4', "unknown backbone 'mobilenet_v4'"),
    ('neck', 'stride', 13, '16'),
    ('neck', 'num_levels', 9, 'num_levels'),
    ('layers', 'dtype', 'float23', "did you mean 'float32'"),
    ('anchors', 'reduce_lowest_level', True, 'reduce_lowest_level=False'),
    ('anchors', 'min_scale', -1.0, 'min_scale=-1.0')])
def test_parts_that_do_not_fit(block, entry, value, message):
  config = base_config()
  config.model.num_classes = 3
  config.model[block][entry] = value
  with pytest.raises(InputError) as error:
    build_detector(config)
  assert message in str(error.value)


def test_blocks_beside_the_model_are_checked_too():
  config = base_config()
  config.model.num_classes = 3
  config.loss.gama = 3.0
  with pytest.raises(InputError, match="loss 'focal' has no option 'gama'; did you mean 'gamma'"):
    build_detector(config)


def test_a_part_from_outside_the_package():
  config = base_config()
  config.model.num_classes = 3
  config.model.neck = dict(name='ppn_jax.models.necks:PoolingPyramid', num_levels=4)
  assert len(np.unique(build_detector(config).anchors.level)) == 4
