"""The cache of compiled programs gives the same bits, whatever happens to its folder."""

import json
import os
import subprocess
import sys

import pytest

from ppn_jax.distributed import compile_cache

PROGRAM = """
import json, logging, os, sys, warnings
import jax, jax.numpy as jnp
from ppn_jax.distributed import compile_cache
hits = []
jax.monitoring.register_event_listener(lambda name, **_: hits.append(name.rpartition('/')[2]))
messages, handler = [], logging.Handler()
handler.emit = lambda record: messages.append(record.getMessage())
logging.getLogger('ppn_jax').addHandler(handler)
compile_cache.MAX_BYTES = int(sys.argv[1])
if 'WORKDIR' in os.environ:
  compile_cache._are_on_several_hosts = lambda: True
folder = compile_cache.keep_compiled_programs(os.environ.get('WORKDIR', ''))
sums = []
with warnings.catch_warnings(record=True) as warned, compile_cache.CacheUse() as use:
  for size in map(int, sys.argv[2:]):
    x = jnp.linspace(0, 1, size * size).reshape(size, size)
    sums.append(float(jax.jit(lambda x: jnp.sin(x @ x).sum())(x)))
print(json.dumps({'folder': folder and str(folder), 'messages': messages, 'sums': sums,
                  'hits': hits.count('cache_hits'), 'misses': hits.count('cache_misses'),
                  'use': str(use),
                  'warned': [str(w.message) for w in warned]}))
"""


def start(home, *sizes, limit=1 << 30, **environment):
  inherited = {k: v for k, v in os.environ.items() if not k.startswith('JAX_')}
  return subprocess.Popen(
      [sys.executable, '-c', PROGRAM, str(limit), *map(str, sizes)], text=True,
      stdout=subprocess.PIPE, stderr=subprocess.PIPE,
      env=inherited | {'JAX_PLATFORMS': 'cpu', 'XDG_CACHE_HOME': str(home),
                       'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0', **environment})


def result(process):
  out, err = process.communicate()
  assert process.returncode == 0 and not err, err
  return json.loads(out)


def programs(folder):
  return {path for path in folder.rglob('*-cache')}


@pytest.mark.slow
def test_second_start_reuses_programs_with_the_same_bits(tmp_path):
  first = result(start(tmp_path, 20))
  assert first['hits'] == 0 < first['misses'] and not first['messages'] + first['warned']
  assert first['folder'].startswith(str(tmp_path / 'ppn_jax' / 'compiled'))
  second = result(start(tmp_path, 20))
  assert second['misses'] == 0 and second['hits'] == first['misses']
  assert second['sums'] == first['sums']

  # A kill while programs were written: the bytes are cut, and the time is not there.
  for path in programs(tmp_path):
    path.write_bytes(path.read_bytes()[:50])
    path.with_name(path.name.removesuffix('-cache') + '-atime').unlink()
  third = result(start(tmp_path, 20))
  assert third['misses'] == first['misses'] and third['sums'] == first['sums']
  assert not third['warned'] and min(p.stat().st_size for p in programs(tmp_path)) > 50


@pytest.mark.slow
def test_several_hosts_share_a_folder_in_the_workdir(tmp_path):
  """Nothing but programs is written there, as a bucket needs: no locks and no times of use."""
  first, second = (result(start(tmp_path / 'home', 20, WORKDIR=f'{tmp_path}/run'))
                   for _ in range(2))
  assert first['folder'].startswith(f'{tmp_path}/run/compiled/')
  assert not (tmp_path / 'home').exists()
  assert first['use'] == (f'compiled programs: 0 found in {first["folder"]}, '
                          f'{first["misses"]} added')
  assert second['use'] == (f'compiled programs: {first["misses"]} found in {first["folder"]}, '
                           '0 added')
  files = [path for path in (tmp_path / 'run').rglob('*') if path.is_file()]
  assert {*files} == programs(tmp_path) and len(files) == first['misses'] > 0


def test_one_host_keeps_its_own_folder():
  assert not compile_cache._are_on_several_hosts()


@pytest.mark.slow
def test_processes_share_the_cache_within_its_bounds(tmp_path):
  limit = 30_000
  sizes = range(20, 26)
  found = [result(p) for p in [start(tmp_path, *sizes, limit=limit) for _ in range(2)]]
  assert found[0]['sums'] == found[1]['sums']
  assert not any(f['messages'] + f['warned'] for f in found)
  size = sum(path.stat().st_size for path in programs(tmp_path))
  assert limit / 3 < size <= limit
  assert sum(f['misses'] for f in found) > len(programs(tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize('environment, kept', [
    ({'JAX_COMPILATION_CACHE_DIR': '{tmp}/mine'}, True), ({'JAX_COMPILATION_CACHE_DIR': ''}, False),
    ({'JAX_ENABLE_COMPILATION_CACHE': 'false'}, False)])
def test_jax_settings_take_precedence(tmp_path, environment, kept):
  environment = {k: v.format(tmp=tmp_path) for k, v in environment.items()}
  found = result(start(tmp_path / 'home', 20, **environment))
  assert found['folder'] is None and not found['messages'] and not (tmp_path / 'home').exists()
  assert bool(programs(tmp_path)) == kept


def test_an_unusable_folder_is_reported_in_one_line(tmp_path):
  (tmp_path / 'file').write_text('')
  found = result(start(tmp_path / 'file', 20))
  assert found['folder'] is None and len(found['sums']) == 1
  messages, = found['messages']
  assert str(tmp_path / 'file') in messages and 'JAX_COMPILATION_CACHE_DIR' in messages
  assert '\n' not in messages
