"""Reports of errors by commands."""

import errno
import pathlib

import pytest

from ppn_jax import errors
from ppn_jax.errors import InputError, Stopped, StoreError, exit_status, install_command


class Refused(Exception):
  """Error of a bucket's client library."""


Refused.__module__ = 'google.api_core.exceptions'


@pytest.mark.parametrize('error, code, line', [
    (InputError('steps=0\nis too few'), 2, 'ppn: error: steps=0 is too few'),
    (PermissionError(errno.EACCES, 'Permission denied', '/data'), 2,
     'ppn: error: /data: Permission denied'),
    (OSError(errno.ENOSPC, 'No space left on device', '/run'), 1,
     'ppn: error: /run: No space left on device'),
    (OSError(errno.EROFS, 'Read-only file system'), 2, 'ppn: error: Read-only file system'),
    (Stopped('loss is nan'), 1, 'ppn: training stopped: loss is nan'),
    (StoreError('gs://b/x: 503'), 1, 'ppn: failed: gs://b/x: 503'),
    (Refused('503 try\nagain'), 1, 'ppn: failed: 503 try again'),
    (Refused(), 1, 'ppn: failed: Refused'),
    (KeyboardInterrupt(), 130, 'ppn: interrupted'),
    (OSError(errno.EIO, 'Input/output error'), 1, None),
    (ZeroDivisionError('a bug'), 1, None),
])
def test_one_line_or_a_traceback(error, code, line):
  assert exit_status(error) == (code, line)


def test_install_command_of_a_clone_names_its_folder():
  root = pathlib.Path(__file__).resolve().parents[1]
  assert install_command('tpu').startswith('pip install -e ')
  assert f'{root}[tpu]' in install_command('tpu')


@pytest.mark.parametrize('project', [None, 'name = "other"\n', 'dependencies = ["ppn_jax"]\n'])
def test_install_command_of_a_wheel_names_the_package(monkeypatch, tmp_path, project):
  """An installed package has no pyproject.toml beside it, or that of another project."""
  (tmp_path / 'ppn_jax').mkdir()
  if project is not None:
    (tmp_path / 'pyproject.toml').write_text(project)
  monkeypatch.setattr(errors, '__file__', str(tmp_path / 'ppn_jax' / 'errors.py'))
  assert install_command('tpu') == "pip install 'ppn_jax[tpu]'"


def test_install_command_quotes_the_folder(monkeypatch, tmp_path):
  package = tmp_path / 'my clones' / 'ppn_jax'
  package.mkdir(parents=True)
  (package.parent / 'pyproject.toml').write_text('[project]\nname = "ppn_jax"\n')
  monkeypatch.setattr(errors, '__file__', str(package / 'errors.py'))
  assert install_command('gcs') == f"pip install -e '{package.parent}[gcs]'"
