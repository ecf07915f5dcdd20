"""Single-stage object detectors (Pooling Pyramid Network) in JAX.

  detector = ppn_jax.load('runs/mine')
  found = detector('photo.jpg', threshold=0.5)

Nothing is imported before it is used.
"""

import importlib

# Public name -> the module that defines it.
_PUBLIC = {
    'load': 'ppn_jax.image_detector', 'ImageDetector': 'ppn_jax.image_detector',
    'ImageDetections': 'ppn_jax.image_detector', 'train': 'ppn_jax.jobs.train',
    'evaluate': 'ppn_jax.jobs.evaluate', 'InputError': 'ppn_jax.errors'}
__all__ = ['load', 'ImageDetector', 'ImageDetections', 'train', 'evaluate', 'InputError',
           '__version__']
__version__: str  # Looked up when it is used, like the others.


def __getattr__(name: str):
  if name == '__version__':
    return _version()
  if name not in _PUBLIC:
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
  return getattr(importlib.import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
  return sorted({*globals(), *__all__})


def _version() -> str:
  from importlib import metadata
  try:
    return metadata.version('ppn_jax')
  except metadata.PackageNotFoundError:  # A clone on PYTHONPATH.
    return '0+not.installed'
