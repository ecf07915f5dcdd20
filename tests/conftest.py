"""Fixtures and settings of all tests."""

import contextlib
import functools
import json
import os
import pathlib
import re
import sys

import pytest

os.environ.setdefault('JAX_PLATFORMS', 'cpu')
# Test programs compile for seconds and run for milliseconds, so XLA optimises little; the slow
# tests of `make test-all` keep its defaults.
os.environ.setdefault('XLA_FLAGS', '--xla_backend_optimization_level=0 '
                                   '--xla_cpu_use_fusion_emitters=false '
                                   '--xla_cpu_parallel_codegen_split_count=1')
# Keeps tests from asking a cloud's metadata server whether this machine is preempted.
os.environ.setdefault('NO_GCE_CHECK', 'true')
sys.path.insert(0, str(pathlib.Path(__file__).parent))  # For tiny.py.


@pytest.fixture(scope='session', autouse=True)
def compilation_cache(tmp_path_factory, worker_id):
  """Shares compiled programs among all workers and child processes of the session.

  Many tests train the same tiny model.

  Returns:
    The folder.
  """
  base = tmp_path_factory.getbasetemp()
  folder = (base if worker_id == 'master' else base.parent) / 'compiled'
  import jax
  for name, value in [
      ('jax_compilation_cache_dir', str(folder)),
      ('jax_persistent_cache_min_compile_time_secs', 0.1),
      ('jax_compilation_cache_max_size', 4 << 30)]:  # With a bound JAX locks the folder.
    os.environ[name.upper()] = str(value)
    jax.config.update(name, value)
  return folder


@pytest.fixture(scope='module', autouse=True)
def complete_programs(compilation_cache):
  """Keeps the cache in use after tests that kill processes, which may be writing to it."""
  from ppn_jax.distributed import compile_cache
  if compilation_cache.is_dir():
    compile_cache.remove_incomplete_programs(compilation_cache)


def pytest_sessionstart():
  """Makes equal configs of a process share their detector, optimizer and jitted functions.

  Tests train the same tiny models again and again, and tracing takes longer than running.
  """
  import jax

  from ppn_jax import detector, run, trained_model
  from ppn_jax.training import train_step

  def memoized(function, key_of):
    results = {}

    @functools.wraps(function)
    def wrapped(*args, **kwargs):
      key = key_of(*args, **kwargs)
      if key is None:
        return function(*args, **kwargs)
      key = key, jax.config.jax_enable_x64
      if key not in results:
        # Keeping the arguments alive keeps their ids from being reused.
        results[key] = function(*args, **kwargs), args
      return results[key][0]

    return wrapped

  def of_config(*blocks):
    def key(config, **kwargs):
      text = json.dumps([config[block].to_dict() for block in blocks], default=repr)
      # Modules that different tests write may have components of the same name.
      return None if re.search(r'"name": "[^"]*:', text) else (text, *kwargs.items())
    return key

  def of_objects(*args):
    return tuple(a if isinstance(a, jax.sharding.Mesh) else id(a) for a in args)

  run.build_detector = trained_model.build_detector = memoized(
      run.build_detector, of_config('model', 'matching', 'loss', 'postprocess'))
  run.optimizer_of = memoized(run.optimizer_of, of_config('optim'))
  for module, name in ((train_step, 'jit_init'), (train_step, 'jit_train_step'),
                       (detector, 'jit_detect')):
    setattr(module, name, memoized(getattr(module, name), of_objects))


@pytest.fixture
def float64():
  """Turns on JAX's 64-bit types for one test."""
  import jax
  jax.config.update('jax_enable_x64', True)
  yield
  jax.config.update('jax_enable_x64', False)


@pytest.fixture
def import_from(monkeypatch):
  """Returns a function that makes a folder's modules importable, until the end of the test.

  They are forgotten then, since other tests may write modules of the same names.
  """
  folders = []

  def add(folder):
    monkeypatch.syspath_prepend(folder)
    folders.append(pathlib.Path(folder))

  yield add
  for name, module in list(sys.modules.items()):
    file = getattr(module, '__file__', None)
    if file and any(folder in pathlib.Path(file).parents for folder in folders):
      del sys.modules[name]


@pytest.fixture
def log_lines():
  """Returns the lines that the package has logged in this test so far."""
  from log_lines import logged
  with logged() as lines:
    yield lines


@pytest.fixture(scope='session')
def shared() -> pathlib.Path:
  """Returns the folder of real images and reference arrays.

  Without it tests are skipped, or fail if PPN_REQUIRE_SHARED is set.
  """
  default = pathlib.Path(__file__).resolve().parents[2] / 'shared'
  folder = pathlib.Path(os.environ.get('PPN_SHARED', default))
  if not (folder / 'golden').is_dir():
    message = f'no reference data at {folder}; set PPN_SHARED to its folder'
    if os.environ.get('PPN_REQUIRE_SHARED'):
      pytest.fail(message)
    pytest.skip(message)
  return folder


@pytest.fixture
def interrupted_after(monkeypatch):
  """Returns a context in which a training must be interrupted after a step, as by Ctrl-C."""
  from ppn_jax.jobs.train_loop import TrainLoop

  @contextlib.contextmanager
  def context(step):
    report = TrainLoop._report

    def interrupt(self, reported):
      report(self, reported)
      if reported == step:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
      patch.setattr(TrainLoop, '_report', interrupt)
      with pytest.raises(KeyboardInterrupt):
        yield

  return context


@pytest.fixture
def steps_not_taken(monkeypatch):
  """Collects the states from which training would start its steps."""
  import jax

  from ppn_jax.jobs.train_loop import TrainLoop
  states = []
  monkeypatch.setattr(TrainLoop, 'run_steps', lambda self, state, *_: states.append(
      jax.device_get(state)))
  return states
