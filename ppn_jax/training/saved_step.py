"""A compiled training step in a file, for processes with the same devices and libraries.

A line of JSON says what it fits, the rest is what `jax.experimental.serialize_executable` gives.
Loading it runs code from the file, so only files of one's own should be loaded.
"""

import hashlib
import importlib.metadata
import json
import pathlib
import pickle
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
from jax.experimental import serialize_executable
from jax.sharding import Mesh

from ppn_jax import storage
from ppn_jax.errors import InputError

_FORMAT = 'ppn_jax compiled step 1'


class SavedStep(NamedTuple):
  """A file, read and checked against the devices and libraries at hand."""
  path: pathlib.Path
  made_for: dict[str, Any]
  executable: bytes


def save_step(path: str | pathlib.Path, lowered: jax.stages.Lowered,
              compiled: jax.stages.Compiled, mesh: Mesh) -> None:
  """Writes `compiled`, which `lowered` has become for the devices of `mesh`, at hand or not."""
  executable, _, _ = serialize_executable.serialize(compiled)
  made_for = {
      'format': _FORMAT, 'versions': _versions(mesh), **_places(mesh),
      'arguments': _arguments(lowered), 'program': _digest(lowered.as_text().encode()),
      'executable': _digest(executable)}
  storage.write_bytes(storage.local_path(path), json.dumps(made_for).encode() + b'\n' + executable)


def read_step(path: str | pathlib.Path, mesh: Mesh) -> SavedStep:
  """Reads what `save_step` wrote, and checks all but the program; loads nothing.

  Raises:
    InputError: there is no such file, it is damaged, or it is for other devices or libraries.
  """
  path = storage.local_path(path)
  try:
    head, _, executable = path.read_bytes().partition(b'\n')
  except OSError as e:
    raise InputError(f'--compiled_step={path} cannot be read: {e.strerror}') from e
  try:
    made_for = json.loads(head)
  except ValueError:
    made_for = None
  if not isinstance(made_for, dict) or made_for.get('format') != _FORMAT:
    raise InputError(f'--compiled_step={path} is not what this version of `ppn plan --save_step` '
                     'writes')
  if made_for['executable'] != _digest(executable):
    raise InputError(f'--compiled_step={path} is damaged: its checksum does not agree')
  here = _places(mesh)
  _check(path, 'for', {name: made_for[name] for name in here}, here,
         lambda places: '{} x {}'.format(len(places['devices']), places['kind']))
  _check(path, 'with', made_for['versions'], _versions(mesh),
         lambda versions: ', '.join(f'{name} {version}' for name, version in versions.items()))
  return SavedStep(path, made_for, executable)


def load_step(saved: SavedStep, lowered: jax.stages.Lowered, mesh: Mesh) -> jax.stages.Compiled:
  """The step, in place of `lowered.compile()`.

  Raises:
    InputError: it is another program than `lowered`, or the devices refuse it.
  """
  arguments = _arguments(lowered)
  for theirs, ours in zip(saved.made_for['arguments'], arguments, strict=False):
    if theirs != ours:
      raise InputError(f'--compiled_step={saved.path} takes {theirs} where this run has {ours}; '
                       'train.batch_size, model.image_size, data.max_boxes and the model must be '
                       'those it was compiled with')
  if saved.made_for['program'] != _digest(lowered.as_text().encode()):
    raise InputError(f'--compiled_step={saved.path} was compiled from another config or another '
                     'version of the code; compile it again, or leave it out')
  devices = list(mesh.devices.flat)
  try:
    return serialize_executable.deserialize_and_load(
        saved.executable, lowered.in_tree, lowered.out_tree, backend=devices[0].client,
        execution_devices=devices)
  except (jax.errors.JaxRuntimeError, pickle.UnpicklingError) as e:
    reason = str(e).strip().partition('\n')[0][:300]
    raise InputError(f'--compiled_step={saved.path} cannot be loaded here: {reason}') from e


def _check(path: pathlib.Path, word: str, theirs: Any, ours: Any,
           describe: Callable[[Any], str]) -> None:
  if theirs == ours:
    return
  made, here = describe(theirs), describe(ours)
  here = 'another arrangement of these' if made == here else here
  raise InputError(f'--compiled_step={path} was compiled {word} {made}, here is {here}; compile it '
                   'again, or leave it out')


def _versions(mesh: Mesh) -> dict[str, str]:
  names = ['jax', 'jaxlib', *(['libtpu'] if mesh.devices.flat[0].platform == 'tpu' else [])]
  return {name: importlib.metadata.version(name) for name in names}


def _places(mesh: Mesh) -> dict[str, Any]:
  """Which devices, in the order of the mesh, and where they are: collectives are routed by it."""
  devices = list(mesh.devices.flat)
  return {'kind': devices[0].device_kind,
          'devices': [[d.id, *_position(d)] for d in devices]}


def _position(device: jax.Device) -> Iterable[int]:
  return (*getattr(device, 'coords', ()), *filter(None, [getattr(device, 'core_on_chip', 0)]))


def _arguments(lowered: jax.stages.Lowered) -> list[str]:
  return [f'{x.dtype}{list(x.shape)}' for x in jax.tree.leaves(lowered.args_info)]


def _digest(content: bytes) -> str:
  return hashlib.sha256(content).hexdigest()
