"""Sources that read the files of CVAT, LabelMe, Label Studio and Open Images."""

import csv
import json

import numpy as np
import pytest
from data_formats import IMAGES, NAMES, instances, label_studio_task, picture, write

from ppn_jax.data.source import build_source
from ppn_jax.errors import InputError

# Options of each source, relative to the folder that `write` fills.
PATHS = {
    'cvat_xml': dict(annotations='annotations.xml'),
    'label_studio': dict(annotations='project-7-at-2026-01-01.json', images='images'),
    'labelme': dict(folder='.'),
    'open_images': dict(annotations='boxes.csv', images='images',
                        class_descriptions='class-descriptions.csv')}


def load(folder, name, *, on_bad_example='raise', **options):
  paths = {key: str(folder / value) for key, value in PATHS[name].items()}
  return build_source({'name': name, **paths, **options}, on_bad_example=on_bad_example)


@pytest.fixture(params=sorted(PATHS))
def written(request, tmp_path):
  return write(tmp_path, request.param), request.param


def boxes_of(truth):
  files = {i['id']: i['file_name'] for i in truth['images']}
  names = {c['id']: c['name'] for c in truth['categories']}
  return [(files[a['image_id']], names[a['category_id']], *np.round(a['bbox'], 6).tolist())
          for a in truth['annotations']]


def test_all_formats_give_the_same_boxes(written):
  folder, name = written
  source = load(folder, name)
  truth = source.ground_truth()
  assert boxes_of(truth) == boxes_of(instances(IMAGES))
  assert [c.name for c in source.categories] == list(NAMES)
  # Open Images lists images only by their boxes.
  files = [f for f in IMAGES if name != 'open_images' or IMAGES[f][1]]
  assert [i['file_name'] for i in truth['images']] == files
  assert [(i['height'], i['width']) for i in truth['images']] == [IMAGES[f][0] for f in files]
  first = source[0]
  assert first.image.shape == (48, 64, 3) and first.labels.tolist() == [1, 0]
  np.testing.assert_allclose(first.boxes[0], [12 / 48, 8 / 64, 36 / 48, 24 / 64], atol=1e-6)


def test_missing_and_damaged_images_are_skipped_on_request(written):
  folder, name = written
  place = folder if name == 'labelme' else folder / 'images'
  (place / 'b2.jpg').unlink()
  if name == 'open_images':  # Its file lists many more images than anybody has.
    assert "1 image of" in load(folder, name).contents.notes[0]
    (place / 'a1.jpg').write_bytes(b'no image')
    with pytest.raises(InputError, match=r'on_bad_example=skip'):
      load(folder, name)
  else:
    with pytest.raises(InputError, match=r"1 of 4 images are missing: .*b2.jpg'? is not in .*skip"):
      load(folder, name)
  source = load(folder, name, on_bad_example='skip')
  (bad, why), = source.contents.unreadable
  assert len(source) == (2 if name == 'open_images' else 4) and why
  with pytest.raises(InputError):
    source[bad]
  assert source[bad + 1].image.ndim == 3


def test_other_sizes_than_stated_are_an_error(written):
  folder, name = written
  if name == 'open_images':
    pytest.skip('it states none')
  picture((folder if name == 'labelme' else folder / 'images') / 'b2.jpg', (16, 32))
  with pytest.raises(InputError, match=r"says 32 x 64, .*b2.jpg has 16 x 32.*check_size=False"):
    load(folder, name)
  bad = dict(on_bad_box='drop', check_size=False)
  assert load(folder, name, **bad).ground_truth()['images'][1]['width'] == 32


def test_classes_by_name(written):
  folder, name = written
  source = load(folder, name, classes=('dog', 'fox', 'cat'))
  assert source[0].labels.tolist() == [0, 2] and source.categories[1] == (2, 'fox')
  if name == 'open_images':
    assert load(folder, name, classes=('dog',)).contents.notes[0] == (
        '2 boxes of other classes left out')
  else:
    with pytest.raises(InputError, match=r"unknown class 'dog'; .*'cat'"):
      load(folder, name, classes=('cat',))


@pytest.mark.parametrize('name, old, new, message', [
    ('cvat_xml', 'xbr="24"', 'xbr="x"', "not four numbers"),
    ('cvat_xml', 'xbr="24"', 'xbr="8"', 'no area'),
    ('label_studio', '"width": 25.0', '"width": "25"', 'not four numbers'),
    ('label_studio', '"width": 25.0', '"width": -25.0', 'no area'),
    ('open_images', ',0.125000,', ',far,', 'not four numbers'),
    ('labelme', '[24, 36]', '[24, 12]', 'no area'),
    ('labelme', '[[8, 12], [24, 36]]', '[]', 'not four numbers'),
    ('labelme', '[24, 36]', '[240, 36]', 'outside the image')])
def test_wrong_boxes_are_dropped_on_request(tmp_path, name, old, new, message):
  folder = write(tmp_path, name)
  file = folder / PATHS[name].get('annotations', 'a1.json')
  text = file.read_text().replace('xbr="24.00"', 'xbr="24"').replace('xbr="24.0"', 'xbr="24"')
  assert old in text
  file.write_text(text.replace(old, new, 1))
  with pytest.raises(InputError, match=rf"box .*a1.*: {message}.*on_bad_box='drop'"):
    load(folder, name)
  source = load(folder, name, on_bad_box='drop')
  assert source.contents.left_out.count == 1 and len(source[0].boxes) == 1


def test_turned_boxes_become_upright(tmp_path):
  folder = write(tmp_path, 'cvat_xml')
  file = folder / 'annotations.xml'
  text = file.read_text().replace('<box label="dog"', '<box rotation="90" label="dog"', 1)
  file.write_text(text.replace('</image>', '<ellipse label="dog" cx="20" cy="20" rx="4" ry="8"/>'
                                           '<mask label="cat" rle="1" left="3" top="4" width="5" '
                                           'height="6"/><points label="cat" points="1,2"/>'
                                           '<polygon label="cat" points="1,2;9,2;5,30"/></image>',
                               1))
  source = load(folder, 'cvat_xml')
  boxes = [a['bbox'] for a in source.ground_truth()['annotations'][:5]]
  # 16 x 24 about its centre (16, 24); the ellipse, the mask and the polygon follow.
  np.testing.assert_allclose(boxes, [[4, 16, 24, 16], [32, 6, 16, 12], [16, 12, 8, 16],
                                     [3, 4, 5, 6], [1, 2, 8, 28]], atol=1e-9)
  assert source.contents.notes == ('1 shape left out: points, lines, cuboids',)


def studio(tmp_path, *tasks):
  for name, (size, _) in IMAGES.items():
    picture(tmp_path / 'images' / name, size)
  (tmp_path / PATHS['label_studio']['annotations']).write_text(json.dumps(tasks))
  return tmp_path


def task(**region):
  """Returns a task on a1.jpg, 64 x 48, with one region whose value is changed."""
  made = label_studio_task('a1.jpg', IMAGES['a1.jpg'][0], [('dog', 16, 24, 16, 12)])
  made['annotations'][0]['result'][0]['value'] |= region
  return made


def test_label_studio_shapes(tmp_path):
  result = task()['annotations'][0]['result'][0]
  shape = lambda value: result | {'value': value}
  made = task(rotation=90)  # Clockwise about its first corner.
  made['annotations'][0]['result'] += [
      shape({'points': [[0, 0], [50, 0], [25, 50]], 'polygonlabels': ['cat']}),
      shape({'x': 50, 'y': 50, 'radiusX': 10, 'radiusY': 20, 'ellipselabels': ['cat']}),
      shape({'x': 5, 'y': 5, 'width': 1, 'keypointlabels': ['cat']}),
      shape({'rle': [1], 'brushlabels': ['cat']})]
  source = load(studio(tmp_path, made), 'label_studio')
  np.testing.assert_allclose([a['bbox'] for a in source.ground_truth()['annotations']], [
      [4, 24, 12, 16], [0, 0, 32, 24], [25.6, 14.4, 12.8, 19.2]])
  assert source.contents.notes == ('2 shapes left out: masks, key points',)


def test_label_studio_chooses_an_annotation(tmp_path):
  cancelled, second, truth = task(), task(), task()
  made = label_studio_task('b2.jpg', IMAGES['b2.jpg'][0], [('cat', 1, 2, 3, 4)], 2)
  cancelled['annotations'][0]['was_cancelled'] = True
  truth['annotations'][0] |= {'ground_truth': True}
  truth['annotations'][0]['result'][0]['value']['rectanglelabels'] = ['fox', 'dog']
  several = task()
  several['annotations'] = (cancelled['annotations'] + second['annotations']
                            + truth['annotations'])
  unlabelled = label_studio_task('d4.jpg', IMAGES['d4.jpg'][0], [], 4) | {'annotations': []}
  source = load(studio(tmp_path, several, made, unlabelled), 'label_studio')
  assert boxes_of(source.ground_truth())[:2] == [('a1.jpg', 'fox', 16, 24, 16, 12),
                                                 ('a1.jpg', 'dog', 16, 24, 16, 12)]
  assert len(source) == 2 and len(source.contents.notes) == 2


@pytest.mark.parametrize('url', [
    '/data/local-files/?d=photos/images/a1.jpg', 's3://bucket/far/a1.jpg', 'a1.jpg',
    'https://host/files/a1.jpg?token=x', 'C:\\photos\\a1.jpg'])
def test_label_studio_finds_images(tmp_path, url):
  source = load(studio(tmp_path, task() | {'data': {'image': url}}), 'label_studio')
  assert source.ground_truth()['images'][0]['file_name'] == 'a1.jpg'


def test_label_studio_finds_images_by_their_names_before_an_upload(tmp_path):
  path = studio(tmp_path, task() | {'data': {
      'image': '/data/upload/7/0a1b2c3d-A_dog_1__%C3%BC.jpg'}})
  (tmp_path / 'images/a1.jpg').rename(tmp_path / 'images/A dog (1) – ü.jpg')
  source = load(path, 'label_studio')
  assert source.ground_truth()['images'][0]['file_name'] == 'A dog (1) – ü.jpg'


def test_all_missing_images_are_counted_and_some_named(tmp_path):
  tasks = [task() | {'data': {'image': f'far/{i}.jpg'}, 'file_upload': ''} for i in range(3)]
  with pytest.raises(InputError, match=(
      r"3 of 3 images are missing: .*'far/0.jpg' is not in .*, nor far/1.jpg, far/2.jpg; is this "
      r'the right folder')):
    load(studio(tmp_path, *tasks), 'label_studio')
  with pytest.raises(InputError, match=r'3 of 4 .*max_bad_share=1\)'):
    load(studio(tmp_path, *tasks, task()), 'label_studio')


def test_label_studio_json_min(tmp_path):
  region = task()['annotations'][0]['result'][0]
  small = {'image': '/data/upload/7/0a1b2c3d-a1.jpg', 'id': 1, 'annotator': 1,
           'label': [region['value'] | {'original_width': 64, 'original_height': 48}]}
  empty = {'image': '/data/upload/7/0a1b2c3d-b2.jpg', 'id': 2, 'annotator': 1}
  source = load(studio(tmp_path, small, empty), 'label_studio')
  assert boxes_of(source.ground_truth()) == [('a1.jpg', 'dog', 16, 24, 16, 12)]
  assert len(source) == 2


@pytest.mark.parametrize('change, message', [
    (lambda t: t['annotations'][0]['result'][0].update(image_rotation=90), 'turned by 90 degrees'),
    (lambda t: t['annotations'][0]['result'][0]['value'].pop('rectanglelabels'), 'has no label'),
    (lambda t: t['annotations'][0]['result'][0]['value'].update(rectanglelabels=[3]), 'names of'),
    (lambda t: t.update(data={'a': 'x.jpg', 'b': 'y.jpg'}), '2 entries of its data can be'),
    (lambda t: t.update(annotations=[]), 'none of its 1 tasks has an annotation'),
    (lambda t: t.update(annotations={}), 'legal: a list, each with a result')])
def test_label_studio_errors(tmp_path, change, message):
  made = task()
  change(made)
  with pytest.raises(InputError, match=message):
    load(studio(tmp_path, made), 'label_studio')


@pytest.mark.parametrize('name, file, text, message', [
    ('cvat_xml', 'annotations.xml', '<annotation/>', "outermost element is <annotation>"),
    ('cvat_xml', 'annotations.xml', '<annotations><track/></annotations>', 'CVAT for video'),
    ('cvat_xml', 'annotations.xml', '<annotations/>', 'no images'),
    ('cvat_xml', 'annotations.xml', '<!DOCTYPE a><annotations/>', 'document type'),
    ('cvat_xml', 'annotations.xml', '<annotations><image name="a1.jpg"><box/></image>'
     '</annotations>', 'has no label'),
    ('label_studio', 'project-7-at-2026-01-01.json', '{}', 'not an export of Label Studio'),
    ('label_studio', 'project-7-at-2026-01-01.json', '[', 'not valid JSON'),
    ('labelme', 'a1.json', '{', 'a1.json: not valid JSON'),
    ('labelme', 'a1.json', '{"shapes": [{"label": 3}], "imagePath": "a1.jpg"}', 'label 3'),
    ('labelme', 'a1.json', '{"shapes": [{"label": "a", "shape_type": "star"}], '
     '"imagePath": "a1.jpg"}', "shape_type 'star'"),
    ('labelme', 'a1.json', '{"shapes": [], "imagePath": "b2.jpg"}', 'are both about'),
    ('open_images', 'boxes.csv', 'a,b\n1,2\n', "no column 'ImageID'"),
    ('open_images', 'boxes.csv', '', "no column 'ImageID'"),
    ('open_images', 'boxes.csv', 'ImageID,LabelName,XMin,XMax,YMin,YMax\na1,/m/cat\n',
     'boxes.csv:2: 2 fields, needed: 6'),
    ('open_images', 'boxes.csv', 'ImageID,LabelName,XMin,XMax,YMin,YMax\na1,/m/x,0,1,0,1\n',
     "'/m/x' is not among the 2"),
    ('open_images', 'boxes.csv', 'ImageID,LabelName,XMin,XMax,YMin,YMax\nzz,/m/cat,0,1,0,1\n',
     'none of its 1 images is in')])
def test_errors(tmp_path, name, file, text, message):
  folder = write(tmp_path, name)
  (folder / file).write_text(text)
  with pytest.raises(InputError, match=message):
    load(folder, name)


def test_groups_of_open_images_are_crowds(tmp_path):
  folder = write(tmp_path, 'open_images')
  file = folder / 'boxes.csv'
  rows = list(csv.reader(file.open()))
  rows[1][rows[0].index('IsGroupOf')] = '1'
  with file.open('w') as f:
    csv.writer(f).writerows(rows)
  assert load(folder, 'open_images')[0].crowd.tolist() == [True, False]


def test_labelme_finds_images_by_the_name_of_the_json_file(tmp_path):
  folder = write(tmp_path, 'labelme')
  file = folder / 'a1.json'
  file.write_text(file.read_text().replace('"a1.jpg"', json.dumps('D:\\old\\IMG_7.jpg')))
  assert load(folder, 'labelme').ground_truth()['images'][0]['file_name'] == 'a1.jpg'


def test_names_of_several_images_are_ambiguous(tmp_path):
  folder = write(tmp_path, 'cvat_xml')
  for inside in ('x', 'y'):
    picture(folder / 'images' / inside / 'a1.jpg', IMAGES['a1.jpg'][0])
  assert len(load(folder, 'cvat_xml')) == 4  # The exact path counts.
  (folder / 'images/a1.jpg').unlink()
  with pytest.raises(InputError, match=r"'a1.jpg' can be 2 images"):
    load(folder, 'cvat_xml')
