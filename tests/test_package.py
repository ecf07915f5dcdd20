"""Tests what `import ppn_jax` offers."""

import subprocess
import sys
from importlib import metadata

import pytest

import ppn_jax
from ppn_jax.jobs.evaluate import evaluate
from ppn_jax.jobs.train import train


def test_the_public_names():
  assert ppn_jax.train is train and ppn_jax.evaluate is evaluate
  assert {*ppn_jax.__all__} == {*ppn_jax._PUBLIC, '__version__'} <= {*dir(ppn_jax)}
  assert all(getattr(ppn_jax, name) for name in ppn_jax.__all__)
  with pytest.raises(AttributeError, match="no attribute 'trian'"):
    _ = ppn_jax.trian


def test_importing_it_imports_nothing_heavy():
  code = ('import sys, ppn_jax; ppn_jax.__version__; ppn_jax.InputError\n'
          "assert not {'jax', 'numpy', 'cv2', 'ml_collections'} & {*sys.modules}")
  subprocess.run([sys.executable, '-c', code], check=True)


def test_the_version(monkeypatch):
  def not_installed(name):
    raise metadata.PackageNotFoundError(name)

  monkeypatch.setattr(metadata, 'version', not_installed)
  assert ppn_jax.__version__ == '0+not.installed'
