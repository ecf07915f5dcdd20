"""Orbax's manager as the checkpoint service needs it: without collectives."""

import os
import re
from typing import Any

import jax
import orbax.checkpoint as ocp

from ppn_jax import storage


class Manager(ocp.CheckpointManager):
  """One that opens its folder also when the figures of a step cannot be read, and that leaves
  preemption to those who count the steps.

  Attributes:
    without_figures: those steps.
  """

  def __init__(self, *args: Any, **options: Any):
    self.without_figures: set[int] = set()
    super().__init__(*args, **options)

  def metrics(self, step: int) -> Any:
    try:
      return storage.retried(lambda: super(Manager, self).metrics(step))
    except ValueError:
      self.without_figures.add(step)
      return None

  def reached_preemption(self, step: int) -> bool:
    # Orbax would ask JAX's service, for steps that are past by then; it must see them rise.
    return False


def writers() -> ocp.options.MultiprocessingOptions:
  """With barriers of the coordination service: those that are told who takes part are no
  collectives."""
  if jax.process_count() == 1:
    return ocp.options.MultiprocessingOptions()
  return ocp.options.MultiprocessingOptions(
      active_processes={*range(jax.process_count())}, barrier_sync_key_prefix='writers')


def reader() -> ocp.options.MultiprocessingOptions:
  """Without Orbax's barriers, so that no reader waits for one that failed or does not take part."""
  process = jax.process_index()
  return ocp.options.MultiprocessingOptions(
      primary_host=process, active_processes={process}, barrier_sync_key_prefix=f'reader_{process}')


def reason(error: Exception) -> str:
  """Returns one line; the operating system's own where there is one behind what led to it."""
  if isinstance(error.__cause__, OSError) and isinstance(error, OSError) and not error.strerror:
    error = error.__cause__
  if isinstance(error, OSError) and error.strerror:
    return error.strerror
  text = ' '.join(str(error).split())
  found = re.search(r"os_error_code='(\d+)'", text)
  return os.strerror(int(found[1])) if found else text
