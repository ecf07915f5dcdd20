"""Lists the operations of TensorFlow Lite files and the types that they compute in."""

import importlib
import pathlib
from typing import NamedTuple

FLOATS = frozenset({'FLOAT16', 'FLOAT32', 'FLOAT64'})


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
  """Returns all operations of a file, in order. Needs ai-edge-litert."""
  schema = importlib.import_module('ai_edge_litert.schema_py_generated')
  model = schema.ModelT.InitFromObj(schema.Model.GetRootAs(path.read_bytes(), 0))
  names = {v: k for k, v in vars(schema.BuiltinOperator).items()}
  types = {v: k for k, v in vars(schema.TensorType).items()}
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
