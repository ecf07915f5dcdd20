"""Adapts Orbax to the checkpoint service: no device collectives, tolerance of damaged metrics."""

import contextlib
import logging
import os
import re
from collections.abc import Iterator
from typing import Any

import jax
import orbax.checkpoint as ocp

from ppn_jax import storage


@contextlib.contextmanager
def without_routine_warnings() -> Iterator[None]:
  """Drops what Orbax logs as warnings when a folder is only read, while it is opened."""
  logger = logging.getLogger('absl')

  def drop(record: logging.LogRecord) -> bool:
    return record.levelno > logging.WARNING

  logger.addFilter(drop)
  try:
    yield
  finally:
    logger.removeFilter(drop)


class Manager(ocp.CheckpointManager):
  """Orbax manager that tolerates damaged metrics and leaves preemption to the training loop.

  Attributes:
    steps_without_metrics: Steps whose metrics cannot be read.
  """

  def __init__(self, *args: Any, **options: Any):
    self.steps_without_metrics: set[int] = set()
    super().__init__(*args, **options)

  def metrics(self, step: int) -> Any:
    try:
      return storage.retried(lambda: super(Manager, self).metrics(step))
    except ValueError:
      self.steps_without_metrics.add(step)
      return None

  def reached_preemption(self, step: int) -> bool:
    # Orbax would ask JAX's service, which requires that steps rise, about steps long past.
    return False


def writer_options() -> ocp.options.MultiprocessingOptions:
  """Returns Orbax options that synchronise through the coordination service.

  Naming the active processes keeps Orbax from running device collectives, which would clash with
  those of the training step.
  """
  if jax.process_count() == 1:
    return ocp.options.MultiprocessingOptions()
  return ocp.options.MultiprocessingOptions(
      active_processes={*range(jax.process_count())}, barrier_sync_key_prefix='writers')


def reader_options() -> ocp.options.MultiprocessingOptions:
  """Returns Orbax options without barriers, so that no reader waits for one that has failed."""
  process = jax.process_index()
  return ocp.options.MultiprocessingOptions(
      primary_host=process, active_processes={process}, barrier_sync_key_prefix=f'reader_{process}')


def reason(error: Exception) -> str:
  """Returns one line that explains an error: the operating system's message if there is one."""
  if isinstance(error.__cause__, OSError) and isinstance(error, OSError) and not error.strerror:
    error = error.__cause__
  if isinstance(error, OSError) and error.strerror:
    return error.strerror
  text = ' '.join(str(error).split())
  found = re.search(r"os_error_code='(\d+)'", text)
  return os.strerror(int(found[1])) if found else text
