"""Single-stage object detectors (Pooling Pyramid Network) in JAX.

  detector = ppn_jax.load('runs/mine')
  found = detector('photo.jpg', threshold=0.5)

See `ppn_jax.image_detector`. Nothing is imported before it is asked for.
"""

import importlib

_PUBLIC = {'load': 'ppn_jax.image_detector', 'ImageDetector': 'ppn_jax.image_detector',
           'ImageDetections': 'ppn_jax.image_detector', 'InputError': 'ppn_jax.errors'}
__all__ = list(_PUBLIC)


def __getattr__(name: str):
  if name not in _PUBLIC:
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
  return getattr(importlib.import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
  return sorted({*globals(), *_PUBLIC})
