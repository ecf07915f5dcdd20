"""Finds or draws the data of own_data.ipynb."""

import json
import pathlib
import zipfile

import numpy as np


def prepare(data: str, folder: str = 'own_data') -> str:
  """Returns the folder of a data set that a user names.

  Args:
    data: A folder, a .zip file, which is unpacked, or '' for a small data set of coloured shapes,
      which is drawn.
    folder: Where to unpack or draw.

  Raises:
    FileNotFoundError: If there is no such folder or file.
  """
  if not data:
    draw_shapes(pathlib.Path(folder))
    return folder
  path = pathlib.Path(data).expanduser()
  if path.is_dir():
    return str(path)
  if not path.is_file():
    raise FileNotFoundError(f'there is no {data!r}; in Colab, drag a .zip file into the Files '
                            'panel on the left, wait until it is there, and give its name')
  with zipfile.ZipFile(path) as archive:
    archive.extractall(folder)
  print(f'unpacked {len(archive.namelist()):,} files to {folder}')
  return folder


def draw_shapes(folder: pathlib.Path, images: int = 60) -> None:
  """Writes pictures of shapes and their boxes in COCO's format; the same ones each time."""
  from ppn_jax.data.images.decoding import encode_jpeg
  from ppn_jax.data.sources.synthetic import SyntheticShapes
  source = SyntheticShapes(num_images=images, image_size=224)
  folder.mkdir(parents=True, exist_ok=True)
  truth = source.ground_truth()
  for index, image in enumerate(truth['images']):
    image['file_name'] = f'{image["id"]:04}.jpg'
    data = encode_jpeg(np.asarray(source[index].image), 90)
    (folder / image['file_name']).write_bytes(data)
  (folder / 'annotations.json').write_text(json.dumps(truth))
  print(f'drew {images} pictures of shapes in {folder}')
