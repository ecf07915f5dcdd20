"""Settings of libraries for processes that belong to `ppn`.

They are global, so commands make them, not the library code that others call.
"""

import functools
import logging
import os
import sys
import warnings
from typing import Any


def quiet_libraries() -> None:
  """Keeps libraries from writing to stderr and from starting threads of their own."""
  import absl.logging  # noqa: F401 (its logger must exist before it is named here)

  # Orbax logs routine events as warnings, and asyncio logs errors with tracebacks that Orbax also
  # raises. Real failures are raised, so nothing is lost.
  for name in ('absl', 'asyncio'):
    logging.getLogger(name).setLevel(logging.CRITICAL)
  # Google's clients announce the end of support for Python versions. Pillow warns of large images,
  # which are checked by us, and of metadata, which is not used.
  warnings.filterwarnings('ignore', category=FutureWarning, module=r'google\.')
  warnings.filterwarnings('ignore', module=r'PIL\.')
  # OpenCV reads these when it is imported. Its threads would compete with the input workers.
  os.environ.setdefault('OPENCV_FOR_THREADS_NUM', '1')
  os.environ.setdefault('OPENCV_LOG_LEVEL', 'SILENT')
  _ignore_orbax_threads()


@functools.cache
def _ignore_orbax_threads() -> None:
  """Hides exceptions of Orbax's threads that nobody waits for; others are reported as before."""
  report = sys.unraisablehook

  def hook(unraisable: Any) -> None:
    # If several files cannot be written, the first failure ends the event loop that the threads
    # of the others respond to. If several cannot be read, one is raised and the others end here.
    code = getattr(unraisable.object, 'cr_code', None)
    is_orbax = code is not None and 'orbax' in code.co_filename
    if not is_orbax and str(unraisable.exc_value) != 'Event loop is closed':
      report(unraisable)

  sys.unraisablehook = hook
