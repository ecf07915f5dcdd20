"""Measures the time from a notice that the machine will be taken away to a saved step.

  python benchmarks/notices.py
  python benchmarks/notices.py --notices=sigterm --moments=step,evaluation --repeats=1

Trains the quickstart's model for a few steps, undisturbed and then once for each notice at each
moment. Notices are SIGTERM, and `preempted` and `upcoming-maintenance` of a stand-in for Google
Cloud's metadata server, which a run asks each second. Moments are before a step, in an evaluation
after its first batch, and in a save while it is written. The run must save and end with exit code
75. When it is started again, it must end with the same parameters as the undisturbed run, bit for
bit, and with each step evaluated once. `to_saved` is the time from the notice until the step is on
disk, `to_exit` until the process has ended, in seconds. Prints one line of JSON and exits with 1 if
anything was lost.
"""

import argparse
import contextlib
import dataclasses
import datetime
import functools
import http.client
import http.server
import json
import os
import pathlib
import signal
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / 'benchmarks'))

from chaos import Processes, checksums, evaluated_steps, newest  # noqa: E402

NOTICES = ('sigterm', 'preempted', 'maintenance')
MOMENTS = ('step', 'evaluation', 'save')
# Step that gets the notice: neither evaluated nor saved.
AT_STEP = 25
# An evaluation has to last longer than the second between two questions to the metadata server.
SCHEDULE = ('--config.train.steps=60', '--config.train.checkpoint_every=20',
            '--config.train.evaluate_every=40', '--config.train.log_every=10')


@dataclasses.dataclass
class Notices:
  """Runs in a folder.

  Attributes:
    folder: of the runs and of their compiled programs.
    flags: of `ppn train`.
    metadata: address of the stand-in for the metadata server.
    values: what it answers.
    lost: what went wrong.
  """
  folder: pathlib.Path
  flags: tuple[str, ...]
  metadata: str
  values: dict[str, str]
  lost: list[str] = dataclasses.field(default_factory=list)

  def train(self, workdir: pathlib.Path, hooked: tuple[str, ...] = (), **variables: str
            ) -> tuple[int, float]:
    """Runs `ppn train`, by way of `run_hooked` if so asked; returns its exit code and when."""
    environment = {**os.environ, 'PYTHONPATH': str(ROOT), 'NO_GCE_CHECK': 'true', **variables,
                   'JAX_COMPILATION_CACHE_DIR': str(self.folder / 'compiled'),
                   'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0.1'}
    begin = [__file__, '--hooked', *hooked] if hooked else ['-m', 'ppn_jax.cli.main']
    processes = Processes([sys.executable, *begin, 'train', '--config=quickstart',
                           f'--workdir={workdir}', *self.flags],
                          workdir.with_suffix('.log'), 1, environment)
    processes.wait(grace=60)
    return processes.codes[0], time.time()

  def give(self, notice: str, moment: str, repeat: int, whole: pathlib.Path) -> dict | None:
    """Gives a run a notice and resumes it; returns its times, None if something went wrong."""
    workdir = self.folder / f'{notice}_{moment}_{repeat}'
    events = workdir.with_suffix('.events')
    self.values.clear()
    code, ended = self.train(
        workdir, (notice, moment, str(events)),
        **({} if notice == 'sigterm' else
           {'GCE_METADATA_HOST': self.metadata, 'NO_GCE_CHECK': 'false'}))
    written = events.read_text().splitlines() if events.exists() else []
    times = {event['what']: event['time'] for event in map(json.loads, written)}
    if code != 75 or times.keys() != {'notice', 'saved'}:
      self.lost.append(f'{workdir.name}: exit code {code}, events {[*times]}')
      return None
    step = newest(workdir)
    cut_short = step not in evaluated_steps(workdir)
    again, _ = self.train(workdir)
    if again or checksums(workdir) != checksums(whole):
      self.lost.append(f'{workdir.name}: exit code {again} when resumed, or other bits')
    elif evaluated_steps(workdir) != evaluated_steps(whole):
      self.lost.append(f'{workdir.name}: evaluated {evaluated_steps(workdir)}')
    return {'saved_step': step, 'to_saved': times['saved'] - times['notice'],
            'to_exit': ended - times['notice'],
            **({'cut_short': cut_short} if moment == 'evaluation' else {})}

  def measure(self, notice: str, moment: str, repeats: int, whole: pathlib.Path) -> dict:
    """Returns the times of several runs with one notice at one moment."""
    found = [one for repeat in range(repeats)
             if (one := self.give(notice, moment, repeat, whole)) is not None]
    seconds = {key: {'median': round(statistics.median(one[key] for one in found), 2),
                     'most': round(max(one[key] for one in found), 2)}
               for key in ('to_saved', 'to_exit') if found}
    cut_short = ({'evaluations_cut_short': sum(one['cut_short'] for one in found)}
                 if moment == 'evaluation' else {})
    return {'notice': notice, 'moment': moment, 'runs': len(found),
            'saved_steps': [one['saved_step'] for one in found], **seconds, **cut_short}


def run_hooked(notice: str, moment: str, events: str, *command: str) -> int:
  """Runs `ppn` in this process, which gives itself a notice at a moment.

  Writes a line of JSON with the time of the notice, and one when the step is saved.
  """
  from ppn_jax.cli.main import main as ppn
  from ppn_jax.distributed.preemption import PreemptionNotice

  def write(what: str) -> None:
    with open(events, 'a') as file:
      file.write(json.dumps({'what': what, 'time': time.time()}) + '\n')

  @functools.cache  # Once.
  def give() -> None:
    write('notice')
    if notice == 'sigterm':
      os.kill(os.getpid(), signal.SIGTERM)
    else:
      connection = http.client.HTTPConnection(os.environ['GCE_METADATA_HOST'], timeout=10)
      connection.request('POST', f'/{notice}')
      connection.getresponse().read()

  end = PreemptionNotice.end

  def saved(self: PreemptionNotice, what: str) -> BaseException:
    # An evaluation that is cut short says so first, and saves then.
    if ' is saved in ' in what and what.endswith('to resume from there'):
      write('saved')
    return end(self, what)

  PreemptionNotice.end = saved
  hook(moment, give)
  return ppn(command)


def hook(moment: str, give: Callable[[], None]) -> None:
  """Has `give` called at a moment of the training."""
  from ppn_jax.checkpoints.manager import Checkpoints
  from ppn_jax.jobs.evaluator import Evaluator
  from ppn_jax.jobs.train_loop import TrainLoop
  if moment == 'step':
    advance = TrainLoop._next

    def next_batch(self: TrainLoop, batches):
      if self.pending and self.pending[-1][0] == AT_STEP - 1:
        give()
      return advance(self, batches)

    TrainLoop._next = next_batch
  elif moment == 'evaluation':
    rows = Evaluator.rows

    def rows_with_notice(self: Evaluator, variables, on_images):
      def after_batch(count: int) -> None:
        give()
        on_images(count)

      return rows(self, variables, after_batch)

    Evaluator.rows = rows_with_notice
  else:
    save = Checkpoints.save

    def save_with_notice(self: Checkpoints, *arguments):
      result = save(self, *arguments)  # Now it is written in the background.
      give()
      return result

    Checkpoints.save = save_with_notice


@contextlib.contextmanager
def metadata_server() -> Iterator[tuple[str, dict[str, str]]]:
  """Runs a stand-in for Google Cloud's metadata server; yields its address and its answers.

  A POST to the name of a notice makes it give that notice.
  """
  values: dict[str, str] = {}

  class Handler(http.server.BaseHTTPRequestHandler):

    def do_GET(self):
      key = self.path.removeprefix('/computeMetadata/v1/instance/')
      self.answer(200 if key in values else 404, values.get(key, 'no such key'))

    def do_POST(self):
      begins = datetime.datetime.now(datetime.UTC).isoformat(timespec='seconds')
      values.update({'preempted': 'TRUE'} if self.path == '/preempted' else {
          'upcoming-maintenance?alt=json': json.dumps(
              {'maintenance_status': 'ONGOING', 'window_start_time': begins})})
      self.answer(200, '')

    def answer(self, status: int, text: str) -> None:
      self.send_response(status)
      self.send_header('Metadata-Flavor', 'Google')
      self.end_headers()
      self.wfile.write(text.encode())

    def log_message(self, *_):
      pass

  with http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler) as server:
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f'127.0.0.1:{server.server_port}', values
    server.shutdown()


def main() -> int:
  if sys.argv[1:2] == ['--hooked']:
    return run_hooked(*sys.argv[2:])
  parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
  parser.add_argument('--notices', default=','.join(NOTICES), metavar='LIST')
  parser.add_argument('--moments', default=','.join(MOMENTS), metavar='LIST')
  parser.add_argument('--repeats', type=int, default=3, help='runs of each')
  parser.add_argument('--eval_images', type=int, default=1000, help='of an evaluation')
  parser.add_argument('--folder', help='keep the runs here (default: a temporary folder)')
  args = parser.parse_args()
  for name, legal in (('notices', NOTICES), ('moments', MOMENTS)):
    given = tuple(getattr(args, name).split(','))
    setattr(args, name, given)
    if not set(given) <= set(legal):
      parser.error(f'--{name}={",".join(given)}; legal: {",".join(legal)}')
  with tempfile.TemporaryDirectory() as temporary, metadata_server() as (address, values):
    flags = (*SCHEDULE, f'--config.data.eval.num_images={args.eval_images}')
    runs = Notices(pathlib.Path(args.folder or temporary), flags, address, values)
    runs.folder.mkdir(parents=True, exist_ok=True)
    if any(runs.folder.iterdir()):
      parser.error(f'--folder={runs.folder} is not empty')
    whole = runs.folder / 'whole'
    code, _ = runs.train(whole)
    if code:
      print(whole.with_suffix('.log').read_text()[-2000:], file=sys.stderr)
      return 1
    found = [runs.measure(notice, moment, args.repeats, whole)
             for notice in args.notices for moment in args.moments]
  print(json.dumps({'benchmark': 'notices', 'config': 'quickstart', 'cores': os.cpu_count(),
                    'seconds': found, 'same_bits': not runs.lost, 'lost': runs.lost}))
  return 1 if runs.lost else 0


if __name__ == '__main__':
  sys.exit(main())
