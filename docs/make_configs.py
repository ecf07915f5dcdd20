"""Writes docs/configs.md, the reference of every config key, from the code.

  python docs/make_configs.py

Keys and defaults come from ppn_jax/config.py, what a key means from the docstring of the function
that it is an argument of; keys that are no function's from the comment beside them. A test holds
the page to the code.
"""

import ast
import inspect
import io
import pathlib
import tokenize
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import docstring_parser
from ml_collections import ConfigDict

from ppn_jax import config as config_module
from ppn_jax import detector, registry
from ppn_jax.data.sources import SOURCES
from ppn_jax.data.transforms import TRANSFORMS
from ppn_jax.detection.anchors import ssd_anchors
from ppn_jax.detection.columns import ClassColumns
from ppn_jax.detection.losses import LOSSES
from ppn_jax.detection.matching import assign
from ppn_jax.detection.postprocess import postprocess
from ppn_jax.models.layers import LayerPolicy
from ppn_jax.models.network import BACKBONES, HEADS, NECKS
from ppn_jax.training.optim import build_optimizer
from ppn_jax.weights.initial import initial_weights

PAGE = pathlib.Path(__file__).with_name('configs.md')

ORDER = ('seed', 'model', 'matching', 'postprocess', 'init', 'data', 'optim', 'train', 'eval')

# Where the keys of a block are explained.
FUNCTIONS = {
    'model': (detector.build, ClassColumns),
    'model.anchors': (ssd_anchors,),
    'model.layers': (LayerPolicy,),
    'matching': (assign,),
    'postprocess': (postprocess,),
    'init': (initial_weights,),
    'optim': (build_optimizer,),
}

# Blocks that name a component, and what may be named.
COMPONENTS = {
    'model.backbone': BACKBONES, 'model.neck': NECKS, 'model.head': HEADS, 'loss': LOSSES,
    'data.train` and `data.eval': SOURCES, 'data.transforms': TRANSFORMS,
}

# Supplied by the system, not the user.
GIVEN = {'anchors_per_cell', 'num_classes', 'policy', 'categories', 'max_boxes', 'bad_boxes',
         'outputs', 'targets', 'columns', 'source', 'parent', 'on_bad_example'}

HEAD = """# Config keys

Made by `python docs/make_configs.py` from [`ppn_jax/config.py`](../ppn_jax/config.py) and the
docstrings of the functions that the keys are arguments of; do not edit it. Any key is set in a
file of [`configs/`](../configs) or on the command line: `--config.optim.learning_rate=0.1`. A key
that does not exist is an error that names the nearest one.
"""


def page() -> str:
  """The text of docs/configs.md."""
  config, comments = config_module.base_config(), _comments()
  parts = [HEAD]
  for name in ORDER:
    if isinstance(config[name], ConfigDict):
      parts += _block(name, config[name], comments)
    else:
      parts.append(f'## `{name}`\n\nDefault `{config[name]!r}`. {comments.get(name, "")}\n')
  parts += [_components(block, known) for block, known in COMPONENTS.items()]
  return '\n'.join(parts).rstrip() + '\n'


def _block(name: str, block: ConfigDict, comments: Mapping[str, str]) -> Iterator[str]:
  meanings = _meanings(FUNCTIONS.get(name, ()))
  rows, inner = [], []
  for key, value in block.items():
    path = f'{name}.{key}'
    if path in COMPONENTS or (name == 'data' and key in ('train', 'eval')):
      continue
    if isinstance(value, ConfigDict):
      inner += _block(path, value, comments)
      continue
    rows.append(f'| `{key}` | `{value!r}` | {meanings.get(key) or comments.get(path, "")} |')
  if name == 'data':
    rows += [f'| `train.{key}` | `{value!r}` | {comments.get(f"data.train.{key}", "")} |'
             for key, value in block.train.items() if key != 'name']
  yield f'## `{name}`\n\n| key | default | meaning |\n|---|---|---|\n' + '\n'.join(rows) + '\n'
  yield from inner


def _components(block: str, known: Mapping[str, str]) -> str:
  lines = [f'## Components of `{block}`\n',
           "By `name`; or by a dotted path to your own, `'my_package.module:Name'`.\n"]
  for name in known:
    component = registry.resolve(block, name, known)
    about = docstring_parser.parse(inspect.getdoc(component) or '').short_description
    lines.append(f'### `{name}`\n\n{about}\n')
    options = {key: text for key, text in _meanings((component,)).items() if key not in GIVEN}
    parameters = inspect.signature(component).parameters
    rows = [f'| `{key}` | {_default(parameters[key])} | {text} |'
            for key, text in options.items() if key in parameters]
    if rows:
      lines.append('| option | default | meaning |\n|---|---|---|\n' + '\n'.join(rows) + '\n')
  return '\n'.join(lines)


def _default(parameter: inspect.Parameter) -> str:
  return 'needed' if parameter.default is parameter.empty else f'`{parameter.default!r}`'


def _meanings(functions: tuple[Callable[..., Any], ...]) -> dict[str, str]:
  """Argument -> its text in the docstrings, on one line."""
  found = {}
  for function in functions:
    for entry in docstring_parser.parse(inspect.getdoc(function) or '').params:
      for name in entry.arg_name.split(', '):
        found.setdefault(name, ' '.join((entry.description or '').split()).replace('|', '\\|'))
  return found


def _comments() -> dict[str, str]:
  """'train.batch_size' -> the comment beside the key in ppn_jax/config.py."""
  source = inspect.getsource(config_module)
  beside = {token.start[0]: token.string.lstrip('# ')
            for token in tokenize.generate_tokens(io.StringIO(source).readline)
            if token.type == tokenize.COMMENT}
  base = next(node for node in ast.parse(source).body
              if isinstance(node, ast.FunctionDef) and node.name == 'base_config')
  found = {}

  def walk(path: str, node: ast.expr) -> None:
    if node.lineno in beside and not isinstance(node, ast.Call):
      found[path] = beside[node.lineno]
    for keyword in getattr(node, 'keywords', ()):
      walk(f'{path}.{keyword.arg}', keyword.value)

  for statement in base.body:
    if isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Attribute):
      walk(statement.targets[0].attr, statement.value)
  return found


if __name__ == '__main__':
  PAGE.write_text(page(), encoding='utf-8')
