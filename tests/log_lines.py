"""Lines that the package logs."""

import contextlib
import logging


@contextlib.contextmanager
def logged(lines=None):
  """Collects what the package logs within, at level INFO and above, in a list."""
  lines = [] if lines is None else lines
  handler, logger = logging.Handler(), logging.getLogger('ppn_jax')
  handler.emit = lambda record: lines.append(record.getMessage())
  before = logger.level
  logger.addHandler(handler)
  logger.setLevel(logging.INFO)
  try:
    yield lines
  finally:
    logger.removeHandler(handler)
    logger.setLevel(before)
