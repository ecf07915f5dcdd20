"""Does a run survive being killed? Random kills, each followed by a restart, until it is done.

  python benchmarks/chaos.py --seed=0 --kills=100

Trains one config undisturbed, then again and again while SIGKILL and SIGTERM arrive at random
moments, every other one within a save, until so many have struck. Every disturbed run has to end
with the undisturbed run's parameters, bit by bit, and with each step evaluated once; at no moment
may the newest whole checkpoint be gone; SIGTERM during the steps has to end with exit code 75.
Prints counts as JSON and exits with 1 where anything was lost.
"""

import argparse
import collections
import dataclasses
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

# Long enough to be killed several times, with a save and an evaluation every so often.
CONFIGS = {
    'tiny': (f'import sys\nsys.path.insert(0, {str(ROOT / "tests")!r})\n'
             'from tiny import tiny_config\n'
             'def get_config():\n'
             '  return tiny_config(steps=400, checkpoint_every=8, evaluate_every=40, '
             'log_every=20)\n'),
    'quickstart': (ROOT / 'configs' / 'quickstart.py').read_text()}
OVERRIDES = {'tiny': (), 'quickstart': (
    '--config.train.steps=300', '--config.train.checkpoint_every=25',
    '--config.train.evaluate_every=100', '--config.data.eval.num_images=64')}


@dataclasses.dataclass
class Chaos:
  """The runs of one config in a folder, and what became of them."""
  folder: pathlib.Path
  config: str
  rng: random.Random
  counts: collections.Counter = dataclasses.field(default_factory=collections.Counter)
  lost: list[str] = dataclasses.field(default_factory=list)

  def start(self, workdir: pathlib.Path) -> subprocess.Popen:
    """`ppn train` on the workdir; what it says goes to WORKDIR.log."""
    file = self.folder / 'config.py'
    file.write_text(CONFIGS[self.config])
    environment = {**os.environ, 'PYTHONPATH': str(ROOT),
                   'JAX_COMPILATION_CACHE_DIR': str(self.folder / 'compiled'),
                   'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0.5'}
    with workdir.with_suffix('.log').open('a') as log:
      return subprocess.Popen(
          [sys.executable, '-m', 'ppn_jax.cli.main', 'train', f'--config={file}',
           f'--workdir={workdir}', *OVERRIDES[self.config]], stderr=log, env=environment)

  def run(self, workdir: pathlib.Path, kills: int) -> int:
    """Trains to the end, killed up to `kills` times; returns how often it was."""
    struck = 0
    while True:
      before = newest(workdir)
      process = self.start(workdir)
      number = None
      if struck < kills and self.strike_moment(process, workdir):
        number = self.rng.choice((signal.SIGKILL, signal.SIGTERM))
        saving = is_saving(workdir)
        process.send_signal(number)
        if number == signal.SIGTERM and self.rng.random() < 0.3:
          time.sleep(self.rng.uniform(0, 0.1))
          process.send_signal(number)
      code = process.wait(timeout=600)
      if newest(workdir) < before:
        self.lost.append(f'{workdir.name}: checkpoint {before} gone, {newest(workdir)} is newest')
      if number is not None and code != 0:
        struck += 1
        self.counts[number.name] += 1
        self.counts['during a save'] += saving
        self.counts[f'{number.name}: exit code {code}'] += 1
        # The notice is taken from the first step on; before that nothing is at stake.
        if code not in (-number, 75):
          self.lost.append(f'{workdir.name}: exit code {code} after {number.name}')
      elif code:
        self.lost.append(f'{workdir.name}: exit code {code} without a kill')
      if code not in (-signal.SIGKILL, -signal.SIGTERM, 75):
        return struck

  def strike_moment(self, process: subprocess.Popen, workdir: pathlib.Path) -> bool:
    """Waits for a random moment, or for a random save; False if the run ended before."""
    aim_at_save = self.rng.random() < 0.5
    # Some strike while it starts, most while it steps.
    if self.rng.random() < 0.85:
      told = workdir.with_suffix('.log').stat().st_size
      while process.poll() is None and not told_since(workdir, told, 'compiled in'):
        time.sleep(0.01)
    end = time.monotonic() + self.rng.uniform(0, 4)
    while process.poll() is None:
      if time.monotonic() > end and (not aim_at_save or is_saving(workdir)):
        return True
      time.sleep(0.0005)
    return False

  def check(self, workdir: pathlib.Path, whole: pathlib.Path) -> None:
    """Notes what differs between a disturbed run and the undisturbed one."""
    self.counts['runs'] += 1
    if checksums(workdir) != checksums(whole):
      self.lost.append(f'{workdir.name}: other final state')
    if evaluated_steps(workdir) != evaluated_steps(whole):
      self.lost.append(f'{workdir.name}: evaluated {evaluated_steps(workdir)}')
    if (workdir / 'damaged_checkpoints').exists():
      self.lost.append(f'{workdir.name}: a damaged checkpoint')


def told_since(workdir: pathlib.Path, offset: int, text: str) -> bool:
  return text.encode() in workdir.with_suffix('.log').read_bytes()[offset:]


def names(workdir: pathlib.Path) -> list[str]:
  folder = workdir / 'checkpoints'
  return os.listdir(folder) if folder.exists() else []


def newest(workdir: pathlib.Path) -> int:
  return max((int(name) for name in names(workdir) if name.isdigit()), default=-1)


def is_saving(workdir: pathlib.Path) -> bool:
  """Whether a checkpoint is half written at this moment."""
  return any('tmp' in name for name in names(workdir))


def checksums(workdir: pathlib.Path) -> dict:
  """Of the final state as it is read back, which is verified on the way."""
  from ppn_jax.run import open_run
  from ppn_jax.training import integrity, partition
  from ppn_jax.training.step import abstract_state
  run = open_run(workdir)
  like = abstract_state(run.detector(), run.optimizer(), partition.data_mesh())
  with run.checkpoints(read_only=True) as checkpoints:
    state = checkpoints.restore(like, run.config.train.steps)
  return integrity.checksums(state)


def evaluated_steps(workdir: pathlib.Path) -> list[int]:
  lines = map(json.loads, (workdir / 'metrics.jsonl').read_text().splitlines())
  return [line['step'] for line in lines if 'eval/AP' in line]


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
  parser.add_argument('--seed', type=int, default=0)
  parser.add_argument('--kills', type=int, default=100)
  parser.add_argument('--kills_per_run', type=int, default=12)
  parser.add_argument('--config', choices=sorted(CONFIGS), default='tiny')
  parser.add_argument('--minutes', type=float, default=60, help='begin no run after so many')
  parser.add_argument('--folder', help='keep the runs here (default: a temporary folder)')
  args = parser.parse_args()
  started = time.monotonic()
  with tempfile.TemporaryDirectory() as temporary:
    chaos = Chaos(pathlib.Path(args.folder or temporary), args.config, random.Random(args.seed))
    whole, struck, runs = chaos.folder / 'whole', 0, 0
    chaos.run(whole, 0)
    while struck < args.kills and time.monotonic() - started < args.minutes * 60:
      workdir = chaos.folder / f'run{runs}'
      struck += chaos.run(workdir, min(args.kills_per_run, args.kills - struck))
      runs += 1
      chaos.check(workdir, whole)
  print(json.dumps({
      'benchmark': 'chaos', 'config': args.config, 'seed': args.seed, 'kills': struck,
      'counts': dict(sorted(chaos.counts.items())), 'lost': chaos.lost,
      'seconds': round(time.monotonic() - started)}))
  return 1 if chaos.lost else 0


if __name__ == '__main__':
  sys.exit(main())
