"""Annotations that take long to collect: once, by the first process, for all starts."""

import hashlib
import logging
import os
from collections.abc import Callable

import jax

from ppn_jax import storage
from ppn_jax.data.sources import scans
from ppn_jax.distributed import coordination

logger = logging.getLogger(__name__)


class SharedScans:
  """Hands out what the first process scans, and keeps it in the workdir; see `scans.kept_by`.

  All processes build the same sources in the same order.

  Args:
    workdir: Folder of the run; nothing is written there before `save`.
  """

  def __init__(self, workdir: str | os.PathLike):
    self._folder = storage.folder_path(workdir) / 'scans'
    self._used: dict[str, bytes] = {}
    self._new: set[str] = set()

  def __call__(self, key: Callable[[], str], scan: Callable[[], bytes]) -> bytes:
    """Returns the bytes of a key, in all processes those of the first."""
    if jax.process_index():
      return coordination.broadcast(b'')
    name = f'{hashlib.sha256(key().encode()).hexdigest()[:32]}.npz'
    data = self._read(name)
    if data is None:
      data = scan()
      self._new.add(name)
    self._used[name] = data
    return coordination.broadcast(data)

  def save(self, *, replace: bool = True) -> None:
    """Keeps the scans for later starts; for the first process.

    A workdir that cannot be written is reported by whatever else is written there.

    Args:
      replace: removes the scans of other data, if any is new. An evaluation, which reads one of
        the splits alone, must not.
    """
    try:
      for name in self._new:
        storage.write_bytes(self._folder / name, self._used[name])
      if self._new and replace:
        for path in self._folder.glob('*.npz'):
          if path.name not in self._used:
            path.unlink(missing_ok=True)
    except OSError as e:
      logger.warning(f'{self._folder} cannot be written ({e}); the next start scans the data again')

  def _read(self, name: str) -> bytes | None:
    """Returns a kept scan, None if there is none or it is damaged."""
    try:
      data = storage.read_bytes(self._folder / name)
      scans.decode(data)
      return data
    except Exception:  # A scan takes longer, but is always possible.
      return None
