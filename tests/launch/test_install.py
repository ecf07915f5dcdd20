"""Tests of launch/notebooks/install.py, with Colab's lists of packages and without a network."""

import importlib.util
import os
import pathlib
import signal
import subprocess
import types

import pytest

PATH = pathlib.Path(__file__).resolve().parents[2] / 'launch' / 'notebooks' / 'install.py'


@pytest.fixture
def install():
  spec = importlib.util.spec_from_file_location('notebook_install', PATH)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


def versions(path):
  lines = [line.strip() for line in path.read_text().splitlines()]
  return {name.lower().replace('_', '-'): version for name, equals, version in (
      line.partition('==') for line in lines) if equals}


@pytest.fixture(params=['pip-freeze.txt', 'pip-freeze.gpu.txt', 'pip-freeze.tpu.txt'])
def image(request, shared):
  return versions(shared / 'colab' / request.param)


AFTER = {'jax': '0.10.2', 'jaxlib': '0.10.2', 'numpy': '2.4.6', 'pillow': '13.0.0'}


def test_plugins_that_an_image_leaves_behind_are_removed(install, image):
  left = [name for name in image if name.startswith('jax-cuda')]
  for cuda in (0, 12, 13):
    assert install.leftover_plugins(image | AFTER, cuda) == sorted(left)
  fitting = image | AFTER | {'jax-cuda12-plugin': '0.10.2', 'jax-cuda12-pjrt': '0.10.2'}
  assert install.leftover_plugins(fitting, 12) == []
  assert len(install.leftover_plugins(fitting, 13)) == 2  # Beside those of CUDA 13.
  assert len(install.leftover_plugins(fitting, 0)) == 2


def test_packages_that_the_kernel_has_loaded_are_found(install, image):
  loaded = {'numpy': types.SimpleNamespace(__version__=image['numpy']),
            'PIL': types.SimpleNamespace(__version__=image['pillow']), 'os': os}
  assert install.stale_modules(loaded, image) == []
  assert install.stale_modules(loaded, image | AFTER) == [
      f'numpy {image["numpy"]} (now 2.4.6)', f'pillow {image["pillow"]} (now 13.0.0)']


def test_the_session_restarts_once_and_says_so(install, tmp_path, monkeypatch, capsys):
  killed = []
  monkeypatch.setattr(install.tempfile, 'gettempdir', lambda: str(tmp_path))
  monkeypatch.setattr(install.os, 'kill', lambda *arguments: killed.append(arguments))
  install.restart(['numpy 2.1.3 (now 2.4.6)'])
  assert killed == [(os.getpid(), signal.SIGKILL)]
  assert 'numpy 2.1.3' in (said := capsys.readouterr().out) and 'Run this cell again' in said
  with pytest.raises(RuntimeError, match='restart it by hand'):
    install.restart(['numpy 2.1.3 (now 2.4.6)'])
  assert len(killed) == 1


@pytest.mark.parametrize('answer, there, wanted', [
    ('| NVIDIA-SMI 580.1  Driver Version: 580.1  CUDA Version: 13.0 |', ('gpu', 13),
     ['[gcs,gpu]']),
    ('| Driver Version: 550.54  CUDA Version: 12.4 |', ('gpu', 12), ['[gcs]', 'jax[cuda12]']),
])
def test_jax_is_that_of_the_driver(install, monkeypatch, answer, there, wanted):
  calls = []
  monkeypatch.setattr(install.subprocess, 'run', lambda command, **_: (
      calls.append(command), subprocess.CompletedProcess(command, 0, answer, ''))[1])
  assert install.accelerator() == there
  monkeypatch.setattr(install, 'installed_versions', lambda: AFTER)
  install.install(*there)
  (command,) = [c for c in calls if 'install' in c]
  assert command[-1].endswith(wanted[-1])
  assert all(any(w in part for part in command) for w in wanted)


def test_another_accelerator_than_the_machine_has_is_an_error(install):
  install.check_backend('tpu', 'tpu')
  for there, found in [('tpu', 'cpu'), ('gpu', 'cpu'), ('gpu', 'RuntimeError: Unable to ...')]:
    with pytest.raises(RuntimeError, match=f'has a {there.upper()}, but JAX finds: {found[:12]}'):
      install.check_backend(there, found)
