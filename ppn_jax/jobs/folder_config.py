"""Writes the config file of a data set that was found in a folder."""

import os
import re
from typing import Any

from ppn_jax.data.recognition.recognise import Recognised
from ppn_jax.errors import InputError

EVAL_FRACTION = 0.1


def config_text(found: Recognised, folder: str) -> str:
  """Returns the text of a config file that trains on a data set.

  Args:
    found: The data set.
    folder: Where it was found, for the comment.
  """
  lines = [f'"""{found.name} in {_plain(os.path.abspath(folder))}, as `ppn data` found it."""', '',
           'from ppn_jax.configs import own_data', '', '', 'def get_config():',
           f'  config = own_data.get_config({found.source!r}).unlock()',
           *_update('train', found.train)]
  if found.evaluation is None:
    lines.append(f'  config.data.eval_fraction = {EVAL_FRACTION}  # Of the training images.')
  else:
    lines += _update('eval', found.evaluation)
  lines += ['  # config.train.minutes = 60  # As many steps as fit, instead of 10,000.',
            '  return config.lock()', '']
  return '\n'.join(lines)


def _update(block: str, options: dict[str, Any]) -> list[str]:
  return [f'  config.data.{block}.update(',
          *(f'      {key}={value!r},' for key, value in options.items()), '  )']


def _plain(path: str) -> str:
  """Returns a path as it can stand in a docstring."""
  return repr(path)[1:-1].replace('"""', "'''")


def config_name(folder: str) -> str:
  """Returns the name of the config file of a folder, which is also that of a Python module."""
  stem = re.sub(r'\W+', '_', os.path.basename(os.path.abspath(folder))).strip('_').lower()
  return f'{stem or "data"}_config.py'


def check_writable(path: str, text: str) -> bool:
  """Returns whether a config file has to be written.

  Raises:
    InputError: If another file is there, or no folder for it.
  """
  if os.path.isfile(path):
    with open(path, encoding='utf-8', errors='replace') as file:
      if file.read() == text:
        return False
    raise InputError(f'{path} exists and has other contents; give another name by --write=FILE, or '
                     f'look at the data of that config by --config={path}')
  if not path.endswith('.py'):
    raise InputError(f'--write={path}: a config file ends in .py')
  if os.path.exists(path) or not os.path.isdir(os.path.dirname(path) or '.'):
    raise InputError(f'--write={path}: no folder {os.path.dirname(path)!r}')
  return True
