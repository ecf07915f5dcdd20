"""Settings of libraries for processes that belong to `ppn`.

They are global, so that commands make them, not the library code that others call.
"""

import functools
import logging
import sys
from typing import Any


@functools.cache
def quiet_libraries() -> None:
  """Keeps libraries from writing to stderr what a command reports itself, or users need not know.

  Orbax logs routine events as warnings, and asyncio logs errors with tracebacks that Orbax also
  raises. Real failures are raised, so nothing is lost.
  """
  for name in ('absl', 'asyncio'):
    logging.getLogger(name).setLevel(logging.CRITICAL)
  report = sys.unraisablehook

  def hook(unraisable: Any) -> None:
    # If several files cannot be written, the first error closes the event loop that the threads of
    # the others report to. If several cannot be read, one error is raised, and the coroutines of
    # the others end here.
    code = getattr(unraisable.object, 'cr_code', None)
    is_orbax = code is not None and 'orbax' in code.co_filename
    if not is_orbax and str(unraisable.exc_value) != 'Event loop is closed':
      report(unraisable)

  sys.unraisablehook = hook
