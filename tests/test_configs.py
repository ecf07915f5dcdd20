"""Every file in configs/ builds, and its train step has the right shapes."""

import pathlib

import jax
import pytest

from ppn_jax.cli.flags import load_config
from ppn_jax.data.transforms import build_transforms
from ppn_jax.detection.structures import Category
from ppn_jax.run import Run, build_detector, resolve_classes
from ppn_jax.training.partition import data_mesh
from ppn_jax.training.step import abstract_batch, abstract_state, train_step

FILES = sorted((pathlib.Path(__file__).resolve().parents[1] / 'configs').glob('*.py'))


def test_there_are_configs():
  assert {'quickstart.py', 'coco_json.py', 'ppn_mobilenet_v1_coco.py'} <= {f.name for f in FILES}


@pytest.mark.parametrize('file', FILES, ids=lambda f: f.stem)
def test_builds_and_shape_evaluates_a_step(file, tmp_path):
  config = load_config(str(file), [])
  assert config.is_locked
  categories = [Category(i, f'class {i}') for i in range(1, 8)]
  config = resolve_classes(config, categories)
  run = Run(tmp_path, config, tuple(categories))
  detector, optimizer, mesh = build_detector(config), run.optimizer(), data_mesh()
  build_transforms(config.data.transforms)
  state = abstract_state(detector, optimizer, mesh)
  batch = abstract_batch(2, detector.image_size, 8, mesh)
  after, metrics = jax.eval_shape(
      lambda *arguments: train_step(detector, optimizer, *arguments), state, *batch)
  # A step must return what it takes, or its state could not be donated and looped.
  same = jax.tree.map(lambda a, b: (a.shape, a.dtype) == (b.shape, b.dtype), state, after)
  assert jax.tree.all(same)
  assert all(m.shape == () for m in metrics)


@pytest.mark.parametrize('file', FILES, ids=lambda f: f.stem)
def test_says_how_to_use_it(file):
  assert '--config=configs/' + file.name in file.read_text().split('"""')[1]
