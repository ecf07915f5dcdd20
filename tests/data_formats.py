"""One small data set written in every format, by the format's own writer where one is installed."""

import json
import struct

import google_crc32c
import numpy as np
import yaml
from PIL import Image

NAMES = ('cat', 'dog')
# (height, width), and class, x, y, width, height in pixels of each object.
IMAGES = {
    'a1.jpg': ((48, 64), [('dog', 8, 12, 16, 24), ('cat', 32, 6, 16, 12)]),
    'b2.jpg': ((32, 64), [('cat', 16, 8, 32, 16)]),
    'c3.jpg': ((64, 64), []),
    'd4.jpg': ((64, 32), [('dog', 4, 16, 16, 32)])}
FORMATS = ('coco_json', 'cvat_xml', 'label_studio', 'labelme', 'open_images', 'pascal_voc',
           'side_by_side', 'tf_records', 'yolo_txt')


def write(folder, data_format, images=IMAGES):
  """Writes the data set into a folder as a user would have it."""
  folder.mkdir(parents=True, exist_ok=True)
  place = {'labelme': folder, 'side_by_side': folder, 'pascal_voc': folder / 'JPEGImages'}.get(
      data_format, folder / 'images')
  if data_format != 'tf_records':
    for name in images:
      picture(place / name, images[name][0])
  WRITERS[data_format](folder, images)
  return folder


def picture(path, size):
  path.parent.mkdir(parents=True, exist_ok=True)
  pixels = np.random.default_rng(sum(size)).integers(0, 255, (*size, 3), np.uint8)
  Image.fromarray(pixels).save(path)


def instances(images):
  """Returns the data set in COCO's format."""
  return {
      'images': [{'id': i, 'file_name': name, 'height': size[0], 'width': size[1]}
                 for i, (name, (size, _)) in enumerate(images.items(), start=1)],
      'categories': [{'id': i, 'name': name} for i, name in enumerate(NAMES, start=1)],
      'annotations': [
          {'id': n, 'image_id': i, 'category_id': NAMES.index(name) + 1, 'bbox': box,
           'area': box[2] * box[3], 'iscrowd': 0}
          for n, (i, name, box) in enumerate(
              [(i, name, box) for i, (_, objects) in enumerate(images.values(), start=1)
               for name, *box in objects], start=1)]}


def _coco(folder, images):
  (folder / 'instances.json').write_text(json.dumps(instances(images)))


def _cvat(folder, images):
  from hotcoco import COCO
  COCO(instances(images)).to_cvat(str(folder / 'annotations.xml'))


def _open_images(folder, images):
  from hotcoco import COCO
  path = folder / 'boxes.csv'
  COCO(instances(images)).to_oid(str(path))
  lines = path.read_text().replace('.jpg,', ',')
  for i, name in enumerate(images, start=1):  # It writes image ids; Open Images has names.
    lines = lines.replace(f'\n{i},', f'\n{name[:-4]},')
  for name in NAMES:
    lines = lines.replace(f',{name},', f',/m/{name},')
  path.write_text(lines)
  (folder / 'class-descriptions.csv').write_text(''.join(f'/m/{n},{n}\n' for n in NAMES))


def _labelme(folder, images):
  for name, (size, objects) in images.items():
    shapes = [{'label': label, 'points': [[x, y], [x + w, y + h]], 'group_id': None,
               'shape_type': 'rectangle', 'flags': {}} for label, x, y, w, h in objects]
    (folder / name).with_suffix('.json').write_text(json.dumps({
        'version': '5.5.0', 'flags': {}, 'shapes': shapes, 'imagePath': name, 'imageData': None,
        'imageHeight': size[0], 'imageWidth': size[1]}))


def label_studio_task(name, size, objects, number=1):
  """Returns a task as Label Studio exports it."""
  height, width = size
  return {
      'id': number, 'file_upload': f'0a1b2c3d-{name}', 'predictions': [],
      'data': {'image': f'/data/upload/7/0a1b2c3d-{name}'},
      'annotations': [{'id': number, 'was_cancelled': False, 'ground_truth': False, 'result': [
          {'original_width': width, 'original_height': height, 'image_rotation': 0, 'id': f'r{k}',
           'from_name': 'label', 'to_name': 'image', 'type': 'rectanglelabels',
           'value': {'x': 100 * x / width, 'y': 100 * y / height, 'width': 100 * w / width,
                     'height': 100 * h / height, 'rotation': 0, 'rectanglelabels': [label]}}
          for k, (label, x, y, w, h) in enumerate(objects)]}]}


def _label_studio(folder, images):
  (folder / 'project-7-at-2026-01-01.json').write_text(json.dumps([
      label_studio_task(name, size, objects, i)
      for i, (name, (size, objects)) in enumerate(images.items(), start=1)]))


def _voc_xml(name, size, objects):
  parts = [f'<object><name>{label}</name><difficult>0</difficult><bndbox><xmin>{x + 1}</xmin>'
           f'<ymin>{y + 1}</ymin><xmax>{x + w}</xmax><ymax>{y + h}</ymax></bndbox></object>'
           for label, x, y, w, h in objects]
  return (f'<annotation><filename>{name}</filename>'
          '<source><database>The VOC2007 Database</database></source>'
          f'<size><width>{size[1]}</width><height>{size[0]}</height><depth>3</depth></size>{"".join(parts)}</annotation>')


def _side_by_side(folder, images):
  for name, (size, objects) in images.items():
    (folder / name).with_suffix('.xml').write_text(_voc_xml(name, size, objects))


def _voc(folder, images):
  (folder / 'Annotations').mkdir()
  (folder / 'ImageSets/Main').mkdir(parents=True)
  stems = [name[:-4] for name in images]
  (folder / 'ImageSets/Main/train.txt').write_text('\n'.join(stems[:3]) + '\n')
  (folder / 'ImageSets/Main/val.txt').write_text('\n'.join(stems[3:]) + '\n')
  for name, (size, objects) in images.items():
    (folder / 'Annotations' / f'{name[:-4]}.xml').write_text(_voc_xml(name, size, objects))


def _yolo(folder, images):
  (folder / 'labels').mkdir()
  for name, (size, objects) in images.items():
    (folder / 'labels' / f'{name[:-4]}.txt').write_text(''.join(
        f'{NAMES.index(label)} {(x + w / 2) / size[1]} {(y + h / 2) / size[0]} {w / size[1]} '
        f'{h / size[0]}\n' for label, x, y, w, h in objects))
  (folder / 'data.yaml').write_text(yaml.safe_dump({'train': 'images', 'names': list(NAMES)}))


def tf_example(name, number, image, size, objects, **more):
  """Returns a serialized tf.train.Example with the API's features, by TFDS's copy of the proto."""
  from tensorflow_datasets.proto import tf_example_pb2
  example = tf_example_pb2.Example()
  height, width = size
  columns = list(zip(*objects, strict=True)) or [()] * 5
  names, x, y, w, h = [list(c) for c in columns]
  values = {
      'image/encoded': [image], 'image/format': [b'jpeg'], 'image/filename': [name.encode()],
      'image/source_id': [str(number).encode()], 'image/height': [height], 'image/width': [width],
      'image/object/bbox/xmin': [a / width for a in x],
      'image/object/bbox/ymin': [a / height for a in y],
      'image/object/bbox/xmax': [(a + b) / width for a, b in zip(x, w, strict=True)],
      'image/object/bbox/ymax': [(a + b) / height for a, b in zip(y, h, strict=True)],
      'image/object/class/text': [n.encode() for n in names],
      'image/object/class/label': [NAMES.index(n) + 1 for n in names], **more}
  for key, content in values.items():
    feature = example.features.feature[key]
    kind = (feature.bytes_list if content and isinstance(content[0], bytes) else
            feature.float_list if content and isinstance(content[0], float) else
            feature.int64_list)
    kind.value.extend(content)
  return example.SerializeToString()


def framed(data):
  """Returns a record as a TFRecord file stores it."""
  length = struct.pack('<Q', len(data))
  return length + _masked(length) + data + _masked(data)


def _masked(data):
  crc = google_crc32c.value(data)
  return struct.pack('<I', (((crc >> 15) | (crc << 17)) + 0xa282ead8) & 0xffffffff)


LABEL_MAP = ''.join(f"item {{\n  id: {i}\n  name: '{name}'\n}}\n"
                    for i, name in enumerate(NAMES, start=1))


def _tf_records(folder, images):
  shards = [b'', b'']
  for i, (name, (size, objects)) in enumerate(images.items(), start=1):
    picture(folder / 'tmp.jpg', size)
    data = tf_example(name, i, (folder / 'tmp.jpg').read_bytes(), size, objects)
    shards[i % 2] += framed(data)
  (folder / 'tmp.jpg').unlink()
  for k, data in enumerate(shards):
    (folder / f'train.record-{k:05}-of-00002').write_bytes(data)
  (folder / 'label_map.pbtxt').write_text(LABEL_MAP)


WRITERS = {'coco_json': _coco, 'cvat_xml': _cvat, 'label_studio': _label_studio,
           'labelme': _labelme, 'open_images': _open_images, 'pascal_voc': _voc,
           'side_by_side': _side_by_side, 'tf_records': _tf_records, 'yolo_txt': _yolo}
