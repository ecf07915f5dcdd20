"""What all tests share."""

import os
import pathlib
import sys

import pytest

os.environ.setdefault('JAX_PLATFORMS', 'cpu')
# Programs here compile for seconds and run for milliseconds. `make test-all` keeps XLA's own choices.
os.environ.setdefault('XLA_FLAGS', '--xla_backend_optimization_level=0 '
                      '--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1')
os.environ.setdefault('NO_GCE_CHECK', 'true')  # Whatever machine this is, nobody takes it away.
sys.path.insert(0, str(pathlib.Path(__file__).parent))  # For tiny.py.


@pytest.fixture(scope='session', autouse=True)
def compilation_cache(tmp_path_factory, worker_id):
  """Keeps compiled programs for the session, for all workers and child processes: many tests train
  the same tiny model."""
  base = tmp_path_factory.getbasetemp()
  folder = (base if worker_id == 'master' else base.parent) / 'compiled'
  import jax
  for name, value in [
      ('jax_compilation_cache_dir', str(folder)),
      ('jax_persistent_cache_min_compile_time_secs', 0.1),
      ('jax_compilation_cache_max_size', 4 << 30)]:  # With a bound JAX locks the folder.
    os.environ[name.upper()] = str(value)
    jax.config.update(name, value)


@pytest.fixture
def float64():
  """Turns on JAX's 64-bit types for one test."""
  import jax
  jax.config.update('jax_enable_x64', True)
  yield
  jax.config.update('jax_enable_x64', False)


@pytest.fixture(scope='session')
def shared() -> pathlib.Path:
  """The folder of real images and reference arrays. Without it tests are skipped, unless
  PPN_REQUIRE_SHARED is set."""
  default = pathlib.Path(__file__).resolve().parents[2] / 'shared'
  folder = pathlib.Path(os.environ.get('PPN_SHARED', default))
  if not (folder / 'golden').is_dir():
    message = f'no reference data at {folder}; set PPN_SHARED to its folder'
    if os.environ.get('PPN_REQUIRE_SHARED'):
      pytest.fail(message)
    pytest.skip(message)
  return folder
