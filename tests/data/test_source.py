import sys

import pytest

from ppn_jax.data.source import build_source
from ppn_jax.detection.structures import Category
from ppn_jax.errors import InputError


class Own:
  """Source from outside the package."""
  categories = (Category(1, 'a'), Category(2, 'b'))
  max_boxes = 0

  def __init__(self, folder):
    self.folder = folder


def test_by_name():
  source = build_source({'name': 'synthetic_shapes', 'num_images': 3})
  assert len(source) == 3
  build_source({'name': 'synthetic_shapes', 'num_images': 3}, categories=source.categories)


def test_by_dotted_path(monkeypatch):
  monkeypatch.setitem(sys.modules, 'somebody_elses', sys.modules[__name__])
  block = {'name': 'somebody_elses:Own', 'folder': 'x'}
  assert build_source(block, categories=Own.categories).folder == 'x'
  with pytest.raises(InputError, match=r"label 1 is 'b' \(id 2\) here and no class in the run"):
    build_source(block, categories=Own.categories[:1])
  with pytest.raises(InputError, match=r'^data\.eval: .*label 1 is'):
    build_source(block, categories=Own.categories[:1], key='data.eval')


@pytest.mark.parametrize('block, message', [
    ({'name': 'coco_jsn'}, "unknown source 'coco_jsn'; did you mean 'coco_json'"),
    ({}, 'legal: coco_json, pascal_voc, '),
    ({'name': 'synthetic_shapes', 'num_image': 3}, "no option 'num_image'; did you mean"),
    ({'name': 'nowhere:Source'}, 'cannot be loaded'),
    ({'name': 'yolo_txt', 'on_bad_example': 'skip'}, 'of all data: data.on_bad_example=skip'),
])
def test_wrong_blocks(block, message):
  for key, start in [('', ''), ('data.eval', 'data.eval: ')]:
    with pytest.raises(InputError, match=message) as caught:
      build_source(block, key=key)
    assert str(caught.value).startswith(start)
