"""Tests that a run survives random kills, each followed by a restart.

  python benchmarks/chaos.py --seed=0 --kills=100
  python benchmarks/chaos.py --seed=0 --kills=100 --config=quickstart
  python benchmarks/chaos.py --seed=0 --kills=100 --processes=2

Trains a config undisturbed, then repeatedly while SIGKILL and SIGTERM are sent at random moments,
about half of them during a save, until --kills signals have ended a process. Every disturbed run
must end with the same parameters as the undisturbed run, bit for bit, and with each step evaluated
once. The newest intact checkpoint must never be lost, and SIGTERM during the steps must end with
exit code 75. With several processes, a signal is sent to one of them or to all, and processes that
remain after a SIGKILL are killed after `--grace` seconds, as launch/local_pod.sh does. The times at
which each start began and ended are compared with those that the run recorded for its goodput.
Prints counts as JSON and exits with 1 if anything was lost.
"""

import argparse
import collections
import dataclasses
import json
import os
import pathlib
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

# Long enough to be killed several times, with frequent saves and evaluations.
CONFIGS = {
    'tiny': (f'import sys\nsys.path.insert(0, {str(ROOT / "tests")!r})\n'
             'from tiny import tiny_config\n'
             'def get_config():\n'
             '  return tiny_config(steps=400, checkpoint_every=8, evaluate_every=40, '
             'log_every=20)\n'),
    'quickstart': (ROOT / 'configs' / 'quickstart.py').read_text()}
# The quickstart's model, data and learning rates with a shorter schedule.
OVERRIDES = {'tiny': (), 'quickstart': (
    '--config.train.steps=240', '--config.train.checkpoint_every=8', '--config.train.log_every=8',
    '--config.train.evaluate_every=80', '--config.data.eval.num_images=32')}


class Processes:
  """Processes of one run, started together.

  Attributes:
    running: the processes.
    codes: their exit codes, once `wait` has returned.
  """

  def __init__(self, command: list[str], log: pathlib.Path, count: int, environment: dict):
    extra = [[]]
    if count > 1:
      with socket.socket() as probe:
        probe.bind(('', 0))
        port = probe.getsockname()[1]
      extra = [[f'--coordinator=localhost:{port}', f'--num_processes={count}',
                f'--process_id={i}', '--local_devices=1'] for i in range(count)]
    with log.open('a') as file:
      self.running = [subprocess.Popen([*command, *flags], stdout=subprocess.DEVNULL, stderr=file,
                                       env=environment)
                      for flags in extra]
    self.codes: list[int] = []

  def ended(self) -> bool:
    """Returns whether a process has ended."""
    return any(process.poll() is not None for process in self.running)

  def send(self, number: int, to: list[int]) -> None:
    for index in to:
      self.running[index].send_signal(number)

  def wait(self, grace: float) -> int:
    """Waits for all; returns how many had to be killed `grace` seconds after the first failure."""
    deadline, killed = time.monotonic() + 900, 0
    while any(process.poll() is None for process in self.running):
      if any(process.poll() for process in self.running):
        deadline = min(deadline, time.monotonic() + grace)
      if time.monotonic() > deadline:
        left = [process for process in self.running if process.poll() is None]
        killed += len(left)
        for process in left:
          process.kill()
        deadline = time.monotonic() + 60
      time.sleep(0.01)
    self.codes = [process.returncode for process in self.running]
    return killed


@dataclasses.dataclass
class Chaos:
  """Runs of one config in a folder, with counts of what happened to them."""
  folder: pathlib.Path
  config: str
  rng: random.Random
  processes: int = 1
  grace: float = 5.0
  counts: collections.Counter = dataclasses.field(default_factory=collections.Counter)
  lost: list[str] = dataclasses.field(default_factory=list)
  # Of each workdir: when its starts began and ended, in seconds since the epoch.
  times: dict[pathlib.Path, list[tuple[float, float]]] = dataclasses.field(
      default_factory=lambda: collections.defaultdict(list))
  differences: list[float] = dataclasses.field(default_factory=list)

  def start(self, workdir: pathlib.Path) -> Processes:
    """Starts `ppn train` on the workdir, with its output in WORKDIR.log."""
    file = self.folder / 'config.py'
    file.write_text(CONFIGS[self.config])
    environment = {**os.environ, 'PYTHONPATH': str(ROOT),
                   'JAX_COMPILATION_CACHE_DIR': str(self.folder / 'compiled'),
                   'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0.1'}
    command = [sys.executable, '-m', 'ppn_jax.cli.main', 'train', f'--config={file}',
               f'--workdir={workdir}', *OVERRIDES[self.config]]
    return Processes(command, workdir.with_suffix('.log'), self.processes, environment)

  def run(self, workdir: pathlib.Path, kills: int) -> int:
    """Trains to the end with up to `kills` kills; returns the number of kills."""
    struck = 0
    while True:
      before, number, struck_all = newest(workdir), None, True
      began = time.time()
      processes = self.start(workdir)
      if struck < kills and self.wait_for_moment(processes, workdir):
        number, struck_all, saving = self.send_signal(processes, workdir)
      self.counts['outlived a peer and was killed'] += processes.wait(self.grace)
      self.times[workdir].append((began, time.time()))
      if newest(workdir) < before:
        self.lost.append(f'{workdir.name}: checkpoint {before} lost, {newest(workdir)} is newest')
      if number is not None and any(processes.codes):
        struck += 1
        self.counts[number.name] += 1
        self.counts['during a save'] += saving
        self.counts['of one process of several'] += not struck_all
        self.counts[f'{number.name}: exit codes {sorted(set(processes.codes))}'] += 1
        self.check_codes(workdir, number, processes.codes)
      elif any(processes.codes):
        self.lost.append(f'{workdir.name}: exit codes {processes.codes} without a kill')
        return struck
      else:
        return struck

  def send_signal(self, processes: Processes, workdir: pathlib.Path
                  ) -> tuple[signal.Signals, bool, bool]:
    """Sends a signal to one process or all; returns it, whether to all, and if during a save."""
    everyone = list(range(self.processes))
    to = everyone if self.rng.random() < 0.5 else [self.rng.choice(everyone)]
    number, saving = self.rng.choice((signal.SIGKILL, signal.SIGTERM)), is_saving(workdir)
    processes.send(number, to)
    if number == signal.SIGTERM and self.rng.random() < 0.3:
      time.sleep(self.rng.uniform(0, 0.1))
      processes.send(number, to)
    return number, len(to) == self.processes, saving

  def check_codes(self, workdir: pathlib.Path, number: int, codes: list[int]) -> None:
    """Records exit codes that a signal does not explain.

    SIGTERM is handled only from the first step on, since nothing can be lost before. The peers of a
    killed process may end with any code but 0, which would mean that the run is complete.
    """
    legal = {-number, 75}
    if self.processes > 1 and -number in codes:
      legal |= {code for code in codes if code}
    if not set(codes) <= legal:
      self.lost.append(f'{workdir.name}: exit codes {codes} after {signal.Signals(number).name}')

  def wait_for_moment(self, processes: Processes, workdir: pathlib.Path) -> bool:
    """Waits for a random moment or a random save; returns False if the run ends before."""
    aim_at_save = self.rng.random() < 0.5
    # Some signals are sent during start-up, most during the steps.
    if self.rng.random() < 0.85:
      offset = workdir.with_suffix('.log').stat().st_size
      while not processes.ended() and not logged_since(workdir, offset, 'compiled in'):
        time.sleep(0.01)
    end = time.monotonic() + self.rng.uniform(0, 4)
    while not processes.ended():
      if time.monotonic() > end and (not aim_at_save or is_saving(workdir)):
        return True
      time.sleep(0.0005)
    return False

  def check(self, workdir: pathlib.Path, whole: pathlib.Path) -> None:
    """Records differences between a disturbed run and the undisturbed one."""
    self.counts['runs'] += 1
    if checksums(workdir) != checksums(whole):
      self.lost.append(f'{workdir.name}: final state differs')
    # Each step must occur once: a restart truncates the file to the step that it resumes from.
    if evaluated_steps(workdir) != evaluated_steps(whole):
      self.lost.append(f'{workdir.name}: evaluated {evaluated_steps(workdir)}')
    evaluations = workdir.with_suffix('.log').read_text().count('evaluated step')
    self.counts['evaluations'] += len(evaluated_steps(whole))
    self.counts['evaluations done again, killed before they were saved'] += (
        evaluations - len(evaluated_steps(whole)))
    if (workdir / 'damaged_checkpoints').exists():
      self.lost.append(f'{workdir.name}: a damaged checkpoint')
    self.compare_goodput(workdir)

  def compare_goodput(self, workdir: pathlib.Path) -> None:
    """Compares when starts began and ended with the run's own records.

    Starts that were killed before their first step have no record.
    """
    from ppn_jax.telemetry import goodput
    starts = goodput.read(workdir)
    self.counts['starts'] += len(self.times[workdir])
    self.counts['starts with a record'] += len(starts)
    for start in starts:
      # The system's clock for starts of processes is a little coarser.
      began, ended = min(self.times[workdir], key=lambda pair: abs(pair[0] - start.began))
      self.differences.append(abs(start.began - began) + abs(ended - start.ended))
      if abs(sum(start.seconds.values()) - (start.ended - start.began)) > 0.1:
        self.lost.append(f'{workdir.name}: the parts of a start are not its whole: {start}')


def logged_since(workdir: pathlib.Path, offset: int, text: str) -> bool:
  """Returns whether a run's log contains a text behind an offset."""
  return text.encode() in workdir.with_suffix('.log').read_bytes()[offset:]


def names(workdir: pathlib.Path) -> list[str]:
  """Returns the names in the folder of checkpoints."""
  folder = workdir / 'checkpoints'
  return os.listdir(folder) if folder.exists() else []


def newest(workdir: pathlib.Path) -> int:
  """Returns the newest saved step, -1 if there is none."""
  return max((int(name) for name in names(workdir) if name.isdigit()), default=-1)


def is_saving(workdir: pathlib.Path) -> bool:
  """Returns whether a checkpoint is being written."""
  return any('tmp' in name for name in names(workdir))


def checksums(workdir: pathlib.Path) -> dict:
  """Returns checksums of the final state, which is read from the checkpoint and verified."""
  from ppn_jax.checkpoints import integrity
  from ppn_jax.distributed import sharding
  from ppn_jax.run import open_run
  from ppn_jax.training.train_step import abstract_state
  run = open_run(workdir)
  like = abstract_state(run.detector(), run.optimizer(), sharding.data_mesh())
  with run.checkpoints(read_only=True) as checkpoints:
    state = checkpoints.restore(like, run.config.train.steps)
  return integrity.checksums(state)


def evaluated_steps(workdir: pathlib.Path) -> list[int]:
  """Returns the steps that have been evaluated."""
  lines = map(json.loads, (workdir / 'metrics.jsonl').read_text().splitlines())
  return [line['step'] for line in lines if 'eval/AP' in line]


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
  parser.add_argument('--seed', type=int, default=0)
  parser.add_argument('--kills', type=int, default=100)
  parser.add_argument('--kills_per_run', type=int, default=12)
  parser.add_argument('--config', choices=sorted(CONFIGS), default='tiny')
  parser.add_argument('--processes', type=int, default=1, help='per run, one device each')
  parser.add_argument('--grace', type=float, default=5,
                      help='seconds that the others have once one has failed')
  parser.add_argument('--minutes', type=float, default=60, help='start no run after this time')
  parser.add_argument('--folder', help='keep the runs here (default: a temporary folder)')
  args = parser.parse_args()
  started = time.monotonic()
  with tempfile.TemporaryDirectory() as temporary:
    chaos = Chaos(pathlib.Path(args.folder or temporary), args.config, random.Random(args.seed),
                  args.processes, args.grace)
    chaos.folder.mkdir(parents=True, exist_ok=True)
    whole, struck, runs = chaos.folder / 'whole', 0, 0
    chaos.run(whole, 0)
    undisturbed = time.monotonic() - started
    while (struck < args.kills and not chaos.lost
           and time.monotonic() - started < args.minutes * 60):
      workdir = chaos.folder / f'run{runs}'
      struck += chaos.run(workdir, min(args.kills_per_run, args.kills - struck))
      runs += 1
      if not chaos.lost:
        chaos.check(workdir, whole)
  seconds = time.monotonic() - started
  print(json.dumps({
      'benchmark': 'chaos', 'config': args.config, 'processes': args.processes, 'seed': args.seed,
      'kills': struck, 'counts': dict(sorted(chaos.counts.items())), 'lost': chaos.lost,
      'seconds_of_a_start_without_goodput': {
          'mean': round(statistics.fmean(chaos.differences or [0]), 2),
          'most': round(max(chaos.differences, default=0), 2)},
      'seconds': round(seconds), 'seconds_undisturbed': round(undisturbed),
      'seconds_per_kill': round((seconds - undisturbed) / max(struck, 1), 1)}))
  return 1 if chaos.lost else 0


if __name__ == '__main__':
  sys.exit(main())
