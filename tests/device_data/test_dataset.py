"""Training set in device memory: its data, its batches, and runs that train on it."""

import json
import os
import pathlib
import re
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from time_limits import HANG_SECONDS
from tiny import tiny_config

from ppn_jax.config_files import load_config
from ppn_jax.data.source import build_source
from ppn_jax.data.transforms.basic import Resize
from ppn_jax.device_data import dataset
from ppn_jax.device_data.transforms import build_augmentation
from ppn_jax.distributed import sharding
from ppn_jax.errors import InputError
from ppn_jax.jobs import train as train_job
from ppn_jax.run import open_run
from ppn_jax.training import input_pipeline
from ppn_jax.training.train_step import abstract_state

TESTS = pathlib.Path(__file__).resolve().parents[1]
CONFIGS = sorted((TESTS.parent / 'configs').glob('[!_]*.py'))


def resident_config(**train):
  config = tiny_config(**train).unlock()
  config.data.resident.update(enabled=True, size=80)
  config.data.transforms = ({'name': 'horizontal_flip'},)
  return config.lock()


def spec_of(source, *, blocks=(), image_size=48, batch_size=8, seed=0):
  augmentation = build_augmentation(blocks, image_size=image_size, resize='area')
  return dataset.ResidentSpec(len(source), batch_size, 8, image_size, augmentation, seed)


@pytest.mark.slow
@pytest.mark.parametrize('image_size', [48, (32, 56)])
def test_without_augmentation_each_epoch_equals_the_host(image_size):
  source = build_source({'name': 'synthetic_shapes', 'num_images': 11, 'image_size': (40, 64)})
  mesh, spec, counts = sharding.data_mesh(), spec_of(source, image_size=image_size), []
  data = dataset.load(source, spec, mesh, on_images=counts.append)
  assert counts[-1] == 11
  draw = jax.jit(lambda data, step: dataset.draw_batch(spec, mesh, data, step))
  rows = []
  for step in range(0, 5):
    images, ground_truth = jax.device_get(draw(data, jnp.int32(step)))
    rows += [(images[r], *(array[r] for array in ground_truth)) for r in range(8)]
  shown = [[], [], []]
  for position, (image, boxes, labels, crowd, valid) in enumerate(rows[:33]):
    host = [Resize(image_size)(source[i]) for i in range(11)]
    index, = [i for i, example in enumerate(host) if (example.image == image).all()]
    np.testing.assert_allclose(boxes[valid], host[index].boxes, atol=1e-6)
    np.testing.assert_array_equal(labels[valid], host[index].labels)
    np.testing.assert_array_equal(crowd[valid], host[index].crowd)
    shown[position // 11].append(index)
  assert all(sorted(epoch) == list(range(11)) for epoch in shown)
  assert shown[0] != shown[1] != shown[2]


PROGRAM = """
import hashlib, json, re, sys
sys.path.insert(0, sys.argv[1])
from ppn_jax.distributed import sharding
number, processes, port = map(int, sys.argv[2:])
if processes > 1:
  sharding.join_processes(coordinator=f'localhost:{port}', num_processes=processes,
                           process_id=number, local_devices=1)
else:
  sharding.join_processes(local_devices=8)
import jax, jax.numpy as jnp, numpy as np
from test_dataset import spec_of
from ppn_jax.data.source import build_source
from ppn_jax.data.repeats import place
from ppn_jax.device_data import dataset
from ppn_jax.device_data.exchange import Grid

source = build_source({'name': 'synthetic_shapes', 'num_images': 21, 'image_size': (48, 64)})
spec = spec_of(source, blocks=[{'name': 'ssd_random_crop'}, {'name': 'horizontal_flip'},
                               {'name': 'mixup', 'size': 48},
                               {'name': 'photometric_distortion'}], seed=5)
spec = spec._replace(repeats=place(np.linspace(1, 2.5, 21)))
direct = dataset.choose_grid
for count, grid in [(2, None)] if processes > 1 else [(1, None), (8, None), (8, Grid(4, 2, 2, 1))]:
  dataset.choose_grid = direct if grid is None else lambda rows, devices: grid
  mesh = sharding.data_mesh(jax.devices()[:count])
  data = dataset.load(source, spec, mesh)
  draw = jax.jit(lambda data, step: dataset.draw_batch(spec, mesh, data, step)).lower(
      data, jax.ShapeDtypeStruct((), jnp.int32)).compile()
  digests = {}
  for step in range(6):
    for array in jax.tree.leaves(draw(data, jnp.int32(step))):
      for shard in array.addressable_shards:
        first = shard.index[0].indices(8)[0]
        for row, values in enumerate(np.asarray(shard.data), first):
          digests.setdefault(str(8 * step + row), hashlib.sha1()).update(values.tobytes())
  program = draw.as_text()
  print(json.dumps({
      'digests': {at: digest.hexdigest() for at, digest in digests.items()},
      'collectives': sorted(set(re.findall(
          r' (all-gather|all-to-all|all-reduce|reduce-scatter|collective-permute)[\\w-]*\\(',
          program))),
      'bytes_in': max(int(np.prod([int(n) for n in shape.split(',')])) for shape in
                      re.findall(r'u8\\[([\\d,]+)\\]', program)),
      'held': data.images.nbytes // count,
      'batch': 8 * data.images.nbytes // len(data.images)}))
"""


def digests_of(processes):
  with socket.socket() as free:
    free.bind(('localhost', 0))
    port = free.getsockname()[1]
  environment = {**os.environ, 'JAX_PLATFORMS': 'cpu', 'PYTHONPATH': os.pathsep.join(
      [str(TESTS.parent), str(TESTS / 'device_data'), str(TESTS)])}
  started = [subprocess.Popen(
      [sys.executable, '-c', PROGRAM, str(TESTS), str(number), str(processes), str(port)],
      env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
      for number in range(processes)]
  finished = [process.communicate(timeout=HANG_SECONDS) for process in started]
  assert not any(p.returncode for p in started), '\n'.join(errors for _, errors in finished)
  return [json.loads(line) for output, _ in finished for line in output.splitlines()
          if line.startswith('{')]


@pytest.mark.slow
def test_any_number_of_devices_and_processes_draws_the_same():
  one, eight, grid = digests_of(1)
  assert len(one['digests']) == 48
  assert one['digests'] == eight['digests'] == grid['digests']
  first, second = digests_of(2)
  assert first['digests'] | second['digests'] == one['digests']
  # Devices only exchange rows of the batch.
  assert eight['collectives'] == grid['collectives'] == ['all-to-all']
  assert eight['bytes_in'] <= max(eight['held'], eight['batch'])
  assert eight['held'] < one['held'] / 6


def test_loading_keeps_one_copy():
  source = build_source({'name': 'synthetic_shapes', 'num_images': 4, 'image_size': 48})
  data = dataset.load(source, spec_of(source, batch_size=4), sharding.data_mesh())
  before = data.images.unsafe_buffer_pointer()
  images = np.zeros((2, 48, 48, 3), np.uint8)
  ground_truth = jax.tree.map(lambda a: a[:2], (data.boxes.reshape(-1, 8, 4), *data[3:]))
  after = dataset._insert(data, images, np.zeros((2, 2), np.int32),
                           dataset.GroundTruth(*ground_truth), 2)
  assert data.images.is_deleted() and after.images.unsafe_buffer_pointer() == before
  assert np.asarray(after.images[:2]).any() and not np.asarray(after.images[2:]).any()


def final_state(workdir):
  run = open_run(workdir)
  with run.checkpoints(read_only=True) as checkpoints:
    state = checkpoints.restore(
        abstract_state(run.detector(), run.optimizer(), sharding.data_mesh()),
        checkpoints.latest())
  return jax.device_get(state)


@pytest.fixture(scope='module')
def undisturbed(tmp_path_factory):
  workdir = tmp_path_factory.mktemp('undisturbed')
  train_job.train(resident_config(), workdir)
  return workdir


@pytest.mark.slow
def test_an_interrupted_run_ends_with_the_same_bits(undisturbed, tmp_path, interrupted_after):
  with interrupted_after(4):
    train_job.train(resident_config(), tmp_path)
  train_job.train(resident_config(), tmp_path)
  ours, theirs = final_state(tmp_path), final_state(undisturbed)
  jax.tree.map(np.testing.assert_array_equal, ours, theirs)
  assert int(ours.step) == 6


@pytest.mark.slow
def test_no_step_waits_for_data(undisturbed):
  lines = [json.loads(line) for line in (undisturbed / 'metrics.jsonl').read_text().splitlines()]
  assert lines and all(line['train/data_wait'] < 0.01 for line in lines)
  assert all(np.isfinite(line['train/loss']) for line in lines)


def test_data_that_do_not_fit_are_rejected_before_anything_is_written(tmp_path, monkeypatch):
  monkeypatch.setattr(dataset, 'available_memory', lambda: 3_000_000)
  with pytest.raises(InputError) as error:
    train_job.train(resident_config(), tmp_path)
  message = str(error.value)
  assert re.search(r'10 images of 80 px take 0\.00\d* GB on each of 1 device ', message), message
  assert 'but 0.003 GB are free' in message and '\n' not in message
  assert not list(tmp_path.iterdir())


def test_free_memory_of_a_device_with_its_own():
  class Device:
    def memory_stats(self):
      return {'bytes_limit': 16_000, 'bytes_in_use': 1_000}

  assert dataset._free_memory(Device()) == 15_000


@pytest.mark.parametrize('change, message', [
    ({'data.resident.size': -1}, 'data.resident.size is -1'),
    ({'data.transforms': ({'name': 'mosaic', 'size': 64},)},
     "'mosaic' is not available on the device"),
    ({'train.steps': 2**31}, 'train.steps=2147483648 must be at least 1 and below'),
    ({'train.steps': 2**31 - 1}, 'more than 2\\*\\*32 images')])
def test_unsupported_options_are_rejected_at_once(change, message, tmp_path):
  config = resident_config().unlock()
  config.update_from_flattened_dict(change)
  with pytest.raises(InputError, match=message):
    train_job.train(config.lock(), tmp_path)
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('file', CONFIGS, ids=lambda f: f.stem)
def test_every_config_has_the_flags(file):
  config = load_config(str(file), ['--config.data.resident.enabled=True',
                                   '--config.data.resident.size=320'])
  assert config.data.resident.enabled is True and config.data.resident.size == 320
  assert 'name' in config.data.train and 'resident' not in config.data.train


def test_configs_without_the_options_train_from_the_host():
  config = tiny_config().unlock()
  config.data.train = {'name': 'synthetic_shapes', 'num_images': 4, 'image_size': 64}
  source = build_source(config.data.train.to_dict())
  pipeline = input_pipeline.build_input_pipeline(config, source, sharding.data_mesh())
  assert isinstance(pipeline, input_pipeline.HostPipeline)
