"""Training by two processes of this machine, as by two hosts."""

import os
import pathlib
import socket
import subprocess
import sys
import threading

from time_limits import HANG_SECONDS
from tiny import CONFIG_FILE

TESTS = pathlib.Path(__file__).resolve().parent
ROOT = TESTS.parent

# JAX does not ask the metadata server where it finds no chips.
ON_A_WORKER = '''
import os, sys
from ppn_jax.cli.main import main
import jax
del os.environ['TPU_SKIP_MDS_QUERY']
sys.exit(main(sys.argv[1:]))
'''


def train_in_two_processes(tmp_path, workdir, on_line=None, steps=400, more=(),
                           slice_of=(), environments=({}, {})):
  """Runs two processes until both end.

  Args:
    tmp_path: for the config, config.py; that of tiny.py if there is none.
    workdir: of the run.
    on_line: is called with each line of process 0, and the processes.
    steps: of the run.
    more: arguments.
    slice_of: addresses of the metadata servers of two workers of a Cloud TPU slice, by which the
      processes find each other; otherwise they are given a coordinator.
    environments: more variables of each process.

  Returns:
    The exit codes, and the output of each.
  """
  config = tmp_path / 'config.py'
  if not config.exists():
    config.write_text(CONFIG_FILE.format(folder=str(TESTS)))
  port = partition_port()
  processes = [subprocess.Popen(
      [sys.executable, *(['-c', ON_A_WORKER] if slice_of else ['-m', 'ppn_jax.cli.main']), 'train',
       f'--config={tmp_path}/config.py', f'--workdir={workdir}', f'--config.train.steps={steps}',
       '--config.train.checkpoint_every=100', '--config.train.log_every=10',
       '--config.model.backbone.last_block=3', '--config.model.neck.stride=4',
       '--config.model.neck.num_levels=2', *more, *(
           ['--distributed=auto'] if slice_of else
           [f'--coordinator=localhost:{port}', '--num_processes=2', f'--process_id={i}',
            '--local_devices=1'])],
      stderr=subprocess.PIPE, text=True, cwd=ROOT,
      env={**os.environ, 'JAX_DISABLE_MOST_OPTIMIZATIONS': '1', **(
          {'GCE_METADATA_HOST': slice_of[i], 'GCE_METADATA_IP': slice_of[i],
           'NO_GCE_CHECK': 'false', 'JAX_FORCE_TPU_INIT': '1', 'JAX_PLATFORMS': 'cpu',
           'JAX_COORDINATOR_PORT': str(port)}
          if slice_of else {}), **environments[i]}) for i in range(2)]
  of_second = []
  tail = threading.Thread(target=lambda: of_second.extend(processes[1].stderr))
  tail.start()
  lines = []
  for line in processes[0].stderr:
    lines.append(line)
    if on_line:
      on_line(line, processes)
  codes = [p.wait(timeout=HANG_SECONDS) for p in processes]
  tail.join()
  return codes, ''.join(lines), ''.join(of_second)


def partition_port():
  """Returns a free port."""
  with socket.socket() as probe:
    probe.bind(('', 0))
    return probe.getsockname()[1]
