"""A step compiled by one process and taken by another; the devices are CPUs, at hand to both."""

import json
import pathlib
import re
import subprocess
import sys

import jax
import numpy as np
import pytest
from tiny import tiny_config

from ppn_jax.cli.main import main
from ppn_jax.distributed import sharding
from ppn_jax.errors import InputError
from ppn_jax.jobs import train as train_job
from ppn_jax.run import open_run
from ppn_jax.training import saved_step
from ppn_jax.training.train_step import abstract_state

pytestmark = pytest.mark.slow

TESTS = pathlib.Path(__file__).resolve().parents[1]

# As `ppn plan` does, but for the devices of the process.
SAVE = """
import sys
sys.path[:0] = sys.argv[1:3]
from test_saved_step import small_config
from ppn_jax.planning import estimation as planning
from ppn_jax.distributed import sharding as partition; from ppn_jax.training import saved_step
config = small_config().copy_and_resolve_references().unlock()
config.model.num_classes = 5
mesh = partition.data_mesh()
lowered = planning._lower(planning.Request(config.to_dict(), '', 4, 'train'), mesh, 1)
saved_step.save_step(sys.argv[3], lowered, lowered.compile(), mesh)
"""

CONFIG_FILE = """
import sys
sys.path[:0] = {folders!r}
from test_saved_step import small_config
def get_config():
  return small_config()
"""


def small_config():
  config = tiny_config(steps=3).copy_and_resolve_references().unlock()
  config.model.backbone.last_block, config.model.neck.stride, config.model.neck.num_levels = 3, 4, 2
  config.data.max_boxes = 9  # Not what the data would ask for.
  return config.lock()


@pytest.fixture(scope='module')
def saved(tmp_path_factory):
  """The file of another process."""
  file = tmp_path_factory.mktemp('saved') / 'step'
  subprocess.run([sys.executable, '-c', SAVE, str(TESTS), str(TESTS / 'training'), str(file)],
                 check=True, cwd=TESTS.parent)
  return file


@pytest.fixture
def config_file(tmp_path):
  file = tmp_path / 'config.py'
  file.write_text(CONFIG_FILE.format(folders=[str(TESTS), str(TESTS / 'training')]))
  return file


def final_state(workdir):
  run, mesh = open_run(workdir), sharding.data_mesh()
  with run.checkpoints(read_only=True) as checkpoints:
    return jax.device_get(checkpoints.restore(
        abstract_state(run.detector(), run.optimizer(), mesh), checkpoints.latest()))


def test_a_run_with_it_has_the_bits_of_one_that_compiles(saved, config_file, tmp_path, monkeypatch,
                                                         capsys):
  train_job.train(small_config(), tmp_path / 'compiles')

  def refuse(*arguments, **options):
    raise AssertionError('compiled')

  with monkeypatch.context() as patch:
    # Evaluation is off, and what else is compiled is jitted.
    patch.setattr(jax.stages.Lowered, 'compile', refuse)
    assert main(['train', f'--config={config_file}', f'--workdir={tmp_path / "loads"}',
                 f'--compiled_step={saved}']) == 0
  assert f'loaded the compiled step of {saved}' in ''.join(capsys.readouterr())
  a, b = final_state(tmp_path / 'compiles'), final_state(tmp_path / 'loads')
  assert int(a.step) == 3
  jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize('override, message', [
    ('train.batch_size=8', r'takes uint8\[4, 64, 64, 3\] where this run has uint8\[8, 64, 64, 3\]'),
    ('data.max_boxes=10', r'float32\[4, 9, 4\] where this run has float32\[4, 10, 4\]'),
    ('optim.momentum=0.5', 'another config or another version of the code')])
def test_another_program_is_refused(saved, config_file, tmp_path, capsys, override, message):
  assert main(['train', f'--config={config_file}', f'--config.{override}',
               f'--workdir={tmp_path / "run"}', f'--compiled_step={saved}']) == 2
  last = capsys.readouterr().err.splitlines()[-1]
  assert last.startswith('ppn: error: ')
  assert re.search(message, last), last


def changed(saved, tmp_path, **values):
  head, _, executable = saved.read_bytes().partition(b'\n')
  file = tmp_path / 'changed'
  file.write_bytes(json.dumps({**json.loads(head), **values}).encode() + b'\n' + executable)
  return file


@pytest.mark.parametrize('values, message', [
    ({'versions': {'jax': '0.0.1', 'jaxlib': '0.0.1'}}, 'compiled with jax 0.0.1, jaxlib 0.0.1, '
     f'here is jax {jax.__version__}'),
    ({'kind': 'TPU v5 lite', 'devices': [[i, i, 0, 0] for i in range(8)]},
     'compiled for 8 x TPU v5 lite, here is 1 x cpu'),
    ({'devices': [[7]]}, 'here is another arrangement of these'),
    ({'format': 'else'}, 'is not what'), ({'executable': '0'}, 'is damaged')])
def test_other_devices_and_libraries_are_refused_before_anything(saved, tmp_path, values, message):
  file = changed(saved, tmp_path, **values)
  with pytest.raises(InputError, match=message) as caught:
    train_job.train(small_config(), tmp_path / 'run', compiled_step=file)
  assert '\n' not in str(caught.value)
  assert not (tmp_path / 'run').exists()


@pytest.mark.parametrize('keep', [0, 100, 5000, -1])
def test_a_file_that_is_cut_short_is_refused(saved, tmp_path, keep):
  file = tmp_path / 'cut'
  file.write_bytes(saved.read_bytes()[:keep])
  with pytest.raises(InputError, match=r'is damaged|is not what'):
    saved_step.read_step(file, sharding.data_mesh())


@pytest.mark.parametrize('name', ['none', '.'])
def test_a_file_that_cannot_be_read_is_one_line(tmp_path, name):
  with pytest.raises(InputError, match='cannot be read: '):
    saved_step.read_step(tmp_path / name, sharding.data_mesh())
