"""Class names for the labels of an imported detector.

TensorFlow's ids start at 1, so label k here, which is column k + 1 after the background's, is the
class with id k + 1 there. Ids may have gaps; unused ids have columns too.
"""

import json
import pathlib
from collections.abc import Mapping, Sequence

from ppn_jax.data.label_map import ordered_categories, parse_items
from ppn_jax.detection.structures import Category
from ppn_jax.errors import InputError
from ppn_jax.storage import local_path

COCO_CLASSES = 90
# COCO's 80 classes by id. Ten of the ids up to 90 were never used.
COCO_NAMES = dict(zip(
    [*range(1, 12), *range(13, 26), 27, 28, *range(31, 45), *range(46, 66), 67, 70,
     *range(72, 83), *range(84, 91)],
    '''person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light,
    fire hydrant, stop sign, parking meter, bench, bird, cat, dog, horse, sheep, cow, elephant,
    bear, zebra, giraffe, backpack, umbrella, handbag, tie, suitcase, frisbee, skis, snowboard,
    sports ball, kite, baseball bat, baseball glove, skateboard, surfboard, tennis racket, bottle,
    wine glass, cup, fork, knife, spoon, bowl, banana, apple, sandwich, orange, broccoli, carrot,
    hot dog, pizza, donut, cake, chair, couch, potted plant, bed, dining table, toilet, tv, laptop,
    mouse, remote, keyboard, cell phone, microwave, oven, toaster, sink, refrigerator, book, clock,
    vase, scissors, teddy bear, hair drier, toothbrush'''.replace('\n   ', '').split(', '),
    strict=True))


def read_label_map(path: str | pathlib.Path) -> tuple[Category, ...]:
  """Reads the classes of a file, ordered by id.

  Args:
    path: a label map of the TF Object Detection API (.pbtxt), where `display_name` takes precedence
      over `name`, or a COCO instances file (.json).

  Raises:
    InputError: If there is no such file, it has another format or no classes, or an id is below 1
      or occurs twice.
  """
  path = local_path(path)
  if not path.is_file():
    raise InputError(f'no label map at {path}')
  try:
    if path.suffix == '.json':
      pairs = [(c['id'], c['name']) for c in json.loads(path.read_text('utf-8'))['categories']]
    else:
      pairs = [(number, shown or name)
               for number, name, shown in parse_items(path.read_text('utf-8'))]
  except (ValueError, KeyError, TypeError, RecursionError) as e:
    raise InputError(f'{path}: neither a label map (.pbtxt) nor a COCO file (.json): {e!r}') from e
  return ordered_categories(pairs, path)


def detector_categories(count: int, label_map: str | pathlib.Path | None, *,
                        names: Sequence[str] = ()) -> tuple[tuple[Category, ...], str]:
  """Returns the categories of a detector's `count` labels, and a line on the origin of the names.

  Args:
    count: number of labels.
    label_map: file with names, which takes precedence; None for none.
    names: names in the file of the weights in order of label, '' for ids that are not used; they
      are ignored unless there are `count`.

  Raises:
    InputError: As `read_label_map`, or if an id exceeds `count`.
  """
  if label_map is not None:
    known = read_label_map(label_map)
    if known[-1].id > count:
      raise InputError(f'{label_map}: class {known[-1].name!r} has id {known[-1].id}, but the '
                       f'model has {count} classes')
    return (_of_ids(count, dict(known), 'N/A'),
            f'{len(known)} of {count} classes named by {label_map}')
  if len(names) == count:
    known = {i: name for i, name in enumerate(names, start=1) if name}
    return (_of_ids(count, known, 'N/A'),
            f'{len(known)} of {count} classes named by the metadata of the file')
  if count == COCO_CLASSES:
    return (_of_ids(count, COCO_NAMES, 'N/A'),
            "90 classes, taken to be COCO's; others need --label_map")
  return (_of_ids(count, {}, 'class'),
          f"{count} class{'' if count == 1 else 'es'} without names: 'class 1' and so on; "
          '--label_map names them')


def _of_ids(count: int, names: Mapping[int, str], unnamed: str) -> tuple[Category, ...]:
  return tuple(Category(i, names.get(i, f'{unnamed} {i}')) for i in range(1, count + 1))
