"""Tests the wheel in an environment that has the dependencies, but no clone."""

import os
import pathlib
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from importlib import metadata

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
SETUPTOOLS = 77  # The version that pyproject.toml asks for.

# A quickstart of seconds.
SMALL = ('--config.train.steps=5', '--config.train.batch_size=4', '--config.train.log_every=5',
         '--config.train.checkpoint_every=5', '--config.train.evaluate_every=5',
         '--config.model.image_size=64', '--config.model.neck.num_levels=3',
         '--config.model.backbone.depth_multiplier=0.25', '--config.model.head.depth=16',
         '--config.data.eval.num_images=8')


def call(*command, **options):
  done = subprocess.run([str(part) for part in command], capture_output=True, text=True,
                        check=False, **options)
  assert done.returncode == 0, done.stderr
  return done.stdout


@pytest.fixture(scope='module')
def wheel(tmp_path_factory):
  """The wheel of a copy of the tree: builds in a clone leave files that the next one picks up."""
  if int(metadata.version('setuptools').partition('.')[0]) < SETUPTOOLS:
    pytest.skip(f"setuptools is older than {SETUPTOOLS}; pip install -e '.[dev]'")
  folder = tmp_path_factory.mktemp('wheel')
  source = folder / 'source'
  for name in ('ppn_jax', 'configs'):
    shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns('__pycache__'))
  for name in ('pyproject.toml', 'setup.py', 'requirements.txt', 'README.md', 'LICENSE'):
    shutil.copy(ROOT / name, source)
  call(sys.executable, '-m', 'pip', 'wheel', source, '--no-deps', '--no-build-isolation',
       '--disable-pip-version-check', f'--wheel-dir={folder}')
  path, = folder.glob('*.whl')
  return path


@pytest.fixture(scope='module')
def environment(wheel, tmp_path_factory):
  """A virtual environment with the wheel, and the dependencies of this one by a path file."""
  folder = tmp_path_factory.mktemp('environment')
  venv.create(folder, with_pip=True)
  call(folder / 'bin' / 'python', '-m', 'pip', 'install', '--no-deps', '--no-index',
       '--disable-pip-version-check', wheel)
  packages = call(folder / 'bin' / 'python', '-c',
                  "import sysconfig; print(sysconfig.get_path('purelib'))").strip()
  # A folder on the path by this file comes last, and path files in it are not read: an editable
  # install of this package there has no effect.
  others = dict.fromkeys(sysconfig.get_path(kind) for kind in ('purelib', 'platlib'))
  (pathlib.Path(packages) / 'dependencies.pth').write_text('\n'.join(others) + '\n')
  return folder


def outside(folder):
  """Returns the arguments of a process in `folder` that finds no clone."""
  kept = {key: value for key, value in os.environ.items() if key != 'PYTHONPATH'}
  return {'cwd': folder, 'env': kept | {'JAX_PLATFORMS': 'cpu'}}


@pytest.mark.slow
def test_the_wheel_has_configs_and_templates(wheel):
  names = set(zipfile.ZipFile(wheel).namelist())
  configs = {f'ppn_jax/configs/{path.name}' for path in (ROOT / 'configs').glob('*.py')}
  templates = {str(path.relative_to(ROOT)) for path in ROOT.glob('ppn_jax/**/*.html')}
  modules = {str(path.relative_to(ROOT)) for path in ROOT.glob('ppn_jax/**/*.py')}
  assert len(configs) > 10 and templates
  assert configs | templates | modules | {'ppn_jax/py.typed'} <= names
  assert not any(name.startswith(('tests/', 'configs/', 'benchmarks/')) for name in names)


@pytest.mark.slow
def test_the_installed_package_trains_outside_a_clone(environment, tmp_path):
  here = outside(tmp_path)
  code = 'import ppn_jax, ppn_jax.configs.own_data as c; print(ppn_jax.__file__); print(c.__file__)'
  found = call(environment / 'bin' / 'python', '-c', code, **here).split()
  assert len(found) == 2 and all(line.startswith(f'{environment}{os.sep}') for line in found)
  ppn = environment / 'bin' / 'ppn'
  call(ppn, 'train', '--config=quickstart', '--workdir=run', *SMALL, **here)
  assert (tmp_path / 'run' / 'checkpoints' / '5').is_dir()
  call(ppn, 'evaluate', '--workdir=run', '--report', **here)
  assert (tmp_path / 'run' / 'evaluation' / '5' / 'report.html').is_file()
