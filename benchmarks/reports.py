"""Measures what a report of the training costs with 2, 8 and 16 processes.

  python benchmarks/reports.py
  python benchmarks/reports.py --processes=2,4 --reports=50

At each report every process hands how long it waited for data to a thread, which publishes it; in
the first process the thread also looks up what all have published (`distributed.status`). No device
takes part and nobody waits. Starts so many processes on this machine, which do nothing but report
at the same time, and prints medians in milliseconds as JSON, of the training's thread ("report")
and of the work that it hands over ("thread"): elapsed time, which with more processes than cores
includes waiting for a core, and processor time.
"""

import argparse
import json
import os
import pathlib
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
  parser.add_argument('--processes', default='2,8,16', metavar='LIST')
  parser.add_argument('--reports', type=int, default=200)
  parser.add_argument('--joined', help='internal: COORDINATOR,COUNT,NUMBER')
  args = parser.parse_args()
  if args.joined:
    return run_process(*args.joined.split(','), args.reports)
  found = {count: measure(count, args.reports) for count in map(int, args.processes.split(','))}
  print(json.dumps({'benchmark': 'reports', 'reports': args.reports, 'cores': os.cpu_count(),
                    'milliseconds': found}))
  return 0


def measure(count: int, reports: int) -> dict:
  """Returns what a report costs the first of `count` processes, and the median of the others."""
  with socket.socket() as probe:
    probe.bind(('', 0))
    address = f'localhost:{probe.getsockname()[1]}'
  processes = [subprocess.Popen(
      [sys.executable, __file__, f'--joined={address},{count},{i}', f'--reports={reports}'],
      stdout=subprocess.PIPE, text=True, env={**os.environ, 'JAX_PLATFORMS': 'cpu'})
      for i in range(count)]
  outputs = [process.communicate()[0] for process in processes]
  if any(process.returncode for process in processes):
    raise SystemExit(f'exit codes {[process.returncode for process in processes]}')
  first, *others = (json.loads(output.splitlines()[-1]) for output in outputs)
  return {'first': first, 'others': {
      part: {key: round(statistics.median(other[part][key] for other in others), 4)
             for key in first[part]} for part in first}}


def run_process(coordinator: str, count: str, number: str, reports: int) -> int:
  """Joins the others, reports, and prints what a report took."""
  from ppn_jax.distributed import coordination, sharding, status
  sharding.join_processes(coordinator=coordinator, num_processes=int(count),
                          process_id=int(number), local_devices=1)

  def work(step: int) -> None:
    status.publish(data_wait=step / reports)
    if number == '0':
      status.published()

  with status.StatusExchange() as statuses:
    found = {'report': time_all(lambda step: statuses.exchange(data_wait=step / reports), reports),
             'thread': time_all(work, reports)}
  print(json.dumps(found))
  coordination.wait_for_all()
  return 0


def time_all(act: Callable[[int], object], reports: int) -> dict[str, float]:
  """Returns the milliseconds of a call, which all processes start together, and what it used."""
  from ppn_jax.distributed import coordination
  elapsed, used = [], []
  for step in range(reports):
    coordination.wait_for_all()
    started, before = time.perf_counter(), time.thread_time()
    act(step)
    elapsed.append(time.perf_counter() - started)
    used.append(time.thread_time() - before)
  return {'elapsed': round(1e3 * statistics.median(elapsed), 4),
          'processor': round(1e3 * statistics.median(used), 4)}


if __name__ == '__main__':
  sys.exit(main())
