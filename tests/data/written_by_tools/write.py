"""Writes the data set of tests/data_formats.py by an annotation tool; see README.md."""

import io
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile

FOLDER = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(FOLDER.parents[1]))

from data_formats import IMAGES, NAMES, picture  # noqa: E402


def write_labelme(folder, images):
  """Draws the boxes in LabelMe's window and saves them."""
  os.environ['QT_QPA_PLATFORM'] = 'offscreen'
  os.environ['HOME'] = str(images.parent)  # It keeps its settings there.
  from labelme._shape import Shape
  from labelme.app import MainWindow
  from PyQt5 import QtCore, QtWidgets
  application = QtWidgets.QApplication([])
  window = MainWindow(file_or_dir=str(images),
                      config_overrides={'with_image_data': False, 'auto_save': False})
  kinds = iter(('rectangle', 'oriented_rectangle', 'polygon', 'rectangle'))
  for name, (_, objects) in IMAGES.items():
    window._load_file(str(images / name))
    shapes = []
    for label, x, y, w, h in objects:
      shape = Shape(label=label, shape_type=(kind := next(kinds)), flags={})
      for corner in ([(x, y), (x + w, y + h)] if kind == 'rectangle' else
                     [(x, y), (x + w, y), (x + w, y + h), (x, y + h)]):
        shape.add_point(QtCore.QPointF(*corner))
      shape.close()
      shapes.append(shape)
    window._load_shapes(shapes)
    beside = (images / name).with_suffix('.json')
    assert window.save_labels(str(beside))
    shutil.copy(beside, folder)
  del window, application


def write_labelimg(folder, images):
  """Saves the boxes by LabelImg's class for its files; images without boxes have none."""
  from libs.labelFile import LabelFile
  for name, (_, objects) in IMAGES.items():
    shapes = [{'label': label, 'difficult': False,
               'points': [(x, y), (x + w, y), (x + w, y + h), (x, y + h)]}
              for label, x, y, w, h in objects]
    if shapes:
      LabelFile().save_pascal_voc_format(str((folder / name).with_suffix('.xml')), shapes,
                                         f'/home/me/{name}', _image_of(images / name))


def _image_of(path):
  from PyQt5.QtGui import QImage
  image = QImage()
  assert image.load(str(path))
  return image


def write_datumaro(folder, images):
  """Exports the boxes by Datumaro, which CVAT's exports use as well."""
  import datumaro
  from datumaro.components.annotation import Bbox
  from datumaro.components.media import Image
  for kind, subsets in (('coco_instances', ['train'] * 4), ('cvat', ['train'] * 4),
                        ('open_images', ['train'] * 4), ('voc_detection', ['train'] * 4),
                        ('yolo', ['train'] * 4), ('yolo_ultralytics', ['train'] * 3 + ['val'])):
    items = [datumaro.DatasetItem(
        id=name[:-4], subset=subset, media=Image.from_file(path=str(images / name)),
        annotations=[Bbox(x, y, w, h, label=NAMES.index(label), id=k, group=k,
                          attributes={'occluded': False})
                     for k, (label, x, y, w, h) in enumerate(objects, start=1)])
             for (name, (_, objects)), subset in zip(IMAGES.items(), subsets, strict=True)]
    datumaro.Dataset.from_iterable(items, categories=list(NAMES)).export(
        str(folder / kind), kind, save_media=False)


_LABELS = ('<View><Image name="image" value="$image"/><RectangleLabels name="label" toName="image">'
           '<Label value="cat"/><Label value="dog"/></RectangleLabels></View>')


def write_label_studio(folder, images):
  """Uploads the images to Label Studio, labels them by its API and exports them."""
  import requests
  address, token = 'http://127.0.0.1:8093', '0123456789abcdef0123456789abcdef01234567'
  with tempfile.TemporaryDirectory() as place:
    server = subprocess.Popen(
        [pathlib.Path(sys.executable).parent / 'label-studio', 'start', '--no-browser',
         '--internal-host', '127.0.0.1', '-p', '8093', '--data-dir', place, '--username', 'a@b.cd',
         '--password', 'of no use', '--user-token', token],
        env={**os.environ, 'LABEL_STUDIO_ENABLE_LEGACY_API_TOKEN': 'true'},
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
      session = requests.Session()
      session.headers['Authorization'] = f'Token {token}'
      for _ in range(120):
        try:
          if session.get(f'{address}/health').ok:
            break
        except requests.ConnectionError:
          time.sleep(1)
      project = session.post(f'{address}/api/projects', json={
          'title': 'photos', 'label_config': _LABELS}).json()['id']
      for name in IMAGES:
        session.post(f'{address}/api/projects/{project}/import', files={
            'file': (name, (images / name).read_bytes(), 'image/jpeg')}).raise_for_status()
      tasks = session.get(f'{address}/api/tasks', params={
          'project': project, 'page_size': 100, 'fields': 'all'}).json()['tasks']
      for task in tasks:
        (height, width), objects = IMAGES[task['data']['image'].split('-')[-1]]
        session.post(f"{address}/api/tasks/{task['id']}/annotations", json={'result': [
            {'id': f'r{k}', 'type': 'rectanglelabels', 'from_name': 'label', 'to_name': 'image',
             'original_width': width, 'original_height': height, 'image_rotation': 0,
             'value': {'x': 100 * x / width, 'y': 100 * y / height, 'width': 100 * w / width,
                       'height': 100 * h / height, 'rotation': 0, 'rectanglelabels': [label]}}
            for k, (label, x, y, w, h) in enumerate(objects)]}).raise_for_status()
      for kind in ('JSON', 'JSON_MIN', 'COCO_WITH_IMAGES', 'YOLO_WITH_IMAGES', 'VOC'):
        answer = session.get(f'{address}/api/projects/{project}/export',
                             params={'exportType': kind})
        answer.raise_for_status()
        (folder / kind).mkdir()
        if kind.startswith('JSON'):
          (folder / kind / 'export.json').write_bytes(answer.content)
        else:
          zipfile.ZipFile(io.BytesIO(answer.content)).extractall(folder / kind)
    finally:
      server.terminate()
      server.wait()


WRITERS = {'labelme': write_labelme, 'labelimg': write_labelimg, 'datumaro': write_datumaro,
           'label_studio': write_label_studio}


def main():
  """Writes the files of the tool that the command line names."""
  tool = sys.argv[1]
  folder = FOLDER / tool
  shutil.rmtree(folder, ignore_errors=True)
  folder.mkdir()
  with tempfile.TemporaryDirectory() as place:
    images = pathlib.Path(place) / 'photos'
    for name, (size, _) in IMAGES.items():
      picture(images / name, size)
    WRITERS[tool](folder, images)


if __name__ == '__main__':
  main()
