"""Data sets that annotation tools wrote themselves, in tests/data/written_by_tools."""

import json
import pathlib
import shutil

import numpy as np
import pytest
from data_formats import IMAGES, NAMES, picture, write

from ppn_jax.data.recognition.recognise import recognise
from ppn_jax.data.source import build_source

FILES = pathlib.Path(__file__).parent / 'written_by_tools'
# Folder: the source that reads it, and where the images belong that the tool left to its user.
SETS = {
    'labelme': ('labelme', '.'),
    'labelimg': ('pascal_voc', '.'),
    'datumaro/coco_instances': ('coco_json', 'images/train'),
    'datumaro/cvat': ('cvat_xml', 'images'),
    'datumaro/open_images': ('open_images', 'images/train'),
    'datumaro/voc_detection': ('pascal_voc', 'JPEGImages'),
    'datumaro/yolo': ('yolo_txt', 'obj_train_data'),
    'datumaro/yolo_ultralytics': ('yolo_txt', 'images/train'),
    'label_studio/JSON': ('label_studio', 'photos'),
    'label_studio/JSON_MIN': ('label_studio', 'photos'),
    'label_studio/COCO_WITH_IMAGES': ('coco_json', None),
    'label_studio/YOLO_WITH_IMAGES': ('yolo_txt', None),
    'label_studio/VOC': ('pascal_voc', None)}


def copy(name, folder):
  """Copies a set, with the images that belong to it, into a new folder."""
  shutil.copytree(FILES / name, folder)
  place = SETS[name][1]
  for image in IMAGES if place else ():
    at_validation = name.endswith('ultralytics') and image == 'd4.jpg'
    picture(folder / ('images/val' if at_validation else place) / image, IMAGES[image][0])
  return folder


@pytest.mark.parametrize('name', SETS)
def test_what_a_tool_wrote_is_found_and_read(name, tmp_path):
  found = recognise(str(copy(name, tmp_path / 'set')))
  assert found.source == SETS[name][0]
  more = {'unlabelled_as_empty': True} if found.source == 'pascal_voc' else {}
  boxes, sizes = {}, {}
  for options in (found.train, found.evaluation) if found.evaluation else (found.train,):
    source = build_source({'name': found.source, **options, **more})
    assert [c.name for c in source.categories] == list(NAMES)
    truth = source.ground_truth()
    names = {c['id']: c['name'] for c in truth['categories']}
    for image in truth['images']:
      image_name = image['file_name'].split('-')[-1]  # Label Studio puts letters in front.
      sizes[image_name] = (image['height'], image['width'])
      boxes[image_name] = [(names[a['category_id']], *np.round(a['bbox'], 3).tolist())
                           for a in truth['annotations'] if a['image_id'] == image['id']]
  # Open Images lists images only by their boxes.
  expected = {n: image for n, image in IMAGES.items()
              if found.source != 'open_images' or image[1]}
  assert sizes == {image_name: size for image_name, (size, _) in expected.items()}
  assert boxes == {image_name: objects for image_name, (_, objects) in expected.items()}


@pytest.mark.slow
@pytest.mark.parametrize('name', [*SETS, 'tf_records'])  # TensorFlow's own: test_tf_records.py.
def test_what_a_tool_wrote_trains(name, tmp_path, monkeypatch, capsys):
  from ppn_jax.cli.main import main
  if name == 'tf_records':
    write(tmp_path / 'photos', name)
  else:
    copy(name, tmp_path / 'photos')
  monkeypatch.chdir(tmp_path)
  flags = [f'--config.{entry}' for entry in (
      'model.image_size=64', 'model.backbone.depth_multiplier=0.25', 'model.backbone.last_block=5',
      'model.neck.stride=8', 'model.neck.num_levels=3', 'model.head.depth=16')]
  if name in SETS and SETS[name][0] == 'pascal_voc':
    flags.append('--config.data.train.unlabelled_as_empty=True')
  assert main(['data', 'photos', *flags]) == 0
  assert (f'to train: ppn train --config=photos_config.py {" ".join(flags)} --workdir=DIR'
          in capsys.readouterr().out)
  steps = [f'--config.{entry}' for entry in (
      'train.steps=20', 'train.batch_size=2', 'train.evaluate_every=20', 'train.log_every=10',
      'optim.learning_rate=0.01')]
  assert main(['train', '--config=photos_config.py', '--workdir=w', *flags, *steps]) == 0
  lines = (tmp_path / 'w/metrics.jsonl').read_text().splitlines()
  assert any('eval/AP' in json.loads(line) for line in lines)
