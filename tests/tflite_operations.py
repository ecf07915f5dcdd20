"""Lists the operations of a TensorFlow Lite file."""


def operations(path):
  """Returns (name, types of the inputs, types of the outputs) of each operation of a file.

  The file must have a single subgraph.
  """
  from ai_edge_litert import schema_py_generated as schema
  model = schema.ModelT.InitFromObj(schema.Model.GetRootAs(path.read_bytes(), 0))
  graph, = model.subgraphs
  names = {v: k for k, v in vars(schema.BuiltinOperator).items()}
  types = {v: k for k, v in vars(schema.TensorType).items()}
  codes = model.operatorCodes

  def name(code):
    if code.customCode:
      return code.customCode.decode()
    return names[max(code.builtinCode, code.deprecatedBuiltinCode)]

  def kinds(places):
    return [types[graph.tensors[at].type] for at in places if at >= 0]

  return [(name(codes[op.opcodeIndex]), kinds(op.inputs), kinds(op.outputs))
          for op in graph.operators]
