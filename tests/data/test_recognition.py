"""Folders as people have them, and the data sets that are found there."""

import json
import pickle
import shutil

import numpy as np
import pytest
from data_formats import FORMATS, IMAGES, NAMES, instances, picture, write

from ppn_jax.config_files import load_config
from ppn_jax.data.recognition.recognise import recognise
from ppn_jax.data.recognition.tree import json_kind
from ppn_jax.data.splits import open_splits
from ppn_jax.errors import InputError
from ppn_jax.jobs.folder_config import check_writable, config_name, config_text

TWO = dict(list(IMAGES.items())[:2])
SOURCES = {'side_by_side': 'pascal_voc'}  # Of those that are called otherwise.


def config_of(folder, tmp_path, data_format=''):
  """Returns the config that is written for a folder."""
  found = recognise(str(folder), data_format)
  path = tmp_path / config_name(str(folder))
  text = config_text(found, str(folder))
  assert check_writable(str(path), text)
  path.write_text(text)
  assert not check_writable(str(path), text)
  return load_config(path)


def names_of(source):
  return sorted(i['file_name'] for i in source.ground_truth()['images'])


@pytest.mark.parametrize('data_format', FORMATS)
def test_each_format_is_found_and_opens(tmp_path, data_format):
  if data_format == 'tf_records':
    pytest.importorskip('tensorflow_datasets', reason='its copy of tf.train.Example is the writer')
  config = config_of(write(tmp_path / 'My photos!', data_format), tmp_path)
  assert config.data.train.name == SOURCES.get(data_format, data_format)
  opened = open_splits(config, ('train', 'eval'))
  assert [c.name for c in opened['train'].categories] == list(NAMES)
  files = [names_of(opened[split]) for split in ('train', 'eval')]
  assert len(files[1]) == 1 and not set(files[0]) & set(files[1])
  assert opened['train'][0].image.ndim == 3
  # Worker processes are sent the source.
  again = pickle.loads(pickle.dumps(opened['train']))
  np.testing.assert_array_equal(again[0].image, opened['train'][0].image)
  if data_format == 'pascal_voc':  # It has lists of its own.
    assert files[1] == ['d4.jpg'] and not config.data.eval_fraction
  else:
    assert config.data.eval_fraction == 0.1


@pytest.mark.parametrize('data_format', ['coco_json', 'side_by_side', 'cvat_xml', 'labelme',
                                         'label_studio', 'open_images', 'yolo_txt'])
def test_folders_for_each_split(tmp_path, data_format):
  """As exports of Roboflow and many scripts have them."""
  for split, images in (('train', IMAGES), ('valid', TWO), ('test', TWO)):
    write(tmp_path / 'set' / split, data_format, images)
  if data_format == 'yolo_txt':
    for file in (tmp_path / 'set').rglob('data.yaml'):
      file.unlink()
    (tmp_path / 'set/data.yaml').write_text(
        'train: ../train/images\nval: ../valid/images\ntest: ../test/images\nnames: [cat, dog]\n')
  opened = open_splits(config_of(tmp_path / 'set', tmp_path), ('train', 'eval'))
  every = [f for f in IMAGES if data_format != 'open_images' or IMAGES[f][1]]
  assert names_of(opened['train']) == every and names_of(opened['eval']) == list(TWO)


def test_the_layout_of_coco(tmp_path):
  (tmp_path / 'coco/annotations').mkdir(parents=True)
  for split, images in (('train', IMAGES), ('val', TWO)):
    for name in images:
      picture(tmp_path / 'coco' / f'{split}2017' / name, images[name][0])
    text = json.dumps(instances(images))
    for kind in ('instances', 'person_keypoints'):
      (tmp_path / 'coco/annotations' / f'{kind}_{split}2017.json').write_text(text)
    (tmp_path / 'coco/annotations' / f'captions_{split}2017.json').write_text(
        '{"images": [], "annotations": [{"caption": "a"}], "categories": []}')
  config = config_of(tmp_path / 'coco', tmp_path)
  assert config.data.train.images.endswith('coco/train2017')
  assert config.data.eval.annotations.endswith('annotations/instances_val2017.json')
  assert len(open_splits(config, ('eval',))['eval']) == 2


def test_voc_in_folders_of_other_names(tmp_path):
  folder = write(tmp_path / 'set', 'side_by_side')
  for place, suffix in (('labels', 'xml'), ('img', 'jpg')):
    (folder / place).mkdir()
    for path in folder.glob(f'*.{suffix}'):
      path.rename(folder / place / path.name)
  config = config_of(folder, tmp_path)
  assert (config.data.train.annotations, config.data.train.images) == ('labels', 'img')
  assert len(open_splits(config, ('train',))['train']) == 3


@pytest.mark.parametrize('place', ['', 'labels'])
def test_yolo_without_a_data_yaml(tmp_path, place):
  folder = write(tmp_path / 'set', 'yolo_txt')
  (folder / 'data.yaml').unlink()
  with pytest.raises(InputError, match=r'nothing names their classes: write a data.yaml'):
    recognise(str(folder))
  (folder / place / 'classes.txt').write_text('cat\n dog\n\n')
  (folder / 'notes.json').write_text('{"categories": []}')  # Label Studio adds it.
  config = config_of(folder, tmp_path)
  assert config.data.train.names == NAMES
  assert len(open_splits(config, ('train',))['train']) == 3


def test_one_of_several_formats_is_chosen_by_name(tmp_path):
  folder = write(write(tmp_path / 'set', 'side_by_side'), 'labelme')
  with pytest.raises(InputError, match=r'in 2 formats, Pascal VOC XML \(\.\), LabelMe JSON \(4 '
                                       r'files\); choose one: --format=pascal_voc or --format=lab'):
    recognise(str(folder))
  assert recognise(str(folder), 'labelme').source == 'labelme'
  with pytest.raises(InputError, match=r"--format=labelmee: did you mean 'labelme'"):
    recognise(str(folder), 'labelmee')
  with pytest.raises(InputError, match=r'no annotations that are known .*; legal: COCO JSON$'):
    recognise(str(folder), 'coco_json')


def test_what_is_ambiguous_or_unknown(tmp_path):
  with pytest.raises(InputError, match=r'no folder'):
    recognise(str(tmp_path / 'none'))
  picture(tmp_path / 'set/a.jpg', (8, 8))
  (tmp_path / 'set/results.json').write_text('[{"image_id": 1, "score": 0.5}]')
  (tmp_path / 'set/broken.json').write_text('{')
  with pytest.raises(InputError, match=r'no annotations that are known \(1 images, 2 .json\); '
                                       r'legal: COCO JSON, Pascal VOC XML'):
    recognise(str(tmp_path / 'set'))
  for name in ('one', 'two'):
    (tmp_path / 'set' / f'{name}.json').write_text(json.dumps(instances(IMAGES)))
  with pytest.raises(InputError, match=r'is a COCO file, but none of its images such as .a1.jpg'):
    recognise(str(tmp_path / 'set'))
  picture(tmp_path / 'set/a1.jpg', (48, 64))
  with pytest.raises(InputError, match=r'2 COCO JSON data sets, and their names do not say which '
                                       r'one to train on: one.json, two.json; name it: --config='):
    recognise(str(tmp_path / 'set'))


def test_label_studio_s_exports_in_coco_s_format(tmp_path):
  content = instances(IMAGES) | {'info': {'contributor': 'Label Studio'}}
  for image in content['images']:
    image['file_name'] = f'../files/upload/1/0a1b2c3d-{image["file_name"]}'
  picture(tmp_path / 'set/images/0a1b2c3d-a1.jpg', (48, 64))
  (tmp_path / 'set/result.json').write_text(json.dumps(content))
  assert recognise(str(tmp_path / 'set')).train['images'] == str(tmp_path / 'set')


@pytest.mark.parametrize('name, text, message', [
    ('export.zip', '', 'unpack the archive first'),
    ('labels/0a1b2c3d-a.txt', '0 0.5 0.5 0.1 0.1', "look like those of YOLO.*'YOLO with Images'"),
    ('a.xml', '<annotation><source><sourceImage/></source></annotation>',  # LabelMe's on the web.
     r'no annotations that are known .*; .* Datumaro may convert them: .*datum convert -i .*set '),
    ('label_2/a.txt', 'dog 0 0 0.0 8 12 24 36 0 0 0 0 0 0 0', 'Datumaro may convert them')])
def test_what_is_nearly_a_data_set(tmp_path, name, text, message):
  picture(tmp_path / 'set/a.jpg', (8, 8))
  (tmp_path / 'set' / name).parent.mkdir(exist_ok=True)
  (tmp_path / 'set' / name).write_text(text)
  with pytest.raises(InputError, match=message):
    recognise(str(tmp_path / 'set'))


def test_an_error_of_a_known_format_gets_no_advice_on_others(tmp_path):
  picture(tmp_path / 'set/b.jpg', (8, 8))
  (tmp_path / 'set/one.json').write_text(json.dumps(instances(IMAGES)))
  with pytest.raises(InputError, match=r'but none of its images such as .a1.jpg. is in \S+$'):
    recognise(str(tmp_path / 'set'))


@pytest.mark.parametrize('data_format', ['coco_json', 'pascal_voc', 'yolo_txt'])
def test_annotations_of_heic_pictures(tmp_path, data_format):
  folder = write(tmp_path / 'set', data_format)
  for image in [p for p in folder.rglob('*') if p.suffix in ('.jpg', '.png')]:
    image.rename(image.with_suffix('.HEIC'))
  (folder / 'data.yaml').unlink(missing_ok=True)
  with pytest.raises(InputError, match=r'HEIC pictures are not read: convert them to JPEG'):
    recognise(str(folder))


def test_pictures_that_cannot_be_read_are_spoken_of(tmp_path):
  write(tmp_path / 'set', 'coco_json')
  (tmp_path / 'set' / 'IMG_1.HEIC').write_bytes(b'')
  assert recognise(str(tmp_path / 'set')).lines[-1].startswith(
      'left alone: 1 HEIC pictures such as IMG_1.HEIC')


def test_two_label_maps(tmp_path):
  pytest.importorskip('tensorflow_datasets', reason='its copy of tf.train.Example is the writer')
  folder = write(tmp_path / 'set', 'tf_records')
  shutil.copytree(folder, folder / 'val')
  with pytest.raises(InputError, match=r'2 label maps, label_map.pbtxt and val/label_map.pbtxt'):
    recognise(str(folder))
  (folder / 'val/label_map.pbtxt').unlink()
  for file in (folder / 'val').iterdir():
    file.rename(file.with_name(file.name.replace('train', 'val')))
  config = config_of(folder, tmp_path)
  assert len(open_splits(config, ('eval',))['eval']) == 4
  assert config.data.eval.records.endswith('val/val.record-*')


def test_data_of_tfds(tmp_path):
  pytest.importorskip('tensorflow_datasets')
  from ppn_jax.data.prepare import Options, prepare
  from ppn_jax.data.sources.synthetic import SyntheticShapes
  made = prepare({s: SyntheticShapes(2, image_size=48, split=s) for s in ('train', 'eval')},
                 tmp_path / 'data', Options('toy', threads=1), progress=lambda *step: None)
  config = config_of(tmp_path / 'data', tmp_path)
  assert config.data.train.to_dict() == dict(
      name='tfds', dataset='', data_dir=str(made), split='train', on_bad_box='clip')
  assert len(open_splits(config, ('eval',))['eval']) == 2


@pytest.mark.parametrize('data_format', ['coco_json', 'labelme', 'label_studio'])
def test_large_json_files_are_told_by_their_ends(tmp_path, data_format, monkeypatch):
  folder = write(tmp_path, data_format)
  file = next(folder.glob('*.json'))
  whole = json_kind(str(file))
  monkeypatch.setattr('ppn_jax.data.recognition.tree._PARSED_BYTES', 100)
  monkeypatch.setattr('ppn_jax.data.recognition.tree._HEAD', 200)
  assert json_kind(str(file)) == whole == data_format.removesuffix('_json')
  assert recognise(str(folder)).source == data_format


def test_config_files_are_not_overwritten(tmp_path):
  path = str(tmp_path / 'x_config.py')
  (tmp_path / 'x_config.py').write_text('# mine\n')
  with pytest.raises(InputError, match='exists and has other contents'):
    check_writable(path, 'text')
  with pytest.raises(InputError, match=r"no folder '.*absent'"):
    check_writable(str(tmp_path / 'absent/x.py'), 'text')
  with pytest.raises(InputError, match=r'a config file ends in .py'):
    check_writable(str(tmp_path / 'x.txt'), 'text')
