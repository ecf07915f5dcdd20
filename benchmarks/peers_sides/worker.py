"""What the sides of benchmarks/peers.py have in common: a process that obeys lines.

A side is started with one argument, the task in JSON, and reads commands from stdin; each is
answered by one line of JSON on stdout. `prepare FILE` builds the workload, runs it once and writes
what came out to FILE, an npz; `run COUNT` runs it once untimed and then COUNT times;
`describe` gives versions and memory. An error is answered by its text, and a side that ran out of
memory says so. Knows NumPy and no framework.
"""

import json
import os
import sys
import time
import traceback
from collections.abc import Callable

import numpy as np


class Task:
  """What a side is asked for.

  Attributes:
    kind: 'train', 'network' (box codes and class logits) or 'detect'.
    batch, dtype, device, threads: as the benchmark's flags.
    options: what only one side knows.
    spec: figures of the detector and of the step, from `material.py`.
    weights: {path: array} in the layouts of ppn_jax.
    images: u8 [batch, S, S, 3].
    truth: boxes [batch, G, 4], labels [batch, G], valid [batch, G].
  """

  def __init__(self, text: str):
    given = json.loads(text)
    self.kind, self.batch, self.dtype = given['kind'], given['batch'], given['dtype']
    self.device, self.threads = given['device'], given['threads']
    self.options = given['options']
    folder = given['folder']
    with open(f'{folder}/spec.json', encoding='utf-8') as file:
      self.spec = json.load(file)
    self.weights = dict(np.load(f'{folder}/weights.npz'))
    material = np.load(f'{folder}/material.npz')
    rows = np.arange(self.batch) % len(material['images'])
    self.images = material['images'][rows]
    self.truth = {name: material[name][rows] for name in ('boxes', 'labels', 'valid')}
    self.anchors = material['anchors']


def trimmed(truth: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Without the padding that no image of the batch needs, as a collate function leaves it."""
  most = max(1, int(truth['valid'].sum(axis=1).max()))
  return {name: array[:, :most] for name, array in truth.items()}


def serve(prepare: Callable[[Task], tuple[Callable[[], None], Callable[[], dict]]],
          describe: Callable[[], dict]) -> None:
  """Obeys until stdin ends.

  Args:
    prepare: task -> (once, results): `once` does the work and waits for it, `results` gives what
      the last call of it left, as arrays in the layouts of ppn_jax.
    describe: versions and whatever else the side can tell.
  """
  # Libraries print what they like; the answers go where nobody else writes.
  answers = os.fdopen(os.dup(1), 'w', buffering=1)
  os.dup2(2, 1)
  task, once = Task(sys.argv[1]), None

  def obey(command: str, argument: str) -> dict:
    nonlocal once
    if command == 'prepare':
      started = time.perf_counter()
      once, results = prepare(task)
      once()
      seconds = time.perf_counter() - started
      np.savez(argument, **results())
      once()  # A second trace, an autotuner's choice: not before the first call has ended.
      return {'prepare_s': seconds}
    if command == 'run':
      once()
      return {'seconds': [_timed(once) for _ in range(int(argument))]}
    if command == 'describe':
      return describe()
    raise ValueError(f'unknown command {command!r}')

  for line in sys.stdin:
    command, _, argument = line.strip().partition(' ')
    try:
      answer = obey(command, argument)
    except Exception as e:  # Whatever the framework raises is a result here.
      traceback.print_exc()
      answer = {'error': f'{type(e).__name__}: {_first_line(e)}', 'out_of_memory': _is_memory(e)}
    answers.write(json.dumps(answer) + '\n')


def _timed(once: Callable[[], None]) -> float:
  started = time.perf_counter()
  once()
  return time.perf_counter() - started


def _first_line(e: Exception) -> str:
  return next(iter(str(e).strip().splitlines()), '')[:300]


def _is_memory(e: Exception) -> bool:
  text = f'{type(e).__name__} {e}'.lower()
  return any(s in text for s in ('out of memory', 'outofmemory', 'resource_exhausted',
                                 'memoryerror', "can't allocate memory"))
