import sys

import pytest

from ppn_jax.data.source import (
  SourceView,
  build_source,
  contents_of,
  encoded_of,
  file_ids,
  known_unreadable,
  open_example,
  stamp_of,
)
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


class Required(Own):
  """Source with the required members only."""

  def __len__(self):
    return 1

  def __getitem__(self, index):
    return f'example {index}'

  def ground_truth(self):
    return {'images': [dict(id=7, height=10, width=20, file_name='7.jpg')],
            'categories': [c._asdict() for c in self.categories],
            'annotations': [dict(id=1, image_id=7, category_id=2, bbox=[0, 0, 10, 5], area=50,
                                 iscrowd=0)]}


def test_optional_members_may_be_missing():
  source = Required('x')
  for view in (source, SourceView(source)):
    assert encoded_of(view) is stamp_of(view) is None and known_unreadable(view) == ()
    assert open_example(view, 0) == 'example 0' and file_ids(view) == {1: 1, 2: 2}
  contents = contents_of(source)
  assert contents.labels.tolist() == [1] and contents.shares.tolist() == [[0.5, 0.5]]
  assert contents_of(Own('x')) is None


def test_views_have_the_optional_members_of_their_source():
  source = build_source({'name': 'synthetic_shapes', 'num_images': 2})
  view = SourceView(source)
  assert stamp_of(view)(1) == source.stamp(1) and encoded_of(view) is None
  assert contents_of(source) is None


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
    ({}, 'legal: coco_json, cvat_xml, '),
    ({'name': 'synthetic_shapes', 'num_image': 3}, "no option 'num_image'; did you mean"),
    ({'name': 'nowhere:Source'}, 'cannot be loaded'),
    ({'name': 'yolo_txt', 'on_bad_example': 'skip'}, 'of all data: data.on_bad_example=skip'),
])
def test_wrong_blocks(block, message):
  for key, start in [('', ''), ('data.eval', 'data.eval: ')]:
    with pytest.raises(InputError, match=message) as caught:
      build_source(block, key=key)
    assert str(caught.value).startswith(start)
