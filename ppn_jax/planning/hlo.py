"""What an optimised program costs, read from its text as XLA prints it (HLO).

Only what the compiler wrote there: its cycle estimates, shapes with layouts and memory spaces,
collectives. Loops count as often as the text says they run, once where it does not say.
"""

import math
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

_HEADER = re.compile(r'^(ENTRY )?%?([\w.\-]+) \(.*\{$')
_INSTRUCTION = re.compile(r'^\s+(?:ROOT )?%?([\w.\-]+) = (.*?)\s([a-z][\w\-]*)\((.*)$')
_SHAPE = re.compile(r'([a-z][a-z0-9]*)\[([\d,]*)\](?:\{([\d,]*)(:[^}]*)?\})?')
_CYCLES = re.compile(r'"estimated_cycles":"?(\d+)')
_TRIPS = re.compile(r'"known_trip_count":\{"n":"?(\d+)')
_CALLED = re.compile(r'(?:body|condition|to_apply|branch_computations)=(\{[^}]*\}|%[\w.\-]+)')
_NAME = re.compile(r'%([\w.\-]+)')

COLLECTIVES = ('all-reduce', 'all-gather', 'reduce-scatter', 'all-to-all', 'ragged-all-to-all',
               'collective-permute', 'collective-broadcast')
# They name or regroup what others have computed. A `-done` waits for what its `-start` moves.
_FREE = frozenset(('parameter', 'constant', 'tuple', 'get-tuple-element', 'bitcast', 'while',
                   'conditional', 'call', 'after-all', 'partition-id', 'replica-id'))
_PACKED = {'pred': 8, 's4': 4, 'u4': 4, 's2': 2, 'u2': 2, 'token': 0}  # Bits.


class Instruction(NamedTuple):
  """A line of a computation."""
  name: str
  opcode: str
  shapes: tuple[tuple[str, ...], ...]  # Of the result: (type, dimensions, order, tiles and space).
  operands: tuple[str, ...]
  called: tuple[str, ...]  # Loop bodies and conditions, branches, called computations.
  cycles: int  # 0 where the compiler gives none.
  trips: int  # Of a loop, 0 where it is not known.


class Program(NamedTuple):
  """Computations by name, and which of them is run."""
  computations: dict[str, tuple[Instruction, ...]]
  entry: str


class Costs(NamedTuple):
  """Of one device, for one run of the program."""
  cycles: int  # Estimates of the compiler; it has none for collectives, sorts and some calls.
  unestimated_sorts: int  # Sorts that are executed without an estimate.
  unknown_loops: int  # Loops of unknown length, which are counted as if they ran once.
  hbm_bytes: int  # Read and written, tiles' padding included, what stays on the chip left out.
  collectives: dict[str, tuple[int, int]]  # {opcode: (how many, bytes)}, no padding.


def parse(text: str) -> Program:
  """Reads `jax.stages.Compiled.as_text()`.

  Raises:
    ValueError: there is no entry computation in it.
  """
  computations, entry, lines = {}, None, None
  for line in text.splitlines():
    header = _HEADER.match(line)
    if header:
      lines = computations.setdefault(header[2], [])
      entry = header[2] if header[1] else entry
    elif lines is not None and (match := _INSTRUCTION.match(line)):
      lines.append(_instruction(*match.groups()))
  if entry is None:
    raise ValueError('no entry computation in the text of the program')
  return Program({name: tuple(found) for name, found in computations.items()}, entry)


def _instruction(name: str, result: str, opcode: str, rest: str) -> Instruction:
  operands, _, attributes = rest.partition(')')
  cycles, trips = _CYCLES.search(attributes), _TRIPS.search(attributes)
  called = tuple(n for group in _CALLED.findall(attributes) for n in _NAME.findall(group))
  return Instruction(
      name, opcode, tuple(_SHAPE.findall(result)), tuple(_NAME.findall(operands)), called,
      int(cycles[1]) if cycles else 0, int(trips[1]) if trips else 0)


def costs(program: Program) -> Costs:
  """Adds up what `Costs` has, over all that is executed."""
  cycles, sorts, loops, moved, collectives = 0, 0, 0, 0, {}
  for times, instruction, sizes in _executed(program, program.entry):
    cycles += times * instruction.cycles
    sorts += times * (instruction.opcode == 'sort' and not instruction.cycles)
    loops += instruction.opcode == 'while' and not instruction.trips
    moved += times * _moved(instruction, sizes)
    kind = instruction.opcode.removesuffix('-start')
    if kind in COLLECTIVES:
      count, total = collectives.get(kind, (0, 0))
      collectives[kind] = count + times, total + times * _exchanged(instruction, sizes)
  return Costs(cycles, sorts, loops, moved, collectives)


Shapes = Sequence[tuple[str, ...]]


def _executed(program: Program, computation: str, times: int = 1
              ) -> Iterator[tuple[int, Instruction, dict[str, Shapes]]]:
  """(how often, instruction, shapes by name) of a computation and those that it runs."""
  instructions = program.computations.get(computation, ())
  shapes = {i.name: i.shapes for i in instructions}
  for instruction in instructions:
    yield times, instruction, shapes
    # What `to_apply` of a reduction names runs inside it.
    if instruction.opcode in ('while', 'conditional', 'call'):
      for called in instruction.called:
        yield from _executed(program, called, times * (instruction.trips or 1))


def _moved(instruction: Instruction, shapes: dict[str, Shapes]) -> int:
  """Bytes that an instruction reads from and writes to HBM."""
  kind = instruction.opcode.removesuffix('-start')
  if instruction.opcode in _FREE or instruction.opcode.endswith('-done') or kind in COLLECTIVES:
    return 0
  sources = [shape for name in instruction.operands for shape in shapes.get(name, ())]
  if kind == 'copy' and instruction.opcode != kind:  # (to, from, context)
    return sum(map(_hbm_bytes, instruction.shapes[:2]))
  if kind in ('slice', 'dynamic-slice'):  # Reads no more than it writes; `-start` repeats operands.
    target = instruction.shapes[-2 if instruction.opcode != kind else -1]
    return sum(_padded_bytes(target) for s in (target, *sources[:1]) if _in_hbm(s))
  return sum(map(_hbm_bytes, (*instruction.shapes, *sources)))


def _exchanged(instruction: Instruction, shapes: dict[str, Shapes]) -> int:
  """The larger of what a collective takes and gives, in bytes."""
  taken = sum(_bytes(s) for name in instruction.operands for s in shapes.get(name, ()))
  given = sum(map(_bytes, instruction.shapes))
  # The result of most of the asynchronous ones repeats the operands.
  return max(taken, given - taken if instruction.opcode.endswith('-start') else given)


def _bits(dtype: str) -> int:
  digits = re.search(r'\d+', dtype)
  return _PACKED.get(dtype, int(digits[0]) if digits else 8)


def _dimensions(text: str) -> list[int]:
  return [int(n) for n in text.split(',') if n]


def _bytes(shape: tuple[str, ...]) -> int:
  return math.prod(_dimensions(shape[1])) * _bits(shape[0]) // 8


def _in_hbm(shape: tuple[str, ...]) -> bool:
  """Whether its layout names no other memory space."""
  return 'S(' not in shape[3]


def _hbm_bytes(shape: tuple[str, ...]) -> int:
  return _padded_bytes(shape) if _in_hbm(shape) else 0


def _padded_bytes(shape: tuple[str, ...]) -> int:
  """With the minor dimensions filled up to the first tile of the layout, as they lie in memory."""
  dtype, dimensions, order, layout = shape
  sizes = _dimensions(dimensions)
  physical = [sizes[i] for i in reversed(_dimensions(order))] if order else sizes
  tile = re.search(r'T\(([\d,]+)\)', layout)
  for back, step in enumerate(reversed(_dimensions(tile[1]) if tile else []), start=1):
    if back <= len(physical):
      physical[-back] = math.ceil(physical[-back] / step) * step
  return math.prod(physical) * _bits(dtype) // 8
