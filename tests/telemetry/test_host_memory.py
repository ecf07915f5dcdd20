"""Reuse of freed memory on CPUs, and how the platform is foreseen."""

import ctypes
import os
import subprocess
import sys

import pytest

from ppn_jax.telemetry import host_memory

# Each call of the function needs a temporary buffer of 64 MB, 16,000 pages. The last calls count:
# aligned buffers do not fit the gaps that the first ones leave, until the heap is large enough.
_FAULTS_OF_CALLS = """
import resource
import sys
from ppn_jax.telemetry.host_memory import keep_freed_memory
if 'first' in sys.argv:
  keep_freed_memory()
import jax
import jax.numpy as jnp
jax.devices()
function = jax.jit(lambda x: jnp.flip(jax.lax.optimization_barrier(
    jnp.sin(x)[:, None] + jnp.ones((1, 4096))), 1).max())
x = jnp.arange(4096.0)
faults = []
for _ in range(80):
  before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
  function(x).block_until_ready()
  faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(sorted(faults[-20:])[10])
"""


def _has_glibc() -> bool:
  return sys.platform == 'linux' and hasattr(ctypes.CDLL(None), 'gnu_get_libc_version')


@pytest.mark.skipif(not _has_glibc(), reason='other C libraries have no such settings')
def test_temporary_buffers_of_calls_are_the_same_memory():
  def faults(*args):
    return int(subprocess.run(
        [sys.executable, '-c', _FAULTS_OF_CALLS, *args], check=True, text=True,
        stdout=subprocess.PIPE, env=os.environ | {'JAX_PLATFORMS': 'cpu'}).stdout)

  usual = faults()
  assert faults('first') < usual / 10


@pytest.mark.parametrize('platforms, expected', [
    ('cpu', True), ('cpu,cuda', True), ('tpu,cpu', False), ('cuda', False)])
def test_the_platform_that_the_environment_names(monkeypatch, platforms, expected):
  monkeypatch.setenv('JAX_PLATFORMS', platforms)
  assert host_memory.expects_cpu() is expected


def test_a_plugin_for_an_accelerator_is_no_cpu(monkeypatch, tmp_path):
  monkeypatch.setenv('JAX_PLATFORMS', '')
  monkeypatch.setattr(host_memory.importlib.util, 'find_spec', lambda name: None)
  monkeypatch.setattr(host_memory.metadata, 'entry_points', lambda group: ())
  assert host_memory.expects_cpu()
  monkeypatch.setattr(host_memory.importlib.util, 'find_spec',
                      lambda name: 'found' if name == 'libtpu' else None)
  assert not host_memory.expects_cpu()


# Of a command that starts a thread, before and after which the number of pools is printed.
_POOLS_OF_COMMAND = """
import ctypes, os, re, sys, tempfile, threading
from ppn_jax.cli import main, train

def run(args):
  buffers = []
  for _ in range(8):
    thread = threading.Thread(target=lambda: buffers.append(bytes(1000)))
    thread.start()
    thread.join()
  libc = ctypes.CDLL(None)
  libc.fopen.restype = ctypes.c_void_p
  path = os.path.join(tempfile.mkdtemp(), 'info')
  file = ctypes.c_void_p(libc.fopen(path.encode(), b'w'))
  libc.malloc_info(0, file)
  libc.fclose(file)
  print(len(re.findall('<heap nr', open(path).read())))
  return 0

train.run = run
sys.exit(main.main(['train', '--config=quickstart', '--workdir=unused']))
"""


@pytest.mark.skipif(not _has_glibc(), reason='other C libraries have no such settings')
def test_threads_of_a_command_share_one_pool():
  found = subprocess.run([sys.executable, '-c', _POOLS_OF_COMMAND], check=True, text=True,
                         stdout=subprocess.PIPE, env=os.environ | {'JAX_PLATFORMS': 'cpu'}).stdout
  assert found == '1\n'
