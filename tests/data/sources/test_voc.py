"""PascalVoc on small folders with one error each, and on real data."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image
from tiny import tiny_config

from ppn_jax.data.images.decoding import encode_jpeg
from ppn_jax.data.source import build_source
from ppn_jax.data.sources.voc import PascalVoc
from ppn_jax.detection.structures import Category
from ppn_jax.errors import InputError

OBJECT = ('<object><name>{name}</name><difficult>{difficult}</difficult><bndbox><xmin>{box[0]}'
          '</xmin><ymin>{box[1]}</ymin><xmax>{box[2]}</xmax><ymax>{box[3]}</ymax></bndbox>'
          '<part><name>head</name><bndbox><xmin>1</xmin></bndbox></part></object>')
DOG, CAT = ('dog', (11, 6, 30, 15), 0), ('cat', (1, 1, 40, 20), 1)


def xml(*objects, size=(20, 40)):
  sides = f'<size><width>{size[1]}</width><height>{size[0]}</height></size>' if size else ''
  body = ''.join(OBJECT.format(name=n, box=b, difficult=d) for n, b, d in objects)
  return (f'<annotation><filename>elsewhere.png</filename><source><database>The VOC2007 Database'
          f'</database></source>{sides}{body}</annotation>')


def write(folder, name, text, split='train', size=(20, 40), exif=None):
  """Adds an image with its XML file to a split."""
  for part in ('Annotations', 'JPEGImages', 'ImageSets/Main'):
    (folder / part).mkdir(parents=True, exist_ok=True)
  if text is not None:
    (folder / 'Annotations' / f'{name}.xml').write_bytes(
        text if isinstance(text, bytes) else text.encode())
  if size:
    image = Image.new('RGB', size[::-1], (90, 120, 150))
    options = {'exif': exif} if exif else {}
    image.save(folder / 'JPEGImages' / f'{name}.jpg', **options)
  if split:
    with (folder / 'ImageSets' / 'Main' / f'{split}.txt').open('a') as file:
      file.write(f'{name}\n')


@pytest.fixture
def folder(tmp_path):
  write(tmp_path, 'b_30', xml(DOG, CAT))
  write(tmp_path, 'a_10', xml())
  write(tmp_path, 'c_20', xml(('bird', (1, 1, 2, 2), 0)), split='val')
  return tmp_path


def test_examples(folder):
  source = PascalVoc(str(folder))
  assert len(source) == 2 and source.max_boxes == 2 and not source.contents.left_out
  first, second = source[0], source[1]
  assert (first.image_id, second.image_id) == (30, 10)
  assert first.image.shape == (20, 40, 3) and first.size == (20, 40)
  np.testing.assert_allclose(first.boxes, [[5 / 20, 10 / 40, 15 / 20, 30 / 40], [0, 0, 1, 1]],
                             rtol=1e-6)
  np.testing.assert_array_equal(first.labels, [2, 1])
  np.testing.assert_array_equal(first.crowd, [False, True])
  assert second.boxes.shape == (0, 4)


def test_ground_truth(folder):
  truth = PascalVoc(str(folder)).ground_truth()
  json.dumps(truth)
  assert truth['images'] == [{'id': 30, 'file_name': 'b_30.jpg', 'height': 20, 'width': 40},
                             {'id': 10, 'file_name': 'a_10.jpg', 'height': 20, 'width': 40}]
  assert truth['annotations'] == [
      {'id': 1, 'image_id': 30, 'category_id': 3, 'bbox': [10, 5, 20, 10], 'area': 200.0,
       'iscrowd': 0},
      {'id': 2, 'image_id': 30, 'category_id': 2, 'bbox': [0, 0, 40, 20], 'area': 800.0,
       'iscrowd': 1}]


def test_classes_are_those_of_all_splits(folder):
  every = (Category(1, 'bird'), Category(2, 'cat'), Category(3, 'dog'))
  assert PascalVoc(str(folder)).categories == every
  assert PascalVoc(str(folder), split='val').categories == every
  named = PascalVoc(str(folder), classes=('dog', 'cat', 'cow'))
  assert named.categories == (Category(1, 'dog'), Category(2, 'cat'), Category(3, 'cow'))
  np.testing.assert_array_equal(named[0].labels, [0, 1])


def test_xml_of_other_lists_may_be_broken_and_strays_are_not_read(folder):
  (folder / 'Annotations' / 'c_20.xml').write_text('<broken')
  (folder / 'Annotations' / 'stray.xml').write_text(xml(('alien', (1, 1, 2, 2), 0)))
  source = PascalVoc(str(folder))
  assert [c.name for c in source.categories] == ['cat', 'dog']
  note, = source.contents.notes
  assert note.startswith('1 xml files of other lists cannot be read') and 'c_20.xml' in note
  assert not PascalVoc(str(folder), classes=('cat', 'dog')).contents.notes
  with pytest.raises(InputError, match=r'c_20\.xml: not valid xml'):
    PascalVoc(str(folder), split='val', classes=('cat', 'dog'))


def test_an_image_with_neither_file_nor_xml_can_be_skipped(folder):
  lists(folder, 'b_30\nzzz\n')
  with pytest.raises(InputError, match='no xml file'):
    PascalVoc(str(folder))
  source = PascalVoc(str(folder), on_bad_example='skip')
  assert len(source) == 2 and len(source.contents.unreadable) == 1
  with pytest.raises(InputError, match='zzz: no such image'):
    source[1]
  # Skipping images does not excuse a missing XML file.
  write(folder, 'd_5', None)
  with pytest.raises(InputError, match='d_5'):
    PascalVoc(str(folder), on_bad_example='skip')


def test_options(folder):
  assert len(PascalVoc(str(folder), split='')) == 3
  assert not PascalVoc(str(folder), difficult_as_crowd=False)[0].crowd.any()
  edges = PascalVoc(str(folder), corners='edges')
  np.testing.assert_allclose(edges[0].boxes[0], [6 / 20, 11 / 40, 15 / 20, 30 / 40], rtol=1e-6)


@pytest.mark.parametrize('database, left', [
    ('Unknown', 11), ('The VOC2012 Database', 10), ('', 11), ('PASCAL_voc-2007', 10),
    ('VOC\n 07', 10), ('VOC20071', 11)])
def test_only_voc_itself_counts_pixels_from_1(folder, database, left):
  text = xml(DOG).replace('The VOC2007 Database', database)
  (folder / 'Annotations/b_30.xml').write_text(text)
  assert PascalVoc(str(folder)).ground_truth()['annotations'][0]['bbox'][0] == left


def test_pixel_0_is_none_that_is_counted_from_1(folder):
  (folder / 'Annotations/b_30.xml').write_text(xml(DOG, ('cat', (0, 0, 40, 20), 0)))
  source = PascalVoc(str(folder))
  assert [a['bbox'] for a in source.ground_truth()['annotations']] == [
      [11, 6, 19, 9], [0, 0, 40, 20]]


def test_files_that_count_in_different_ways_are_noted(folder):
  write(folder, 'd_5', xml(DOG).replace('VOC2007', 'my'))
  assert '1 of 2 xml files say in <database> that they are of VOC' in (
      PascalVoc(str(folder)).contents.notes[0])
  assert not PascalVoc(str(folder), corners='edges').contents.notes


def test_suffixes_of_xml_files_are_of_any_case(folder):
  (folder / 'Annotations/b_30.xml').rename(folder / 'Annotations/b_30.XML')
  for options in ({}, {'split': ''}, {'unlabelled_as_empty': True}):
    assert PascalVoc(str(folder), **options).ground_truth()['annotations'][0]['bbox'] == [
        10, 5, 20, 10]


def test_a_dangling_link_is_no_image_without_objects(folder):
  (folder / 'Annotations/b_30.xml').unlink()
  (folder / 'Annotations/b_30.xml').symlink_to(folder / 'nowhere')
  with pytest.raises(InputError, match=r'b_30.xml'):
    PascalVoc(str(folder), unlabelled_as_empty=True)


@pytest.mark.parametrize('options', [{}, {'unlabelled_as_empty': True}])
def test_names_in_lists_have_no_suffix(folder, options):
  (folder / 'ImageSets/Main/train.txt').write_text('b_30.jpg\na_10.jpg\n')
  with pytest.raises(InputError, match=r"no suffix, so write 'a_10'$"):
    PascalVoc(str(folder), **options)


def test_the_advice_is_only_for_images_that_are_there(folder):
  write(folder, 'd_5', None, size=None)
  with pytest.raises(InputError, match=r'have no xml file in .*: d_5$'):
    PascalVoc(str(folder))
  with pytest.raises(InputError, match=r"1 of the 3 images that '.*train.txt' names are not in .*"):
    PascalVoc(str(folder), unlabelled_as_empty=True)


def test_skipping_counts_only_the_images_that_are_there(folder):
  write(folder, 'd_5', None)
  write(folder, 'f_9', None, size=None)
  with pytest.raises(InputError, match=r'1 of the 4 images .* have no xml file .*: d_5; if these'):
    PascalVoc(str(folder), on_bad_example='skip')


def test_folders_of_images_are_not_looked_into(folder):
  (folder / 'JPEGImages/more').mkdir()
  assert '1 folder not looked into: more' in PascalVoc(
      str(folder), split='', unlabelled_as_empty=True).contents.notes


def test_labelme_xml_among_the_files(folder):
  (folder / 'Annotations/b_30.xml').write_text(
      '<annotation><object><name>dog</name><polygon/></object></annotation>')
  with pytest.raises(InputError, match=r'b_30.xml: object 1 has a polygon and no bndbox, as Label'):
    PascalVoc(str(folder), on_bad_box='drop')


def test_images_without_xml_are_without_objects_on_request(folder):
  write(folder, 'd_5', None)
  write(folder, 'e_6', None, split=None)
  with pytest.raises(InputError, match=r'1 of the 3 images .* have no xml file .*: d_5; if these '
                                       r'are images without objects, set unlabelled_as_empty=True'):
    PascalVoc(str(folder))
  source = PascalVoc(str(folder), unlabelled_as_empty=True)
  assert len(source) == 3 and source[2].boxes.shape == (0, 4) and source[2].size == (20, 40)
  source = PascalVoc(str(folder), split='')
  assert len(source) == 3 and any(
      '2 images without an xml file not used, such as ' in note
      and '--config.data.train.unlabelled_as_empty=True' in note for note in source.contents.notes)
  source = PascalVoc(str(folder), split='', unlabelled_as_empty=True)
  assert [i['file_name'] for i in source.ground_truth()['images']] == [
      'a_10.jpg', 'b_30.jpg', 'c_20.jpg', 'd_5.jpg', 'e_6.jpg']


def test_images_and_xml_in_one_folder(tmp_path):
  (tmp_path / 'x.xml').write_text(xml(DOG))
  (tmp_path / 'x.PNG').write_bytes(encode_jpeg(np.zeros((20, 40, 3), np.uint8)))
  (tmp_path / 'x.txt').write_text('no image')
  source = PascalVoc(str(tmp_path), split='', annotations='.', images='.')
  assert source[0].image.shape == (20, 40, 3) and source[0].image_id == 1


def test_names_without_different_digits_are_numbered(tmp_path):
  for name in ('x1_01', 'x10_1', 'y2'):
    write(tmp_path, name, xml(DOG))
  assert [e['id'] for e in PascalVoc(str(tmp_path)).ground_truth()['images']] == [1, 2, 3]


def test_sizes(tmp_path):
  turned = Image.Exif()
  turned[0x0112] = 6
  write(tmp_path, 'a1', xml(DOG, size=None))
  write(tmp_path, 'a2', xml(DOG, size=(0, 0)))
  # Upright or as stored, depending on the annotation program.
  write(tmp_path, 'a3', xml(DOG, size=(40, 20)), exif=turned)
  write(tmp_path, 'a4', xml(DOG, size=(20, 40)), exif=turned)
  for index, size in enumerate([(20, 40), (20, 40), (40, 20), (20, 40)]):
    assert PascalVoc(str(tmp_path), on_bad_box='drop')[index].image.shape[:2] == size
  write(tmp_path, 'a5', xml(DOG, size=(40, 80)))
  with pytest.raises(InputError, match=r'1 xml files state another size .*a5\.xml says 40 x 80, '
                                       r'.*a5\.jpg has 20 x 40; correct .* set check_size=False .*'
                                       r'\(--config\.data\.train\.check_size=False\)'):
    PascalVoc(str(tmp_path), on_bad_box='drop')
  source = PascalVoc(str(tmp_path), on_bad_box='drop', check_size=False)
  assert source[4].size == source[4].image.shape[:2] == (20, 40)


def test_a_broken_image_is_the_reader_s_concern(folder):
  (folder / 'JPEGImages' / 'a_10.jpg').write_bytes(b'')
  source = PascalVoc(str(folder))
  assert len(source[0].boxes) == 2
  with pytest.raises(InputError, match=r'a_10\.jpg: the file is empty'):
    source[1]
  (folder / 'Annotations' / 'a_10.xml').write_text(xml(size=None))
  with pytest.raises(InputError, match=r'a_10\.jpg: not an image'):
    PascalVoc(str(folder))


BOMB = ('<!DOCTYPE x [<!ENTITY a "aaaaaaaaaa">' + ''.join(
    f'<!ENTITY {b} "{f"&{a};" * 10}">' for a, b in zip('abcdefgh', 'bcdefghi', strict=True))
    + ']><annotation>&i;</annotation>')


@pytest.mark.parametrize('text, message', [
    ('', 'not valid xml'), ('<annotation>', 'not valid xml'), (b'\xff\xfe\0\x1f', 'not valid xml'),
    ('<?xml version="1.0" encoding="klingon"?><annotation/>', 'not valid xml'),
    (BOMB, 'has a document type or entities'),
    (BOMB.encode('utf-16'), 'has a document type or entities'),
    ('<!DOCTYPE a SYSTEM "file:///etc/passwd"><annotation/>', 'has a document type'),
    ('<html/>', 'outermost element is <html>'),
    ('<annotation><object/></annotation>', 'object 1 has no name'),
    (xml(DOG, ('dog', (1, 1, 2, 2), 'Unspecified')),
     "object 2: difficult is 'Unspecified', legal: 0, 1"),
])
def test_wrong_xml(folder, text, message):
  (folder / 'Annotations' / 'a_10.xml').write_bytes(
      text if isinstance(text, bytes) else text.encode())
  with pytest.raises(InputError, match=message) as caught:
    PascalVoc(str(folder))
  assert 'a_10.xml' in str(caught.value) and len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize('box, reason', [
    (('', 2, 3, 4), 'not four numbers'), (('one', 2, 3, 4), 'not four numbers'),
    (('nan', 2, 3, 4), 'not finite'), (('1e999', 2, 3, 4), 'not finite'),
    ((5, 2, 5, 4), 'no area'), ((5, 9, 8, 4), 'no area'), ((-7, 2, 5, 4), 'outside the image'),
    ((30, 2, 70, 4), 'outside the image'), ((5, 2, 8, '1' * 400), 'not finite'),
])
def test_bad_boxes(folder, box, reason):
  write(folder, 'd_5', xml(DOG, ('dog', box, 0)))
  with pytest.raises(InputError, match=f'd_5.xml: box .* of image 5 .*{reason}.*on_bad_box') as e:
    PascalVoc(str(folder))
  assert '\n' not in str(e.value)
  source = PascalVoc(str(folder), on_bad_box='drop')
  assert source.contents.left_out.reasons == {reason: 1}
  assert len(source[2].boxes) == 1


def test_a_missing_box_is_a_bad_one(folder):
  write(folder, 'd_5', '<annotation><object><name>dog</name></object></annotation>')
  source = PascalVoc(str(folder), on_bad_box='drop')
  assert source.contents.left_out.reasons == {'not four numbers': 1}


def test_pixels_counted_from_0_are_cut_at_the_border(folder):
  write(folder, 'd_5', xml(('dog', (0, 0, 39, 19), 0)))
  np.testing.assert_allclose(PascalVoc(str(folder))[2].boxes, [[0, 0, .95, .975]], rtol=1e-6)


def lists(folder, text):
  (folder / 'ImageSets' / 'Main' / 'train.txt').write_text(text)


@pytest.mark.parametrize('spoil, message', [
    (lambda f: lists(f, ''), 'train.txt: no images'),
    (lambda f: lists(f, 'b_30\nb_30\n'), "train.txt: 'b_30' is listed twice"),
    (lambda f: lists(f, '../x'), r"train.txt: entry 1 is '\.\./x', legal: a name"),
    (lambda f: lists(f, 'b_30 1'), r'1 of the 1 images .* no xml file in .*: b_30 1'),
    (lambda f: (f / 'Annotations' / 'a_10.xml').unlink(), '1 of the 2 .* no xml file .*: a_10'),
    (lambda f: (f / 'JPEGImages' / 'a_10.jpg').unlink(), '1 of the 2 .* are not in .*: a_10'),
    (lambda f: (f / 'JPEGImages' / 'a_10.png').write_bytes(b''), 'name of 2 images, a_10.jpg, '),
    (lambda f: (f / 'ImageSets' / 'Main' / 'train.txt').write_bytes(b'\xff\xfe'), 'cannot be read'),
    (lambda f: shutil.rmtree(f / 'Annotations'), 'no folder .*Annotations'),
    (lambda f: shutil.rmtree(f / 'JPEGImages'), 'no folder .*JPEGImages'),
    (lambda f: shutil.rmtree(f / 'ImageSets'), "no list of images .*split='' takes all"),
])
def test_wrong_folders(folder, spoil, message):
  spoil(folder)
  with pytest.raises(InputError, match=message):
    PascalVoc(str(folder))


@pytest.mark.parametrize('options, message', [
    ({'split': 'trian'}, r"no list of images at .*trian\.txt'; did you mean 'train'"),
    ({'split': '../train'}, 'pascal_voc.split is'), ({'split': 3}, 'pascal_voc.split is 3'),
    ({'classes': ('dog', 'kat')}, r"b_30\.xml: unknown class 'cat'; did you mean 'kat'"),
    ({'classes': ('dog', 'cat', 'dog')}, 'names one class twice'),
    ({'classes': 'dog'}, "classes is 'dog', legal: names"),
    ({'corners': 'middle'}, "corners is 'middle', legal: 'auto', 'pixels', 'edges'"),
    ({'on_bad_box': 'keep'}, "on_bad_box is 'keep'"),
    ({'folder': None}, 'pascal_voc.folder is None, legal: a path'),
])
def test_wrong_options(folder, options, message):
  with pytest.raises(InputError, match=message):
    PascalVoc(**({'folder': str(folder)} | options))


def test_no_objects_anywhere(tmp_path):
  write(tmp_path, 'a1', xml())
  with pytest.raises(InputError, match='have no objects; name the classes'):
    PascalVoc(str(tmp_path))
  assert PascalVoc(str(tmp_path), classes=('dog',)).max_boxes == 0


@pytest.mark.parametrize('split, images, boxes, dropped', [
    ('train', 205, 2804, 1), ('val', 87, 1137, 1), ('test', 72, 945, 0), ('', 364, 4886, 2)])
def test_real_blood_cells(shared, split, images, boxes, dropped):
  block = {'name': 'pascal_voc', 'folder': str(shared / 'data' / 'bccd'), 'split': split}
  source = build_source(block | {'on_bad_box': 'drop'})
  assert [c.name for c in source.categories] == ['Platelets', 'RBC', 'WBC']
  assert (len(source), len(source.ground_truth()['annotations'])) == (images, boxes)
  assert source.contents.left_out.count == dropped
  example = source[0]
  assert example.image.shape == (480, 640, 3) and example.boxes.max() <= 1
  if dropped:
    with pytest.raises(InputError, match='no area'):
      build_source(block)


@pytest.mark.slow
def test_training_on_blood_cells(shared, tmp_path):
  from ppn_jax.jobs.train import train
  config = tiny_config(steps=2, checkpoint_every=2).copy_and_resolve_references()
  config.data.train = dict(name='pascal_voc', folder=str(shared / 'data' / 'bccd'), split='train',
                           on_bad_box='drop')
  train(config.lock(), str(tmp_path))
  lines = [json.loads(line) for line in (tmp_path / 'metrics.jsonl').read_text().splitlines()]
  assert any('loss' in key for line in lines for key in line)
  assert len(json.loads((tmp_path / 'categories.json').read_text())) == 3
