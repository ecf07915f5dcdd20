"""YoloTxt on small folders with one error each, and on real images."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from ppn_jax.data.source import build_source
from ppn_jax.data.sources.voc import PascalVoc
from ppn_jax.data.sources.yolo import YoloTxt
from ppn_jax.detection.structures import Category
from ppn_jax.errors import InputError

YAML = 'path: .\ntrain: images/train\nval: [images/val]\nnames: {0: cat, 2: dog}\n'


def picture(path, size=(20, 40), **options):
  path.parent.mkdir(parents=True, exist_ok=True)
  Image.new('RGB', size[::-1], (90, 120, 150)).save(path, **options)


@pytest.fixture
def folder(tmp_path):
  picture(tmp_path / 'images/train/b_30.jpg')
  picture(tmp_path / 'images/train/sub/a_10.png', size=(10, 10))
  picture(tmp_path / 'images/val/c_20.jpg')
  labels = tmp_path / 'labels'
  (labels / 'train/sub').mkdir(parents=True)
  (labels / 'val').mkdir()
  (labels / 'train/b_30.txt').write_text('2 0.5 0.5 0.5 0.5\n\n 0.0 0.1 0.2 0.2 0.4 \r\n')
  (labels / 'val/c_20.txt').write_text('')
  (tmp_path / 'data.yaml').write_text(YAML)
  return tmp_path


def load(folder, split='train', **options):
  return YoloTxt(data=str(folder / 'data.yaml'), split=split, **options)


def test_examples(folder):
  source = load(folder)
  assert source.categories == (Category(0, 'cat'), Category(2, 'dog'))
  assert len(source) == 2 and source.max_boxes == 2 and not source.contents.left_out
  first, second = source[0], source[1]
  assert (first.image_id, second.image_id) == (30, 10)
  assert first.image.shape == (20, 40, 3) and first.size == (20, 40)
  np.testing.assert_allclose(first.boxes, [[.25, .25, .75, .75], [0, 0, .4, .2]], atol=1e-6)
  np.testing.assert_array_equal(first.labels, [1, 0])
  assert not first.crowd.any() and second.boxes.shape == (0, 4)
  assert load(folder, split='val').max_boxes == 0


def test_ground_truth(folder):
  truth = load(folder).ground_truth()
  json.dumps(truth)
  assert truth['images'][1] == {'id': 10, 'file_name': 'a_10.png', 'height': 10, 'width': 10}
  assert truth['annotations'][0] == {'id': 1, 'image_id': 30, 'category_id': 2, 'area': 200.0,
                                     'bbox': [10, 5, 20, 10], 'iscrowd': 0}


def test_explicit_folders(folder):
  options = {'images': str(folder / 'images/train'), 'names': ('cat', 'bird', 'dog')}
  for source in (YoloTxt(**options), YoloTxt(labels=str(folder / 'labels/train'), **options)):
    np.testing.assert_array_equal(source[0].labels, [2, 0])
  shutil.move(folder / 'images/train/b_30.jpg', folder / 'b_30.jpg')
  shutil.move(folder / 'labels/train/b_30.txt', folder / 'b_30.txt')
  shutil.rmtree(folder / 'images')
  assert len(YoloTxt(images=str(folder), names=['cat', 'bird', 'dog'])[0].boxes) == 2


def test_labels_are_found_from_a_relative_folder(folder, monkeypatch):
  monkeypatch.chdir(folder)
  assert YoloTxt(data='data.yaml').max_boxes == 2
  assert YoloTxt(images='images/train', names=['cat', 'bird', 'dog']).max_boxes == 2


def test_lists_of_images(folder):
  (folder / 'data.yaml').write_text('train: lists/t.txt\nnames: [cat, bird, dog]\n')
  (folder / 'lists').mkdir()
  listed = folder / 'lists' / 't.txt'
  listed.write_text(f'../images/train/sub/a_10.png\n\n{folder}/images/train/b_30.jpg\n')
  assert [i['id'] for i in load(folder).ground_truth()['images']] == [10, 30]
  listed.write_text('../images/train/b_30.jpg\n../../../../etc/passwd\n')
  assert load(folder).contents.notes == ('1 file not looked at: passwd',)
  listed.write_text('../images/train/b_31.jpg\n')
  with pytest.raises(InputError, match=r'1 of the 1 images that .*t\.txt lists are absent: .*b_31'):
    load(folder)


def test_an_export_with_one_step_too_many(folder):
  (folder / 'data.yaml').write_text('train: ../images/train\nnames: [cat, bird, dog]\n')
  assert len(load(folder)) == 2


def test_boxes_are_of_the_upright_image(folder):
  turned = Image.Exif()
  turned[0x0112] = 6
  picture(folder / 'images/train/b_30.jpg', exif=turned)
  source = load(folder)
  assert source[0].size == source[0].image.shape[:2] == (40, 20)
  assert source.ground_truth()['annotations'][0]['bbox'] == [5, 10, 10, 20]


def test_outlines(folder):
  row = '2 0.2 0.3 0.4 0.3 0.3 0.7 0.2 0.5\n'
  (folder / 'labels/train/b_30.txt').write_text(row)
  with pytest.raises(InputError, match=r"b_30\.txt:1: 8 numbers .*polygons='box'"):
    load(folder)
  np.testing.assert_allclose(load(folder, polygons='box')[0].boxes, [[.3, .2, .7, .4]], atol=1e-6)
  for bad, reason in (('x', 'not four numbers'), ('nan', 'not finite'), ('5', 'outside the image')):
    (folder / 'labels/train/b_30.txt').write_text(row.replace('0.4', bad))
    source = load(folder, polygons='box', on_bad_box='drop')
    assert source.contents.left_out.reasons == {reason: 1}


@pytest.mark.parametrize('row, reason', [
    ('2 .5 .5 .5', 'not four numbers'), ('2 .5 .5 .5 .5 .9', 'not four numbers'),
    ('2 .5 .5 half .5', 'not four numbers'), ('2', 'not four numbers'),
    ('2 nan .5 .5 .5', 'not finite'), ('2 .5 .5 1e999 .5', 'not finite'),
    ('2 .5 .5 0 .5', 'no area'), ('2 .5 .5 .5 -.5', 'no area'),
    ('2 1.1 .5 .5 .5', 'outside the image'), ('2 20 10 8 8', 'outside the image'),
])
def test_bad_boxes(folder, row, reason):
  (folder / 'labels/train/b_30.txt').write_text(f'0 .5 .5 .1 .1\n{row}\n')
  with pytest.raises(InputError, match=rf'b_30\.txt:2: .*image 30 .*{reason}.*on_bad_box') as e:
    load(folder)
  assert '\n' not in str(e.value)
  source = load(folder, on_bad_box='drop')
  assert source.contents.left_out.reasons == {reason: 1} and len(source[0].boxes) == 1


@pytest.mark.parametrize('content, message', [
    (b'1 .5 .5 .5 .5\n', r"b_30\.txt:1: class '1', legal: 0 to 2"),
    (b'dog .5 .5 .5 .5\n', r"b_30\.txt:1: class 'dog', legal"),
    (b'2.5 .5 .5 .5 .5\n', r"b_30\.txt:1: class '2\.5', legal"),
    (b'nan .5 .5 .5 .5\n', r"b_30\.txt:1: class 'nan', legal"),
    (b'\xff\xfe\x00\x80', r'b_30\.txt: not a text file'),
])
def test_wrong_labels(folder, content, message):
  (folder / 'labels/train/b_30.txt').write_bytes(content)
  with pytest.raises(InputError, match=message):
    load(folder, on_bad_box='drop')


@pytest.mark.parametrize('text, message', [
    ('', "it has no 'names'"), ('[1, 2', 'not valid yaml'), ('3', "it has no 'names'"),
    ('names: [a]', 'no split .train.; legal: none'),
    ('names: [a]\ntrian: x', "no split 'train'; did you mean 'trian'"),
    ('names: [a]\ntrain: {a: b}', 'train and path must be paths'),
    ('names: [a]\ntrain: [3]', 'train and path must be paths'),
    ('names: [a]\ntrain: nowhere', "no folder of images at .*nowhere"),
    ('names: [a]\ntrain: labels', 'no images in .*labels'),
    ('names: [a]\ntrain: [images/train, images/train]', 'train has an image twice'),
    ('names: 3\ntrain: images/train', "names is 3, legal"),
    ('names: []\ntrain: images/train', 'names is'), ('names: cat\ntrain: images/train', 'names is'),
    ('names: [no]\ntrain: images/train', "False for class 0, legal: .*quote"),
    ('names: {a: b}\ntrain: images/train', "'b' for class 'a'"),
    ('a: &a [x]\nb: [*a, *a]\nnames: [c]', 'has aliases'),
    ('!!python/object/apply:os.system ["true"]', 'not valid yaml'),
    ('[' * 5000, 'not valid yaml'),
])
def test_wrong_yaml(folder, text, message):
  (folder / 'data.yaml').write_text(text)
  with pytest.raises(InputError, match=message) as caught:
    load(folder)
  assert '\n' not in str(caught.value)


def test_wrong_folders_and_options(folder):
  images, names = str(folder / 'images/train'), ('cat', 'bird', 'dog')
  for options, message in (
      ({}, 'either data, a data.yaml, or images'),
      ({'data': 'x', 'images': 'y'}, 'either data'),
      ({'data': 'x', 'names': names}, 'names go with images'),
      ({'data': str(folder / 'none.yaml')}, 'cannot be read: No such file'),
      ({'images': images}, r'names is \(\), legal'),
      ({'images': images + 'x', 'names': names}, 'no folder of images'),
      ({'images': images, 'names': names, 'labels': 'nowhere'}, 'no folder of labels'),
      ({'images': images, 'names': names, 'polygons': 'keep'}, "legal: 'raise', 'box'"),
      ({'images': images, 'names': names, 'on_bad_box': 'keep'}, "legal: 'clip', 'drop', 'raise'")):
    with pytest.raises(InputError, match=message):
      YoloTxt(**options)
  (folder / 'labels/train/b_30.txt').unlink()
  with pytest.raises(InputError, match=r'none of the 2 images has a text file, such as .*labels'):
    load(folder)


def test_broken_images(folder):
  broken = folder / 'images/train/b_30.jpg'
  whole = broken.read_bytes()
  broken.write_bytes(whole[:-10])
  source = load(folder)
  with pytest.raises(InputError, match='truncated'):
    source[0]
  broken.write_bytes(b'text')
  with pytest.raises(InputError, match=r'b_30\.jpg: not an image'):
    load(folder)


def test_real_images_as_in_the_xml_they_come_from(shared, tmp_path):
  voc = PascalVoc(str(shared / 'data' / 'bccd'), split='test')
  truth = voc.ground_truth()
  (tmp_path / 'labels').mkdir()
  (tmp_path / 'images').symlink_to(shared / 'data' / 'bccd' / 'JPEGImages')
  for image in truth['images']:
    rows = [(a['category_id'] - 1, (a['bbox'][0] + a['bbox'][2] / 2) / image['width'],
             (a['bbox'][1] + a['bbox'][3] / 2) / image['height'], a['bbox'][2] / image['width'],
             a['bbox'][3] / image['height'])
            for a in truth['annotations'] if a['image_id'] == image['id']]
    stem = image['file_name'].removesuffix('.jpg')
    text = '\n'.join(' '.join(map(str, row)) for row in rows)
    (tmp_path / 'labels' / f'{stem}.txt').write_text(text)
  (tmp_path / 'list.txt').write_text('\n'.join(f'images/{i["file_name"]}'
                                               for i in truth['images']))
  (tmp_path / 'data.yaml').write_text('train: list.txt\nnames: [Platelets, RBC, WBC]\n')
  yolo = build_source({'name': 'yolo_txt', 'data': str(tmp_path / 'data.yaml')})
  assert len(yolo) == len(voc) == 72 and yolo.max_boxes == voc.max_boxes
  for index in (0, 30, 71):
    for ours, theirs in zip(yolo[index], voc[index], strict=True):
      np.testing.assert_allclose(ours, theirs, atol=1e-6)
