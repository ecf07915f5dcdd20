"""Damaged files of every format give a source that works or an error of one line.

PPN_FUZZ=N makes N mutations of each format instead of a few.
"""

import json
import os
import random
import re

import data_formats
import numpy as np
import pytest
from PIL import Image

from ppn_jax.data.images.decoding import encode_jpeg
from ppn_jax.data.prepare import Options, prepare
from ppn_jax.data.report import report
from ppn_jax.data.source import SOURCES
from ppn_jax.data.sources.coco import CocoJson
from ppn_jax.data.sources.synthetic import SyntheticShapes
from ppn_jax.data.sources.tfds import Tfds
from ppn_jax.data.sources.voc import PascalVoc
from ppn_jax.data.sources.yolo import YoloTxt
from ppn_jax.errors import InputError
from ppn_jax.registry import load

OUTLINES = [[[1.5, 2, 21.5, 2, 21.5, 12]], {'size': [30, 40], 'counts': 'j37g0000ln0'}]
MUTATIONS = int(os.environ.get('PPN_FUZZ', 60))
TOKENS = [
    b'', b'0', b'-1', b'1e999', b'nan', b'inf', b'9' * 400, b'1' * 20, b'2.5', b'1_0', b'null',
    b'true', b'[]', b'{}', b'[' * 3000, b'"', b'<', b'>', b'</object>', b'<object>', b'&x;',
    b'<!--', b'<![CDATA[', b'<?xml version="1.0" encoding="utf-7"?>', b'../..', b'/etc/passwd',
    b'*a', b'&a ', b'!!python/name:os.system ', b'- ', b': ', b'\n', b' ', b'\0', b'\xff\xfe',
    b'\x0c', b'\xc2\xa0', b'\xe2\x80\xa8', '\u0663'.encode()]


def mutate(data, rng):
  """Changes `data` in a few places."""
  data = bytearray(data)
  for _ in range(rng.choice([1, 1, 1, 2, 3, 8])):
    i = rng.randrange(len(data) + 1)
    j = min(len(data), i + rng.choice([1, 1, 2, 4, 8, 30, 200]))
    words = list(re.finditer(rb'[\w.]+', bytes(data[i:i + 400])))
    kind = rng.randrange(7)
    if kind == 0 and j > i:
      data[i] = rng.randrange(256)
    elif kind == 1 and words:
      data[i + words[0].start():i + words[0].end()] = rng.choice(TOKENS)
    elif kind == 2:
      data[i:j] = rng.choice(TOKENS)
    elif kind == 3:
      data[i:i] = data[i:j] * rng.choice([1, 2, 5])
    elif kind == 4:
      del data[i:]
    else:
      del data[i:j]
  return bytes(data)


def pictures(folder):
  folder.mkdir(parents=True)
  pixels = np.random.default_rng(0).integers(0, 255, (30, 40, 3), np.uint8)
  (folder / 'a1.jpg').write_bytes(encode_jpeg(pixels))
  Image.fromarray(pixels).save(folder / 'a2.png')
  return [folder / 'a1.jpg', folder / 'a2.png']


def voc(folder):
  files = pictures(folder / 'JPEGImages')
  text = ('<annotation><size><width>40</width><height>30</height></size><object><name>dog</name>'
          '<difficult>0</difficult><bndbox><xmin>3</xmin><ymin>4</ymin><xmax>20</xmax><ymax>30'
          '</ymax></bndbox></object></annotation>')
  for part in ('Annotations', 'ImageSets/Main'):
    (folder / part).mkdir(parents=True)
  for name in ('a1', 'a2'):
    (folder / 'Annotations' / f'{name}.xml').write_text(text)
  (folder / 'ImageSets' / 'Main' / 'train.txt').write_text('a1\na2\n')
  return [*files, *folder.rglob('*.xml'), *folder.rglob('*.xml'), *folder.rglob('*.txt')], (
      lambda **options: PascalVoc(str(folder), **options))


def yolo(folder):
  files = pictures(folder / 'images')
  (folder / 'labels').mkdir()
  for name in ('a1', 'a2'):
    (folder / 'labels' / f'{name}.txt').write_text('0 .5 .5 .2 .25\n1 .1 .1 .2 .1 .2 .2\n')
  (folder / 'list.txt').write_text('images/a1.jpg\n./images/a2.png\n')
  (folder / 'data.yaml').write_text('path: .\ntrain: list.txt\nnames:\n  0: cat\n  1: dog\n')
  return [*files, *folder.rglob('*.txt'), folder / 'data.yaml'], (
      lambda **options: YoloTxt(str(folder / 'data.yaml'), polygons='box', **options))


def coco(folder):
  files = pictures(folder / 'images')
  (folder / 'truth.json').write_text(json.dumps({
      'images': [{'id': i, 'file_name': f.name, 'height': 30, 'width': 40}
                 for i, f in enumerate(files)],
      'annotations': [{'id': i, 'image_id': i, 'category_id': 3, 'bbox': [1.5, 2, 20, 10],
                       'area': 150.5, 'iscrowd': i, 'segmentation': outline}
                      for i, outline in enumerate(OUTLINES)],
      'categories': [{'id': 3, 'name': 'cat'}, {'id': 1, 'name': 'dog'}]}))
  (folder / 'ids.txt').write_text('1\n')
  return [*files, *[folder / 'truth.json'] * 3, folder / 'ids.txt'], (
      lambda **options: CocoJson(str(folder / 'images'), str(folder / 'truth.json'),
                                 exclude_ids=str(folder / 'ids.txt'), merge_images=True,
                                 boxes_from='segmentation', **options))


def tfds(folder):
  pytest.importorskip('tensorflow_datasets')
  made = prepare({'train': SyntheticShapes(2, image_size=48)}, folder,
                 Options('toy', threads=1), progress=lambda *step: None)
  (made / 'prepared.json').unlink()
  return [p for p in made.iterdir() if p.is_file()], (
      lambda **options: Tfds(data_dir=str(made), **options))


def tool_files(name):
  """Returns a function that makes the files of another format, see `data_formats`."""
  def make(folder):
    data_formats.write(folder, name)
    text = [p for p in folder.iterdir() if p.is_file() and p.suffix != '.jpg']
    options = {'annotations': str(text[0])} if name in ('cvat_xml', 'label_studio') else {}
    if name == 'labelme':
      options = {'folder': str(folder)}
    elif name == 'tf_records':
      options = {'records': str(folder / 'train.record-*'),
                 'label_map': str(folder / 'label_map.pbtxt')}
    elif name == 'open_images':
      options = {'annotations': str(folder / 'boxes.csv'),
                 'class_descriptions': str(folder / 'class-descriptions.csv')}
    images = {'images': str(folder / 'images')} if (folder / 'images').is_dir() else {}
    source = load(name, SOURCES[name])
    return [*text, *folder.rglob('*.jpg')], lambda **more: source(**options, **images, **more)
  return make


def use(source):
  """Reads everything of a source."""
  json.dumps(source.ground_truth(), allow_nan=False)
  said = report(source, 'data.train', image_size=64)
  for line in said.lines:
    check(line)
  for i in range(len(source)):
    try:
      example = source[i]
    except InputError as e:
      check(e)
      continue
    assert example.image.dtype == np.uint8 and len(example.boxes) <= source.max_boxes
    assert np.all((example.boxes >= 0) & (example.boxes <= 1))
    assert np.all((example.labels >= 0) & (example.labels < len(source.categories)))


def check(error):
  message = str(error)
  assert '\n' not in message and len(message) < 3000, message[:5000]


OTHERS = ('cvat_xml', 'label_studio', 'labelme', 'open_images', 'tf_records')


@pytest.mark.parametrize('make', [voc, yolo, coco, tfds, *map(tool_files, OTHERS)],
                         ids=['voc', 'yolo', 'coco', 'tfds', *OTHERS])
def test_damaged_files(make, tmp_path, request):
  mutations = MUTATIONS // (3 if request.node.callspec.id in OTHERS else 1)
  files, load = make(tmp_path / 'data')
  whole, rng = {f: f.read_bytes() for f in files}, random.Random(0)
  use(load(on_bad_box='raise'))
  used = 0
  for _ in range(mutations):
    file = rng.choice(files)
    file.write_bytes(mutate(whole[file], rng))
    try:
      use(load(on_bad_box=rng.choice(['raise', 'drop', 'clip']),
               on_bad_example=rng.choice(['raise', 'skip'])))
      used += 1
    except InputError as e:
      check(e)
    file.write_bytes(whole[file])
  assert 0 < used < mutations
