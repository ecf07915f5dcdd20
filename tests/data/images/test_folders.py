"""Listing of image files in folders, and the description of other files."""

import os

import pytest

from ppn_jax.data.images.folders import describe_others, has_suffix, list_folder
from ppn_jax.errors import InputError


def test_list_folder(tmp_path):
  folder = tmp_path / 'in'
  folder.mkdir()
  for name in ('b.JPG', 'a.png', 'c.jfif', '._a.png', '.DS_Store', 'd.heic', 'e.HEIC', 'notes.txt',
               'README'):
    (folder / name).write_bytes(b'')
  (folder / 'deep').mkdir()
  (folder / '.git').mkdir()
  (tmp_path / 'elsewhere.png').write_bytes(b'')
  os.symlink('../elsewhere.png', folder / 'link.png')
  os.symlink('nowhere.png', folder / 'dangling.png')
  os.symlink(folder, tmp_path / 'linked')
  for given in (folder, str(tmp_path / 'linked')):
    kept, others = list_folder(given)
    assert kept == [os.path.join(given, name) for name in ('a.png', 'b.JPG', 'c.jfif', 'link.png')]
    assert others == ('5 files not looked at: .heic (2), .png, .txt, without suffix; '
                      '1 folder not looked into: deep')
  assert list_folder(folder, {'.txt'})[0] == [str(folder / 'notes.txt')]
  with pytest.raises(InputError, match='cannot be read'):
    list_folder(tmp_path / 'none')


def test_describe_others():
  assert describe_others([]) == ''
  assert describe_others(['x/d.heic']) == '1 file not looked at: .heic'
  assert describe_others(['a.heic', 'b.HEIC']) == '2 files not looked at: .heic'
  assert len(describe_others([f'a.{"[" * 3000}'])) < 100


def test_has_suffix():
  assert has_suffix('a/b.TIFF') and not has_suffix('a.png/b') and not has_suffix('a.pfm')
