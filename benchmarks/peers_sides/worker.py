"""Common part of the sides of benchmarks/peers.py: a process that executes commands from stdin.

A side is started with one argument, the task in JSON, and answers each command from stdin by one
line of JSON on stdout. `prepare FILE` builds the workload, runs it once and writes the results to
FILE, an npz. `run COUNT` runs it once untimed and then COUNT times. `describe` returns versions and
memory. An error is answered by its text and whether memory was exhausted. This module uses NumPy
and no framework.
"""

import json
import os
import sys
import time
import traceback
from collections.abc import Callable

import numpy as np


class Task:
  """Task of a side.

  Attributes:
    kind: 'train', 'network' (box codes and class logits) or 'detect'.
    batch, dtype, device, threads: as the benchmark's flags.
    options: options of one side.
    spec: parameters of the detector and of the step, from `material.py`.
    weights: {path: array} in the layouts of ppn_jax.
    images: u8 [batch, S, S, 3].
    ground_truth: boxes [batch, G, 4], labels [batch, G], valid [batch, G].
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
    self.ground_truth = {name: material[name][rows] for name in ('boxes', 'labels', 'valid')}
    self.anchors = material['anchors']


def trimmed(ground_truth: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Removes the padding that no image of the batch needs, as a collate function would."""
  most = max(1, int(ground_truth['valid'].sum(axis=1).max()))
  return {name: array[:, :most] for name, array in ground_truth.items()}


def serve(prepare: Callable[[Task], tuple[Callable[[], None], Callable[[], dict]]],
          describe: Callable[[], dict]) -> None:
  """Executes commands until stdin ends.

  Args:
    prepare: maps a task to (once, results): `once` does the work and waits for it, `results`
      returns the results of its last call as arrays in the layouts of ppn_jax.
    describe: returns versions and other information.
  """
  # Answers go to a copy of stdout, because libraries print to stdout too.
  answers = os.fdopen(os.dup(1), 'w', buffering=1)
  os.dup2(2, 1)
  task, once = Task(sys.argv[1]), None

  def execute(command: str, argument: str) -> dict:
    nonlocal once
    if command == 'prepare':
      started = time.perf_counter()
      once, results = prepare(task)
      once()
      seconds = time.perf_counter() - started
      np.savez(argument, **results())
      once()  # A second trace or an autotuner's choice may come only after the first call.
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
      answer = execute(command, argument)
    except Exception as e:  # Any error of the framework is a result here.
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
