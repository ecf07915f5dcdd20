"""CocoJson on small files with one error each, and on real data."""

import copy
import json
import os

import numpy as np
import PIL.Image
import pytest

from ppn_jax.data.images.decoding import encode_jpeg
from ppn_jax.data.source import build_source
from ppn_jax.data.sources.annotations import BORDER_TOLERANCE
from ppn_jax.data.sources.coco import CocoJson
from ppn_jax.detection.structures import Category
from ppn_jax.errors import InputError

GOOD = {
    'images': [{'id': 30, 'file_name': 'a.jpg', 'height': 20, 'width': 40},
               {'id': 10, 'file_name': 'sub/b.jpg', 'height': 30, 'width': 20},
               {'id': 20, 'file_name': 'c.jpg', 'height': 10, 'width': 10}],
    'annotations': [
        {'id': 5, 'image_id': 20, 'category_id': 3, 'bbox': [1, 2, 3, 4], 'area': 9.5,
         'iscrowd': 1},
        {'id': 5, 'image_id': 30, 'category_id': 90, 'bbox': [10.5, 5, 20, 10]},
        {'image_id': 20, 'category_id': 90, 'bbox': [0, 0, 10, 10.4], 'area': 100}],
    'categories': [{'id': 90, 'name': 'dog', 'supercategory': 'animal'}, {'id': 3, 'name': 'cat'}],
}


@pytest.fixture
def folder(tmp_path):
  for image in GOOD['images']:
    path = tmp_path / 'images' / image['file_name']
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encode_jpeg(np.full((image['height'], image['width'], 3), 100, np.uint8)))
  return tmp_path


def load(folder, content=GOOD, **options):
  text = content if isinstance(content, (str, bytes)) else json.dumps(content)
  (folder / 'truth.json').write_bytes(text if isinstance(text, bytes) else text.encode())
  return CocoJson(str(folder / 'images'), str(folder / 'truth.json'), **options)


def changed(*path_and_value):
  """Returns GOOD with the entry at a path set to a value, or removed if that is `...`."""
  *path, key, value = path_and_value
  content = copy.deepcopy(GOOD)
  at = content
  for step in path:
    at = at[step]
  if value is ...:
    del at[key]
  else:
    at[key] = value
  return content


def test_examples(folder):
  source = load(folder)
  assert len(source) == 3 and source.max_boxes == 2 and not source.contents.left_out
  assert source.categories == (Category(3, 'cat'), Category(90, 'dog'))
  first, second, third = (source[i] for i in range(3))
  assert (first.image_id, second.image_id, third.image_id) == (30, 10, 20)
  assert first.image.shape == (20, 40, 3) and first.size == (20, 40)
  np.testing.assert_allclose(first.boxes, [[5 / 20, 10.5 / 40, 15 / 20, 30.5 / 40]], rtol=1e-6)
  assert second.boxes.shape == (0, 4) and second.image.shape == (30, 20, 3)
  np.testing.assert_allclose(third.boxes, [[.2, .1, .6, .4], [0, 0, 1, 1]], rtol=1e-6)
  np.testing.assert_array_equal(third.labels, [0, 1])
  np.testing.assert_array_equal(third.crowd, [True, False])
  assert (first.boxes.dtype, first.labels.dtype, first.crowd.dtype) == (
      np.float32, np.int32, np.bool_)


def test_an_example_is_the_caller_s_to_change(folder):
  source = load(folder)
  source[2].boxes[:] = 9
  assert source[2].boxes.max() <= 1


def test_ground_truth_is_the_file_s_own(folder):
  truth = load(folder).ground_truth()
  assert truth['categories'] == [{'id': 3, 'name': 'cat'}, {'id': 90, 'name': 'dog'}]
  assert [i['id'] for i in truth['images']] == [30, 10, 20]
  assert truth['images'][0] == GOOD['images'][0]
  assert truth['annotations'] == [
      {'id': 1, 'image_id': 30, 'category_id': 90, 'bbox': [10.5, 5, 20, 10], 'area': 200.0,
       'iscrowd': 0},
      {'id': 2, 'image_id': 20, 'category_id': 3, 'bbox': [1, 2, 3, 4], 'area': 9.5, 'iscrowd': 1},
      {'id': 3, 'image_id': 20, 'category_id': 90, 'bbox': [0, 0, 10, 10.4], 'area': 100.0,
       'iscrowd': 0}]
  json.dumps(truth)


def test_no_boxes_at_all(folder):
  source = load(folder, changed('annotations', []))
  assert len(source) == 3 and source.max_boxes == 0 and source[0].boxes.shape == (0, 4)
  assert source.ground_truth()['annotations'] == []


def test_categories_of_the_run(folder):
  wanted = (Category(3, 'cat'), Category(90, 'dog'))
  load(folder, categories=wanted)
  for other, message in (
      ((Category(3, 'cat'), Category(91, 'dog')), r"'dog' \(id 90\) here and 'dog' \(id 91\)"),
      ((Category(3, 'kat'), Category(90, 'dog')), r"label 0 is 'cat' .* 'kat'"),
      ((*wanted, Category(91, 'cow')), r"label 2 is no class here and 'cow'"),
      (wanted[:1], r"label 1 is 'dog' \(id 90\) here and no class")):
    with pytest.raises(InputError, match=message):
      load(folder, categories=other)


@pytest.mark.parametrize('content, message', [
    ('{"images": [', 'not valid JSON'),
    (b'\xff\xfe\x00garbage', 'not valid JSON'),
    ('[]', 'it looks like COCO results'),
    ('[{"image_id": 1, "bbox": [0, 0, 1, 1], "score": 0.5}]', 'it looks like COCO results'),
    ('3', "no list 'images' in it; it holds 3"),
    ('{}', "no list 'images'"),
    ({'images': [], 'foo': 1}, "no list 'annotations' in it; its keys: .*'foo'"),
    ({'images': [{}], 'categories': [{}]}, 'it looks like an image_info file'),
    ({'images': {}, 'annotations': [], 'categories': []}, "no list 'images'"),
    ({'images': GOOD['images'], 'annotations': [{'image_id': 30, 'id': 1, 'caption': 'A dog.'}]},
     "no list 'categories' in it; it looks like a captions file"),
    (changed('annotations', 0, {'image_id': 30, 'category_id': 3, 'segments_info': []}),
     r"annotations\[0\]: no 'bbox' .*panoptic"),
    (changed('images', []), 'no images'),
    (changed('categories', []), 'no categories'),
    (changed('images', 1, 'id', 30), r'images\[0\]: id 30 is listed 2 times'),
    (changed('categories', 1, 'id', 90), r'categories\[0\]: id 90 is listed 2 times'),
    (changed('images', 1, 'file_name', ...), r"images\[1\]: no 'file_name'"),
    (changed('images', 2, 'width', ...), r"images\[2\]: no 'width'"),
    (changed('images', 2, 'height', 0), r'images\[2\]: height and width are \[0, 10\]'),
    (changed('images', 2, 'height', '10'), r"images\[2\]: height is '10', legal: an integer"),
    (changed('images', 0, 'id', True), r'images\[0\]: id is True, legal: an integer or a string'),
    (changed('images', 0, 'id', 30.5), r'images\[0\]: id is 30\.5, legal'),
    (changed('images', 0, 'id', ' '), r"images\[0\]: id is ' ', legal"),
    (changed('images', 0, 'id', 1 << 70), r'images\[0\]: id is 1180591620717411303424, legal'),
    (changed('images', 0, 7), r'images\[0\]: no .* in 7'),
    (changed('annotations', 0, None), r"annotations\[0\]: no 'image_id' in None"),
    (changed('annotations', 1, 'image_id', '31'), r"annotations\[1\]: image_id is '31', which the"),
    (changed('annotations', 1, 'image_id', 'x'), r"annotations\[1\]: image_id is 'x', which the"),
    (changed('annotations', 1, 'image_id', 30.5), r'annotations\[1\]: image_id is 30\.5, legal'),
    (changed('annotations', 1, 'image_id', None), r'annotations\[1\]: image_id is None, legal'),
    (changed('annotations', 1, 'image_id', 31), r'annotations\[1\]: image_id is 31, which the'),
    (changed('annotations', 2, 'category_id', 1), r'annotations\[2\]: category_id is 1, which'),
    (changed('annotations', 2, 'category_id', 99), r'annotations\[2\]: category_id is 99, which'),
    (changed('annotations', 0, 'iscrowd', 2), r'annotations\[0\]: iscrowd is 2, legal: 0, 1'),
    (changed('annotations', 0, 'area', 'big'), r"annotations\[0\]: area is 'big'"),
    (changed('annotations', 0, 'area', -1), r'annotations\[0\]: area is -1'),
    (changed('categories', 0, 'name', ''), r"categories\[0\]: name is '', legal: a name"),
    (changed('images', 0, 'file_name', '../a.jpg'), 'inside the folder of images'),
    (changed('images', 0, 'file_name', 'sub/../../a.jpg'), 'inside the folder of images'),
    (changed('images', 0, 'file_name', '..\\a.jpg'), 'inside the folder of images'),
    (changed('images', 0, 'file_name', '/etc/passwd'), 'inside the folder of images'),
    (changed('images', 0, 'file_name', 'a\0.jpg'), 'inside the folder of images'),
    (changed('images', 0, 'file_name', ''), 'inside the folder of images'),
    (changed('images', 0, 'file_name', 'A.jpg'), r'1 of the 3 images .* are not in .*: A\.jpg'),
    (changed('images', 0, 'file_name', 'other/a.jpg'), r'1 of the 3 images .*: other/a\.jpg'),
])
def test_wrong_files(folder, content, message):
  with pytest.raises(InputError, match=message) as caught:
    load(folder, content)
  assert 'truth.json' in str(caught.value) and '\n' not in str(caught.value)


@pytest.mark.parametrize('bbox, reason', [
    ([1, 2, 3], 'not four numbers'), ([1, 2, 3, 4, 5], 'not four numbers'),
    (['1', 2, 3, 4], 'not four numbers'), (None, 'not four numbers'), ([], 'not four numbers'),
    ([1, 2, [3], 4], 'not four numbers'), ([True, 2, 3, 4], 'not four numbers'),
    ([float('nan'), 2, 3, 4], 'not finite'), ([1, 2, float('inf'), 4], 'not finite'),
    ([1, 2, 0, 4], 'no area'), ([1, 2, 3, -4], 'no area'), ([1, 2, 1e-9, 4], 'no area'),
    ([10.2, 2, 0.5, 4], 'no area'), ([-0.9, 2, 0.9, 4], 'no area'),
    ([-1.6, 2, 3, 4], 'outside the image'), ([1, -2.1, 3, 4], 'outside the image'),
    ([8, 2, 4.5, 4], 'outside the image'), ([-2, -2, 6, 6], 'outside the image'),
    ([100, 100, 3, 3], 'outside the image'), ([1, 2, 10**400, 4], 'outside the image'),
])
def test_bad_boxes(folder, bbox, reason, recwarn):
  content = changed('annotations', 0, 'bbox', bbox)
  with pytest.raises(InputError) as caught:
    load(folder, content)
  message = str(caught.value)
  for part in ('image 20', 'c.jpg', reason, "on_bad_box='drop'", '1 bad boxes', 'truth.json'):
    assert part in message
  assert '\n' not in message
  source = load(folder, content, on_bad_box='drop')
  assert source.contents.left_out and source.contents.left_out.count == 1
  assert source.contents.left_out.reasons == {reason: 1}
  assert f'1 {reason}' in str(source.contents.left_out)
  np.testing.assert_array_equal(source[2].labels, [1])
  assert [a['bbox'] for a in source.ground_truth()['annotations']] == [
      [10.5, 5, 20, 10], [0, 0, 10, 10.4]]
  assert not recwarn.list


def test_a_dropped_box_need_not_be_right_elsewhere(folder):
  content = changed('annotations', 0, {'image_id': 20, 'category_id': 3, 'bbox': [float('inf')] * 4,
                                       'area': float('nan')})
  assert load(folder, content, on_bad_box='drop').contents.left_out.count == 1


def test_many_bad_boxes_are_counted_and_few_are_named(folder):
  content = copy.deepcopy(GOOD)
  content['annotations'] += [{'image_id': 20, 'category_id': 3, 'bbox': [1, 1, 0, i]}
                             for i in range(50)]
  source = load(folder, content, on_bad_box='drop')
  assert source.contents.left_out.count == 50 and len(source.contents.left_out.first) == 5
  with pytest.raises(InputError, match='50 bad boxes in all'):
    load(folder, content)


def test_overshooting_by_a_pixel_is_cut_at_the_border(folder):
  edge = BORDER_TOLERANCE
  source = load(folder, changed('annotations', 0, 'bbox', [-edge, 2, 10 + 2 * edge, 8 + edge]))
  np.testing.assert_allclose(source[2].boxes[0], [0.2, 0, 1, 1])
  assert source.ground_truth()['annotations'][1]['bbox'] == [-edge, 2, 10 + 2 * edge, 8 + edge]


def test_missing_images_are_counted(folder):
  content = copy.deepcopy(GOOD)
  content['images'] += [{'id': 100 + i, 'file_name': f'{i:03d}.jpg', 'height': 5, 'width': 5}
                        for i in range(20)]
  with pytest.raises(InputError, match=r'20 of the 23 images .*: 000\.jpg, .*004\.jpg, \.\.\.'):
    load(folder, content)


def test_missing_folder_or_json(folder):
  with pytest.raises(InputError, match=f"at 'somewhere', seen from {os.getcwd()}"):
    CocoJson('somewhere', str(folder / 'truth.json'))
  with pytest.raises(InputError, match=r"no folder of images at '.*nowhere'$"):
    CocoJson(str(folder / 'nowhere'), str(folder / 'truth.json'))
  with pytest.raises(InputError, match=r"no annotations at '.*none\.json': No such file"):
    CocoJson(str(folder / 'images'), str(folder / 'none.json'))
  with pytest.raises(InputError, match=r'no annotations at .*: Is a directory'):
    CocoJson(str(folder / 'images'), str(folder))
  with pytest.raises(InputError, match=r'coco_json\.images is None, legal: a path'):
    CocoJson(None, str(folder / 'none.json'))
  with pytest.raises(InputError, match="on_bad_box is 'ignore', legal: 'clip', 'drop', 'raise'"):
    load(folder, on_bad_box='ignore')


def test_images_that_cannot_be_used(folder):
  source = load(folder)
  image = folder / 'images' / 'a.jpg'
  whole = image.read_bytes()
  for data, message in ((whole[:-40], 'truncated'), (b'', 'empty'), (b'text', 'not an image'),
                        (encode_jpeg(np.zeros((21, 40, 3), np.uint8)), '21 x 40')):
    image.write_bytes(data)
    with pytest.raises(InputError, match=rf'a\.jpg: .*{message}'):
      source[0]
  image.unlink()
  with pytest.raises(InputError, match=r'a\.jpg: cannot be read: No such file'):
    source[0]


@pytest.mark.parametrize('images, annotations, numbers', [
    ('coco100/train2017', 'coco100/annotations/instances_train2017.json', (50, 80, 470)),
    ('coco100/val2017', 'coco100/annotations/instances_val2017.json', (50, 80, 382)),
    ('voc300/train', 'voc300/instances_train.json', (3200, 20, 9679)),
    ('voc300/val', 'voc300/instances_val.json', (800, 20, 2261)),
])
def test_real_data_sets_load_clean(shared, images, annotations, numbers):
  file = shared / 'data' / annotations
  source = build_source({'name': 'coco_json', 'images': str(shared / 'data' / images),
                         'annotations': str(file)})
  truth, original = source.ground_truth(), json.loads(file.read_text())
  assert (len(source), len(source.categories), len(truth['annotations'])) == numbers
  kept = ('image_id', 'category_id', 'bbox', 'area', 'iscrowd')
  def table(annotations):
    return sorted([a[k] for k in kept] for a in annotations)
  assert table(truth['annotations']) == table(original['annotations'])
  for i in range(0, len(source), max(1, len(source) // 10)):
    example = source[i]
    assert example.image.shape[:2] == example.size
    height, width = example.size
    written = [a['bbox'] for a in original['annotations'] if a['image_id'] == example.image_id]
    ymin, xmin, ymax, xmax = example.boxes.T * np.float32([[height], [width]] * 2)
    np.testing.assert_allclose(np.stack([xmin, ymin, xmax - xmin, ymax - ymin], axis=-1),
                               np.reshape(written, (-1, 4)), atol=1e-3)


def split_in_two(folder):
  """Writes GOOD as two files, with the third image in the second one."""
  parts = []
  for name, ids in (('one', (30, 10)), ('two', (20,))):
    part = dict(GOOD, images=[i for i in GOOD['images'] if i['id'] in ids],
                annotations=[a for a in GOOD['annotations'] if a['image_id'] in ids])
    (folder / f'{name}.json').write_text(json.dumps(part))
    parts.append(str(folder / f'{name}.json'))
  return (str(folder / 'images'),) * 2, tuple(parts)


def test_several_files_are_one_data_set(folder):
  both = CocoJson(*split_in_two(folder))
  whole = load(folder)
  assert both.ground_truth() == whole.ground_truth() and both.max_boxes == whole.max_boxes
  for i in range(3):
    for ours, theirs in zip(both[i], whole[i], strict=True):
      np.testing.assert_array_equal(ours, theirs)


def test_several_files_that_do_not_fit(folder):
  folders, files = split_in_two(folder)
  with pytest.raises(InputError, match=r'image id 10 is in .*one\.json and .*one\.json'):
    CocoJson(folders, (files[0], files[0]))
  with pytest.raises(InputError, match='images are 2 folders and annotations 1 files'):
    CocoJson(folders, files[0])
  with pytest.raises(InputError, match='images are 0 folders and annotations 0 files'):
    CocoJson((), ())
  with pytest.raises(InputError, match=r'coco_json\.annotations is None'):
    CocoJson(folders, (files[0], None))
  (folder / 'two.json').write_text(json.dumps(changed('categories', 0, 'name', 'cow')))
  with pytest.raises(InputError, match=r"two\.json: its classes .* 'cow'"):
    CocoJson(folders, files)


def test_lists_of_ids(folder):
  ids = folder / 'ids.txt'
  ids.write_text('20\n\n  10 # and a remark\n')
  def kept(**options):
    return [i['id'] for i in load(folder, **options).ground_truth()['images']]
  assert kept(exclude_ids=str(ids)) == [30] and kept(include_ids=str(ids)) == [10, 20]
  source = load(folder, include_ids=str(ids))
  np.testing.assert_array_equal(source[1].labels, [0, 1])
  (folder / 'images' / 'a.jpg').unlink()
  assert kept(include_ids=str(ids)) == [10, 20]
  both = CocoJson(*split_in_two(folder), include_ids=str(ids))
  assert both.ground_truth() == source.ground_truth()
  bad = changed('annotations', 1, 'bbox', None)
  assert len(load(folder, bad, include_ids=str(ids))) == 2


@pytest.mark.parametrize('text, option, message', [
    ('30\nx7\n', 'exclude_ids', r"ids\.txt:2: 'x7', legal: an image id"),
    ('1' * 30, 'exclude_ids', r'ids\.txt:1: .*legal: an image id'),
    ('# none\n', 'include_ids', r'ids\.txt: no image ids'),
    ('30\n31\n', 'include_ids', r'ids\.txt: 1 of its 2 ids are not in the data, such as 31'),
    ('31\n32\n', 'exclude_ids', r'ids\.txt: none of its 2 ids is in the data, such as 31'),
    ('30\n10\n20', 'exclude_ids', r'ids\.txt: leaves no images'),
])
def test_wrong_lists_of_ids(folder, text, option, message):
  (folder / 'ids.txt').write_text(text)
  with pytest.raises(InputError, match=message):
    load(folder, **{option: str(folder / 'ids.txt')})


@pytest.mark.parametrize('write, ids', [
    (str, [30, 10, 20]), (float, [30, 10, 20]), (lambda i: f'{i}.0', [30, 10, 20]),
    (lambda i: f'img-{i}', [1, 2, 3]), (lambda i: '030' if i == 30 else f'{i}x', [1, 2, 3]),
    (lambda i: {30: '7', 10: '007', 20: '07'}[i], [1, 2, 3])])
def test_ids_of_other_types(folder, write, ids):
  content = copy.deepcopy(GOOD)
  for image in content['images']:
    image['id'] = write(image['id'])
  for a in content['annotations']:
    a['image_id'] = write(a['image_id'])
  source = load(folder, content)
  assert [i['id'] for i in source.ground_truth()['images']] == ids
  assert [a['image_id'] for a in source.ground_truth()['annotations']] == [ids[0], ids[2], ids[2]]
  assert source[2].image_id == ids[2] and all(type(i) is int for i in ids)
  notes = [n for n in source.contents.notes if 'image ids are strings such as' in n]
  assert bool(notes) == (ids == [1, 2, 3])


@pytest.mark.parametrize('write, ids', [
    (str, [3, 90]), (float, [3, 90]), (lambda i: {90: 'a', 3: 'b'}[i], [1, 2])])
def test_category_ids_of_other_types(folder, write, ids):
  content = copy.deepcopy(GOOD)
  for entry in content['categories']:
    entry['id'] = write(entry['id'])
  for a in content['annotations']:
    a['category_id'] = write(a['category_id'])
  source = load(folder, content)
  assert [c.id for c in source.categories] == ids
  names = [source.categories[k].name for k in source[2].labels]
  assert names == ['cat', 'dog'] and source.categories[source[0].labels[0]].name == 'dog'


def test_numbers_and_strings_may_be_mixed(folder):
  assert load(folder, changed('images', 0, 'id', '30'))[0].image_id == 30
  assert load(folder, changed('annotations', 1, 'image_id', '30'))[0].boxes.shape == (1, 4)
  assert load(folder, changed('images', 2, 'width', 10.0))[2].size == (10, 10)


def test_names_for_ids_in_several_files(folder):
  folders, files = split_in_two(folder)
  for file, to in zip(files, ('x', 'y'), strict=True):
    content = json.loads(open(file).read())
    for image in content['images']:
      image['id'] = f'{to}{image["id"]}'
    for a in content['annotations']:
      a['image_id'] = f'{to}{a["image_id"]}'
    with open(file, 'w') as f:
      json.dump(content, f)
  source = CocoJson(folders, files)
  assert [i['id'] for i in source.ground_truth()['images']] == [1, 2, 3]
  assert len(source[2].boxes) == 2


def test_classes_of_several_files_are_matched_by_name(folder):
  folders, files = split_in_two(folder)
  content = json.loads(open(files[1]).read())
  content['categories'] = [{'id': 1, 'name': 'dog'}, {'id': 2, 'name': 'cat'}]
  for a in content['annotations']:
    a['category_id'] = {90: 1, 3: 2}[a['category_id']]
  with open(files[1], 'w') as f:
    json.dump(content, f)
  source = CocoJson(folders, files)
  assert source.ground_truth() == load(folder).ground_truth()
  assert any("matched by name: 'dog' has the id 1 here and 90" in n for n in source.contents.notes)


@pytest.mark.parametrize('name', [
    'images\\sub\\b.jpg', 'sub\\b.jpg', 'images/sub/b.jpg', './sub/b.jpg', './images/sub/b.jpg',
    '{0}/images/sub/b.jpg'])
def test_file_names_as_others_write_them(folder, name):
  name = name.replace('\\', '\\').format(folder)
  source = load(folder, changed('images', 1, 'file_name', name))
  assert source[1].image.shape == (30, 20, 3)


@pytest.mark.parametrize('name, words', [
    ('C:\\data\\a.jpg', "did you mean 'a.jpg'"), ('https://x/a.jpg', "did you mean 'a.jpg'"),
    ('A.jpg', "did you mean 'a.jpg'"), ('a.png', "did you mean 'a.jpg'"),
    ('/data/a.jpg', "inside the folder of images; did you mean 'a"),
    ('..\\images\\a.jpg', "inside the folder of images; did you mean 'a"), ('zzz', 'zzz; a few')])
def test_file_names_that_lead_nowhere(folder, name, words):
  with pytest.raises(InputError, match=words):
    load(folder, changed('images', 0, 'file_name', name))


def outlined(*segmentations):
  """Returns GOOD with outlines instead of boxes."""
  content = copy.deepcopy(GOOD)
  for a, segmentation in zip(content['annotations'], segmentations, strict=True):
    del a['bbox']
    a['segmentation'] = segmentation
  return content


def test_outlines_in_place_of_boxes(folder):
  mask = {'size': [10, 10], 'counts': [12, 3, 7, 3, 75]}
  content = outlined([[1, 2, 4, 2, 4, 6]],
                     [[10.5, 5, 30, 5, 30, 15], [28, 8, 30.5, 9, 29, 9]], mask)
  with pytest.raises(InputError, match=r"no 'bbox' .*boxes_from='segmentation' takes .*"
                                       r'\(--config.data.train.boxes_from=segmentation\)'):
    load(folder, content)
  source = load(folder, content, boxes_from='segmentation')
  assert [a['bbox'] for a in source.ground_truth()['annotations']] == [
      [10.5, 5, 20, 10], [1, 2, 3, 4], [1, 2, 2, 3]]
  content['annotations'][0] |= {'bbox': [0, 0, 5, 5], 'segmentation': []}  # It has only a bbox.
  assert load(folder, content, boxes_from='segmentation').ground_truth(
      )['annotations'][1]['bbox'] == [0, 0, 5, 5]
  content['annotations'][1] |= {'bbox': None}
  content['annotations'][2] |= {'bbox': []}
  with pytest.raises(InputError, match=r"not four numbers.*boxes_from='segmentation'"):
    load(folder, content)
  with pytest.raises(InputError, match="boxes_from is 'mask', legal"):
    load(folder, boxes_from='mask')


@pytest.mark.parametrize('segmentation', [
    [[1, 2]], [[1, 2, 3]], [['a', 2, 3, 4]], {}, {'size': [10, 10]}, 'x', [], None, [[]], [3],
    {'size': [10, 10], 'counts': [100]}, {'size': [10, 10], 'counts': [1, 200]},
    [[10**400, 1, 2, 2]],
    {'size': [10, 10], 'counts': 'ooooooooooooooooooooo'}, {'size': [10, 10], 'counts': '\u00ff'},
    {'size': [10, 10], 'counts': [1, -1]}, {'size': ['a', 3], 'counts': [1, 1]}])
def test_outlines_that_are_none(folder, segmentation):
  content = outlined(segmentation, [[10.5, 5, 30, 5, 30, 15]], [[1, 2, 4, 2, 4, 6]])
  with pytest.raises(InputError, match='not four numbers'):
    load(folder, content, boxes_from='segmentation')


def test_boxes_of_masks_are_those_of_pycocotools():
  from pycocotools import mask as masks

  from ppn_jax.data.sources.coco_json import box_around
  rng = np.random.default_rng(0)
  for height, width in ((1, 1), (7, 5), (40, 60)):
    for share in (.02, .3, 1):
      pixels = np.asfortranarray((rng.random((height, width)) < share).astype(np.uint8))
      pixels[rng.integers(height), rng.integers(width)] = 1
      packed = masks.encode(pixels)
      expected = masks.toBbox(packed).tolist()
      assert box_around({'size': [height, width], 'counts': packed['counts'].decode()}) == expected
      flat = np.concatenate([[0], pixels.T.ravel(), [2]])
      counts = np.diff(np.flatnonzero(np.diff(flat)), prepend=-1 if flat[1] == 0 else 0).tolist()
      if flat[1] == 0:
        counts[0] = int(np.flatnonzero(pixels.T.ravel())[0])
        assert box_around({'size': [height, width], 'counts': counts}) == expected


def one_file_twice():
  content = copy.deepcopy(GOOD)
  content['images'].append({'id': 31, 'file_name': './a.jpg', 'height': 20, 'width': 40})
  content['annotations'] += [{'image_id': 31, 'category_id': 3, 'bbox': [0, 0, 5, 5]},
                             {'image_id': 31, 'category_id': 90, 'bbox': [10.5, 5, 20, 10]}]
  return content


def test_a_file_listed_as_several_images(folder):
  source = load(folder, one_file_twice())
  note, = source.contents.notes
  for part in ('1 file is listed as several images', 'a.jpg with the ids 30, 31',
               '(--config.data.train.merge_images=True)'):
    assert part in note
  merged = load(folder, one_file_twice(), merge_images=True)
  assert len(merged) == 3 and not merged.contents.notes
  np.testing.assert_allclose(merged[0].boxes, [[.25, .2625, .75, .7625], [0, 0, .25, .125]])
  assert merged[0].labels.tolist() == [1, 0] and merged.contents.merged.count == 1
  assert [a['image_id'] for a in merged.ground_truth()['annotations']] == [30, 30, 20, 20]
  with pytest.raises(InputError, match='merge_images is 3'):
    load(folder, merge_images=3)


def test_two_ids_of_one_class_name_are_noted(folder):
  source = load(folder, changed('categories', 0, 'name', 'cat'))
  assert any("2 classes are called 'cat', ids 3 and 90" in n for n in source.contents.notes)


def test_the_area_of_a_box_that_is_cut(folder):
  content = changed('annotations', 1, 'bbox', [-10, 0, 40, 20])
  content['annotations'][1]['area'] = 800
  assert load(folder, content).ground_truth()['annotations'][0]['area'] == 600
  content['annotations'][1]['area'] = 123  # The area of a mask.
  assert load(folder, content).ground_truth()['annotations'][0]['area'] == 123


def turned_image(path):
  """Writes an image that is 20 high and 40 wide as stored, and 40 high and 20 wide upright."""
  image = PIL.Image.fromarray(np.full((20, 40, 3), 100, np.uint8))
  exif = PIL.Image.Exif()
  exif[0x0112] = 6
  image.save(path, exif=exif)


def label_studio_export(name, *boxes):
  return {'images': [{'id': 0, 'file_name': f'../files/upload/1/{name}', 'height': 20,
                      'width': 40}],
          'annotations': [{'id': i, 'image_id': 0, 'category_id': 0, 'bbox': box}
                          for i, box in enumerate(boxes)],
          'categories': [{'id': 0, 'name': 'dog'}], 'info': {'contributor': 'Label Studio'}}


@pytest.mark.parametrize('stored', ['0a1b2c3d-a_1.jpg', 'a (1).jpg'])
def test_label_studio_s_exports(tmp_path, stored):
  (tmp_path / 'images').mkdir()
  turned_image(tmp_path / 'images' / stored)
  source = load(tmp_path, label_studio_export('0a1b2c3d-a_1.jpg', [5, 5, 10, 10]))
  assert source[0].image.shape == (40, 20, 3)
  np.testing.assert_allclose(source[0].boxes, [[5 / 40, 5 / 20, 15 / 40, 15 / 20]])
  note, = source.contents.notes
  assert '1 images are stored on their side' in note and stored in note
  missing = label_studio_export('0a1b2c3d-b.jpg', [5, 5, 10, 10])
  with pytest.raises(InputError, match=r'1 of the 1 images .* are not in .*0a1b2c3d-b.jpg'):
    load(tmp_path, missing)
  assert load(tmp_path, missing, on_bad_example='skip').contents.unreadable


def test_label_studio_s_exports_in_the_current_folder(tmp_path, monkeypatch):
  (tmp_path / 'images').mkdir()
  turned_image(tmp_path / 'images' / 'a.jpg')
  (tmp_path / 'truth.json').write_text(json.dumps(label_studio_export('0a1b2c3d-a.jpg')))
  monkeypatch.chdir(tmp_path)
  assert CocoJson('images', 'truth.json')[0].image.shape == (40, 20, 3)


@pytest.mark.parametrize('stored', [('a.jpg', 'sub/a.jpg'), ('a_1.jpg', 'a (1).jpg')])
def test_uploads_that_can_be_several_images(tmp_path, stored):
  for name in stored:
    (tmp_path / 'images' / name).parent.mkdir(parents=True, exist_ok=True)
    turned_image(tmp_path / 'images' / name)
  with pytest.raises(InputError, match=r'can be 2 images: .*give each its own name'):
    load(tmp_path, label_studio_export(f'0a1b2c3d-{stored[0]}', [5, 5, 10, 10]))


def test_two_uploads_of_one_image(tmp_path):
  (tmp_path / 'images').mkdir()
  turned_image(tmp_path / 'images' / 'a.jpg')
  content = label_studio_export('0a1b2c3d-a.jpg', [5, 5, 10, 10])
  content['images'].append(content['images'][0] | {
      'id': 1, 'file_name': '../files/upload/1/1a1b2c3d-a.jpg'})
  with pytest.raises(InputError, match=r"0a1b2c3d-a.jpg' and '1a1b2c3d-a.jpg' can both be .*a.jpg"):
    load(tmp_path, content)


def test_boxes_of_upright_images_with_the_sizes_of_stored_ones(tmp_path):
  (tmp_path / 'images').mkdir()
  turned_image(tmp_path / 'images' / 'a.jpg')
  content = label_studio_export('', [5, 5, 10, 10], [5, 25, 10, 10])
  del content['info']
  content['images'][0]['file_name'] = 'a.jpg'
  source = load(tmp_path, content)
  assert source[0].image.shape == (40, 20, 3) and len(source.contents.notes) == 1
  content['annotations'][1]['bbox'] = [5, 5, 30, 10]  # Inside the stored image only.
  source = load(tmp_path, content)
  assert source[0].image.shape == (20, 40, 3) and not source.contents.notes
  content['annotations'].append({'id': 2, 'image_id': 0, 'category_id': 0, 'bbox': [5, 25, 10, 10]})
  with pytest.raises(InputError, match='outside the image'):  # Neither fits all.
    load(tmp_path, content)
