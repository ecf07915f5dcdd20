"""Atomic writing."""

import pytest

from ppn_jax import files


def test_replaces_and_makes_folders(tmp_path):
  path = tmp_path / 'a' / 'b.json'
  files.write_text(path, 'one')
  files.write_text(path, 'two')
  assert path.read_text() == 'two'
  assert [p.name for p in path.parent.iterdir()] == ['b.json']


def test_a_failure_leaves_the_old_file_and_no_piece(tmp_path, monkeypatch):
  path = tmp_path / 'b.json'
  files.write_text(path, 'old')

  def fail(*_):
    raise OSError('disk full')

  monkeypatch.setattr(files.os, 'replace', fail)
  with pytest.raises(OSError, match='disk full'):
    files.write_text(path, 'new')
  assert path.read_text() == 'old'
  assert list(tmp_path.iterdir()) == [path]
