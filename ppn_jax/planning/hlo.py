"""Reads the costs of an optimised program from its text in XLA's format (HLO).

The text contains the compiler's cycle estimates, shapes with layouts and memory spaces, and
collectives. A loop is counted as often as the text says that it runs, or once if it does not say.
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
# What the compiler makes of the part of a collective that leaves the slice, whose own collectives
# have groups within it.
_ACROSS_SLICES = '_xla_host_transfer_handler_name="xla_megascale_runtime"'

COLLECTIVES = ('all-reduce', 'all-gather', 'reduce-scatter', 'all-to-all', 'collective-permute',
               'collective-broadcast')
# These name or regroup results of other instructions. A `-done` waits for what its `-start` moves.
_FREE = frozenset(('parameter', 'constant', 'tuple', 'get-tuple-element', 'bitcast', 'while',
                   'conditional', 'call', 'after-all', 'partition-id', 'replica-id'))
_PACKED = {'pred': 8, 's4': 4, 'u4': 4, 's2': 2, 'u2': 2, 'token': 0}  # Bits.


class Instruction(NamedTuple):
  """Instruction of a computation.

  Fields:
    name: name of the result.
    opcode: the operation.
    shapes: shapes of the result: (type, dimensions, order, tiles and memory space).
    operands: names of the operands.
    called: loop bodies and conditions, branches and called computations.
    cycles: the compiler's estimate, 0 if it gives none.
    trips: number of iterations of a loop, 0 if unknown.
    crosses: whether it sends to other slices, over the network of the data centre.
  """
  name: str
  opcode: str
  shapes: tuple[tuple[str, ...], ...]
  operands: tuple[str, ...]
  called: tuple[str, ...]
  cycles: int
  trips: int
  crosses: bool


class Program(NamedTuple):
  """Computations by name, and the name of the entry computation."""
  computations: dict[str, tuple[Instruction, ...]]
  entry: str


class Costs(NamedTuple):
  """Costs of a run of the program on one device.

  Fields:
    cycles: sum of the compiler's estimates, which do not exist for collectives, sorts and some
      calls.
    unestimated_sorts: number of executed sorts without an estimate.
    unknown_loops: number of loops of unknown length, which are counted as if they ran once.
    hbm_bytes: bytes read from and written to HBM, padding of tiles included.
    collectives: {opcode: (count, bytes)} within a slice, without padding.
    across_slices: (count, bytes) of what is sent to other slices.
  """
  cycles: int
  unestimated_sorts: int
  unknown_loops: int
  hbm_bytes: int
  collectives: dict[str, tuple[int, int]]
  across_slices: tuple[int, int]


def parse(text: str) -> Program:
  """Parses the text from `jax.stages.Compiled.as_text()`.

  Raises:
    ValueError: If it has no entry computation.
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
      int(cycles[1]) if cycles else 0, int(trips[1]) if trips else 0,
      opcode == 'send' and _ACROSS_SLICES in attributes)


def costs(program: Program) -> Costs:
  """Adds up the costs of all instructions that are executed."""
  cycles, sorts, loops, moved, collectives, sends, sent = 0, 0, 0, 0, {}, 0, 0
  for times, instruction, sizes in _executed(program, program.entry):
    cycles += times * instruction.cycles
    sorts += times * (instruction.opcode == 'sort' and not instruction.cycles)
    loops += instruction.opcode == 'while' and not instruction.trips
    moved += times * _moved(instruction, sizes)
    kind = instruction.opcode.removesuffix('-start')
    if kind in COLLECTIVES:
      count, total = collectives.get(kind, (0, 0))
      collectives[kind] = count + times, total + times * _exchanged(instruction, sizes)
    if instruction.crosses:
      sends, sent = sends + times, sent + times * _bytes(instruction.shapes[0])
  return Costs(cycles, sorts, loops, moved, collectives, (sends, sent))


Shapes = Sequence[tuple[str, ...]]


def _executed(program: Program, computation: str, times: int = 1
              ) -> Iterator[tuple[int, Instruction, dict[str, Shapes]]]:
  """Yields (count, instruction, shapes by name) for a computation and those that it calls."""
  instructions = program.computations.get(computation, ())
  shapes = {i.name: i.shapes for i in instructions}
  for instruction in instructions:
    yield times, instruction, shapes
    # The computation in `to_apply` of a reduction runs inside it, so it is not counted separately.
    if instruction.opcode in ('while', 'conditional', 'call'):
      for called in instruction.called:
        yield from _executed(program, called, times * (instruction.trips or 1))


def _moved(instruction: Instruction, shapes: dict[str, Shapes]) -> int:
  """Returns the bytes that an instruction reads from and writes to HBM."""
  kind = instruction.opcode.removesuffix('-start')
  if instruction.opcode in _FREE or instruction.opcode.endswith('-done') or kind in COLLECTIVES:
    return 0
  if instruction.opcode in ('send', 'recv'):  # (buffer, context, token)
    return _hbm_bytes(instruction.shapes[0])
  sources = [shape for name in instruction.operands for shape in shapes.get(name, ())]
  if kind == 'copy' and instruction.opcode != kind:  # (to, from, context)
    return sum(map(_hbm_bytes, instruction.shapes[:2]))
  # A slice reads no more than it writes. The result of its `-start` repeats the operands.
  if kind in ('slice', 'dynamic-slice'):
    target = instruction.shapes[-2 if instruction.opcode != kind else -1]
    return sum(_padded_bytes(target) for s in (target, *sources[:1]) if _in_hbm(s))
  return sum(map(_hbm_bytes, (*instruction.shapes, *sources)))


def _exchanged(instruction: Instruction, shapes: dict[str, Shapes]) -> int:
  """Returns the size of a collective's input or output in bytes, whichever is larger."""
  taken = sum(_bytes(s) for name in instruction.operands for s in shapes.get(name, ()))
  given = sum(map(_bytes, instruction.shapes))
  # The result of most asynchronous collectives repeats the operands.
  return max(taken, given - taken if instruction.opcode.endswith('-start') else given)


def _bits(dtype: str) -> int:
  digits = re.search(r'\d+', dtype)
  return _PACKED.get(dtype, int(digits[0]) if digits else 8)


def _dimensions(text: str) -> list[int]:
  return [int(n) for n in text.split(',') if n]


def _bytes(shape: tuple[str, ...]) -> int:
  return math.prod(_dimensions(shape[1])) * _bits(shape[0]) // 8


def _in_hbm(shape: tuple[str, ...]) -> bool:
  """Returns whether an array is in HBM, i.e. its layout names no other memory space."""
  return 'S(' not in shape[3]


def _hbm_bytes(shape: tuple[str, ...]) -> int:
  return _padded_bytes(shape) if _in_hbm(shape) else 0


def _padded_bytes(shape: tuple[str, ...]) -> int:
  """Returns the size in memory, with minor dimensions padded to the first tile of the layout."""
  dtype, dimensions, order, layout = shape
  sizes = _dimensions(dimensions)
  physical = [sizes[i] for i in reversed(_dimensions(order))] if order else sizes
  tile = re.search(r'T\(([\d,]+)\)', layout)
  for back, step in enumerate(reversed(_dimensions(tile[1]) if tile else []), start=1):
    if back <= len(physical):
      physical[-back] = math.ceil(physical[-back] / step) * step
  return math.prod(physical) * _bits(dtype) // 8
