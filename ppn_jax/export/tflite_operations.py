"""Unpacks and packs TensorFlow Lite files, and lists their operations. Needs ai-edge-litert."""

import importlib
import pathlib
from typing import Any, NamedTuple

FLOATS = frozenset({'FLOAT16', 'FLOAT32', 'FLOAT64'})


def schema() -> Any:
  """Returns the module of the tables of a file."""
  return importlib.import_module('ai_edge_litert.schema_py_generated')


def unpack(content: bytes) -> Any:
  """Returns the contents of a file as a `ModelT` of the schema."""
  return schema().ModelT.InitFromObj(schema().Model.GetRootAs(content, 0))


def pack(table: Any, identifier: bytes = b'TFL3') -> bytes:
  """Returns the contents of a file whose root is a table, by default a `ModelT`."""
  import flatbuffers
  builder = flatbuffers.Builder(0)
  builder.Finish(table.Pack(builder), identifier)
  return bytes(builder.Output())


class Operation(NamedTuple):
  """Operation of a file.

  Fields:
    subgraph: index of its subgraph; loops have their own.
    name: of the schema, such as 'CONV_2D', or of a custom operation.
    takes, returns: types of its inputs and outputs, such as 'INT8'.
  """
  subgraph: int
  name: str
  takes: tuple[str, ...]
  returns: tuple[str, ...]

  @property
  def has_floats(self) -> bool:
    """Returns whether an input or an output is a float."""
    return not FLOATS.isdisjoint((*self.takes, *self.returns))


def operations(path: pathlib.Path) -> list[Operation]:
  """Returns all operations of a file, in order."""
  model = unpack(path.read_bytes())
  names = {v: k for k, v in vars(schema().BuiltinOperator).items()}
  types = {v: k for k, v in vars(schema().TensorType).items()}
  found = []
  for index, graph in enumerate(model.subgraphs):
    for op in graph.operators:
      code = model.operatorCodes[op.opcodeIndex]
      name = (code.customCode.decode() if code.customCode else
              names[max(code.builtinCode, code.deprecatedBuiltinCode)])
      takes, returns = (tuple(types[graph.tensors[at].type] for at in places if at >= 0)
                        for places in (op.inputs, op.outputs))
      found.append(Operation(index, name, takes, returns))
  return found
