"""Installs this repository in a notebook's session, such as Colab's, and checks what came of it.

Only the standard library is imported: the rest may be replaced here.
"""

import glob
import os
import pathlib
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from importlib import metadata

ROOT = pathlib.Path(__file__).resolve().parents[2]

# Packages that a session may have loaded before, by the name that they are imported by.
MODULES = {'numpy': 'numpy', 'PIL': 'pillow', 'jax': 'jax', 'jaxlib': 'jaxlib', 'scipy': 'scipy',
           'google.protobuf': 'protobuf', 'ml_dtypes': 'ml_dtypes', 'matplotlib': 'matplotlib',
           'cv2': 'opencv-python-headless', 'flax': 'flax', 'optax': 'optax', 'psutil': 'psutil'}


def prepare() -> None:
  """Installs the repository, restarts the session once if that is necessary, and checks JAX.

  Raises:
    RuntimeError: If JAX does not see the accelerator of this machine.
  """
  there, cuda = accelerator()
  install(there, cuda)
  if stale := stale_modules(sys.modules, installed_versions()):
    restart(stale)
  found = jax_backend()
  check_backend(there, found)
  print(f'ppn_jax is ready, on {there}')


def accelerator() -> tuple[str, int]:
  """Returns 'gpu', 'tpu' or 'cpu', and the CUDA version that a GPU's driver can run, else 0."""
  try:
    answer = subprocess.run(['nvidia-smi'], capture_output=True, text=True, check=True).stdout
    match = re.search(r'CUDA Version: *(\d+)', answer)
    return 'gpu', int(match[1]) if match else 0
  except (OSError, subprocess.CalledProcessError):
    pass
  chips = glob.glob('/dev/accel*') or glob.glob('/dev/vfio/[0-9]*')
  return ('tpu' if chips else 'cpu'), 0


def install(there: str, cuda: int) -> None:
  """Installs the repository and JAX for an accelerator; removes plugins that no longer fit."""
  wanted = [f'{ROOT}[{extras(there, cuda)}]']
  if there == 'gpu' and cuda < 13:
    wanted.append('jax[cuda12]')  # The extra `gpu` is for drivers of CUDA 13.
  print(f'installing {" and ".join(wanted)}', flush=True)
  pip('install', '-e', *wanted)
  if leftover := leftover_plugins(installed_versions(), cuda if there == 'gpu' else 0):
    print(f'removing {", ".join(leftover)}, which do not fit this JAX or this machine', flush=True)
    pip('uninstall', '--yes', *leftover)


def extras(there: str, cuda: int) -> str:
  """Returns the extras to install."""
  return 'gcs,tpu' if there == 'tpu' else 'gcs,gpu' if there == 'gpu' and cuda >= 13 else 'gcs'


def pip(*arguments: str) -> None:
  """Runs pip of this session's Python."""
  subprocess.run([sys.executable, '-m', 'pip', '--quiet', '--disable-pip-version-check',
                  *arguments], check=True)


def installed_versions() -> dict[str, str]:
  """Returns {package: version}, as it is now on disk."""
  return {found.metadata['Name'].lower().replace('_', '-'): found.version
          for found in metadata.distributions() if found.metadata['Name']}


def leftover_plugins(installed: Mapping[str, str], cuda: int) -> list[str]:
  """Returns plugins of JAX for GPUs that are of another version, or for another CUDA.

  With one of them JAX warns at best; at worst it takes the CPU, or does not start.

  Args:
    installed: {package: version}.
    cuda: version that the driver can run; 0 without a GPU.
  """
  kept = f'jax-cuda{min(max(cuda, 12), 13)}-'
  return sorted(name for name, version in installed.items()
                if re.fullmatch(r'jax-cuda\d+-(plugin|pjrt)', name)
                and not (cuda and name.startswith(kept) and version == installed.get('jax')))


def stale_modules(loaded: Mapping[str, object], installed: Mapping[str, str]) -> list[str]:
  """Returns what the session has loaded in another version than the one that is installed now."""
  stale = []
  for module, package in MODULES.items():
    version = getattr(loaded.get(module), '__version__', None)
    now = installed.get(package.lower().replace('_', '-'))
    if version and now and version != now:
      stale.append(f'{package} {version} (now {now})')
  return stale


def restart(stale: list[str]) -> None:
  """Restarts the session, whose front end starts a new one; only once.

  Raises:
    RuntimeError: If it has been restarted for the same reason.
  """
  marker = pathlib.Path(tempfile.gettempdir()) / 'ppn_jax_restarted'
  what = ', '.join(stale)
  if marker.exists() and marker.read_text() == what:
    raise RuntimeError(f'the session still has {what} loaded after a restart; restart it by hand')
  marker.write_text(what)
  print(f'the session had loaded {what}; it restarts now, once. Run this cell again.', flush=True)
  os.kill(os.getpid(), signal.SIGKILL)


def jax_backend() -> str:
  """Returns the platform that JAX finds, 'cpu', 'gpu' or 'tpu', or why it finds none.

  It is asked in another process, which ends: a TPU belongs to one process at a time, and the
  notebook's commands need it. If this session has it already, the session is asked.
  """
  bridge = sys.modules.get('jax._src.xla_bridge')
  if bridge and bridge.backends_are_initialized():
    return sys.modules['jax'].default_backend()
  code = 'import jax; print(jax.default_backend())'
  result = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
  return (result.stdout or result.stderr or 'nothing').strip().splitlines()[-1]


def check_backend(there: str, found: str) -> None:
  """Raises RuntimeError unless JAX uses the accelerator of this machine."""
  if found != there:
    raise RuntimeError(
        f'this machine has a {there.upper()}, but JAX finds: {found}. Training would be many times '
        'slower. Restart the session and run this cell again; if a TPU is in use by another '
        'notebook of this session, end that one first')


if __name__ == '__main__':
  prepare()
