"""What to do about a step that hangs: show where all threads are, and end the run."""

import contextlib
import logging
import os
import sys

from ml_collections import ConfigDict

from ppn_jax.distributed import failures
from ppn_jax.errors import Stopped, exit_status
from ppn_jax.telemetry.run_log import RunLog
from ppn_jax.telemetry.stuck import StepWatch, stacks

logger = logging.getLogger(__name__)


def step_watch(config: ConfigDict, run_log: RunLog, *, ends: bool) -> StepWatch:
  """Returns a watch that shows the stacks of this process when one of its steps hangs.

  Args:
    config: Config of the run.
    run_log: Log of this process.
    ends: Whether to end the process then, and with it the others of the run, with exit code 1;
      otherwise it is only a warning.
  """
  def on_stuck(what: str) -> None:
    show_stacks(run_log)
    remedy = ('start again to resume from the last checkpoint; train.stuck_factor and '
              'train.stuck_seconds set the limit')
    if not ends:
      logger.warning(f'{what}; {remedy}')
      return
    error = Stopped(f'{what}; {remedy}')
    line = exit_status(error).line
    run_log.write(f'{line}\n')
    with contextlib.suppress(OSError):
      run_log.flush()
    failures.fail(error, hangs=True)
    print(line, file=sys.stderr, flush=True)  # This process works alone.
    os._exit(1)  # The main thread cannot be interrupted.

  return StepWatch(config.train.stuck_factor, config.train.stuck_seconds, on_stuck)


def show_stacks(run_log: RunLog) -> None:
  """Prints where all threads of this process are, also to its log in the workdir."""
  text = f'stacks of all threads:\n{stacks()}'
  run_log.write(text)
  with contextlib.suppress(OSError, ValueError):
    print(text, file=sys.stderr, flush=True)
  with contextlib.suppress(OSError):
    run_log.flush()
