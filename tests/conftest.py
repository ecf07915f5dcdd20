"""What all tests share."""

import os
import pathlib

import pytest


@pytest.fixture(scope='session')
def shared() -> pathlib.Path:
  """The folder with real images and the reference's arrays; see CONTRIBUTING in the README."""
  default = pathlib.Path(__file__).resolve().parents[2] / 'shared'
  folder = pathlib.Path(os.environ.get('PPN_SHARED', default))
  if not (folder / 'golden').is_dir():
    message = f'no reference data at {folder}; set PPN_SHARED to its folder'
    if os.environ.get('CI'):
      pytest.fail(message)
    pytest.skip(message)
  return folder
