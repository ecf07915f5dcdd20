"""Label maps of the TF Object Detection API (.pbtxt): the names of class ids."""

import pathlib

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, text_format

from ppn_jax.detection.structures import Category
from ppn_jax.errors import InputError


def _define() -> type:
  """Returns the class of object_detection/protos/string_int_label_map.proto, made at run time."""
  field = descriptor_pb2.FieldDescriptorProto
  file = descriptor_pb2.FileDescriptorProto(
      name='ppn_jax/label_map.proto', package='ppn_jax.label_map', syntax='proto3')
  item = file.message_type.add(name='Item')
  for number, (name, kind) in enumerate((('name', field.TYPE_STRING), ('id', field.TYPE_INT32),
                                         ('display_name', field.TYPE_STRING)), start=1):
    item.field.add(name=name, number=number, type=kind, label=field.LABEL_OPTIONAL)
  file.message_type.add(name='LabelMap').field.add(
      name='item', number=1, type=field.TYPE_MESSAGE, label=field.LABEL_REPEATED,
      type_name='.ppn_jax.label_map.Item')
  pool = descriptor_pool.Default()
  pool.Add(file)
  return message_factory.GetMessageClass(pool.FindMessageTypeByName('ppn_jax.label_map.LabelMap'))


_LabelMap = _define()


def parse_items(text: str) -> list[tuple[int, str, str]]:
  """Returns (id, name, display_name) of each class in the text of a label map.

  Raises:
    ValueError: If it is not a label map.
  """
  try:
    items = text_format.Parse(text, _LabelMap(), allow_unknown_field=True).item
  except text_format.ParseError as e:
    raise ValueError(' '.join(str(e).split())[:300]) from e
  return [(i.id, i.name, i.display_name) for i in items]


def ordered_categories(pairs: list[tuple[int, str]], where: str | pathlib.Path
                       ) -> tuple[Category, ...]:
  """Returns classes ordered by id.

  Args:
    pairs: (id, name) of each class.
    where: The file, for messages.

  Raises:
    InputError: If there are none, an id is below 1 or occurs twice, or a name is missing.
  """
  for number, name in pairs:
    if type(number) is not int or number < 1 or not isinstance(name, str) or not name:
      raise InputError(f'{where}: class {name!r} has id {number!r}; each class needs a name, and '
                       'an integer of at least 1 as its id')
  names = dict(pairs)
  if not names:
    raise InputError(f'{where}: it contains no classes')
  if len(names) < len(pairs):
    raise InputError(f'{where}: an id occurs twice among its {len(pairs)} classes')
  return tuple(Category(*pair) for pair in sorted(names.items()))
