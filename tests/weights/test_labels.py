import json

import pytest

from ppn_jax.errors import InputError
from ppn_jax.weights.labels import COCO_NAMES, detector_categories, read_label_map

PBTXT = """
item {
  name: "/m/01g317"
  id: 1
  display_name: "person"
}
item { id: 3 name: 'car' keypoints { id: 5 label: "nose" } }
"""


def test_names_of_coco(shared):
  text = (shared / 'data/coco100/annotations/instances_val2017.json').read_text()
  assert {c['id']: c['name'] for c in json.loads(text)['categories']} == COCO_NAMES
  categories, line = detector_categories(90, None)
  assert [c.id for c in categories] == list(range(1, 91)) and 'COCO' in line
  assert categories[11].name == 'N/A 12' and categories[89].name == 'toothbrush'


def test_label_maps(tmp_path):
  (tmp_path / 'map.pbtxt').write_text(PBTXT)
  (tmp_path / 'map.json').write_text(json.dumps(
      {'categories': [{'id': 3, 'name': 'car'}, {'id': 1, 'name': 'person'}]}))
  for name in ('map.pbtxt', 'map.json'):
    assert read_label_map(tmp_path / name) == ((1, 'person'), (3, 'car'))
    categories, _ = detector_categories(4, tmp_path / name)
    assert categories == ((1, 'person'), (2, 'N/A 2'), (3, 'car'), (4, 'N/A 4'))


def test_no_names():
  categories, line = detector_categories(2, None)
  assert categories == ((1, 'class 1'), (2, 'class 2')) and '--label_map' in line


@pytest.mark.parametrize('name, text, message', [
    ('a.pbtxt', 'item { id: 0 name: "x" }', "class 'x' has id 0"),
    ('a.pbtxt', 'item { id: 1 }', "class '' has id 1"),
    ('a.pbtxt', 'item { id: 1 name: "x" } item { id: 1 name: "y" }', 'an id occurs twice'),
    ('a.pbtxt', '', 'no classes'), ('a.pbtxt', 'item {', 'neither a label map'),
    ('a.pbtxt', 'item { id: 9 name: "x" }', "class 'x' has id 9, but the model has 4 classes"),
    ('a.json', '{', 'neither'), ('a.json', '[]', 'neither'), ('a.json', '{"categories": [1]}',
                                                              'neither'),
    ('a.json', '{"categories": [{"id": true, "name": "x"}]}', 'has id True'),
    ('a.json', None, 'no label map at')])
def test_bad_label_maps(tmp_path, name, text, message):
  if text is not None:
    (tmp_path / name).write_text(text)
  with pytest.raises(InputError, match=message):
    detector_categories(4, tmp_path / name)
