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
from ppn_jax import registry
from ppn_jax.detection.columns import ClassColumns

PAGE = pathlib.Path(__file__).with_name('configs.md')

ORDER = ('seed', 'model', 'matching', 'postprocess', 'init', 'data', 'optim', 'train', 'eval')

# Blocks that share a table, as they are called together.
NAMES = {'data.train': 'data.train` and `data.eval'}

# Attributes of components that their docstrings explain, beside what the system supplies.
GIVEN = config_module.GIVEN | {'max_boxes', 'bad_boxes', 'source', 'on_bad_example'}

HEAD = """# Config keys

Made by `python docs/make_configs.py` from [`ppn_jax/config.py`](../ppn_jax/config.py) and the
docstrings of the functions that the keys are arguments of; do not edit it. Any key is set in a
file of [`configs/`](../configs) or on the command line: `--config.optim.learning_rate=0.1`. A key
that does not exist is an error that names the nearest one.

In a config file, what a block leaves out has the default given here, also where the block is
written anew: `config.train = dict(steps=2, batch_size=2)` keeps `keep_last=3`.
`optim.warmup_learning_rate`, the rate at step 0 itself, is taken in place of `optim.warmup_factor`.

## On the command line

Every option of a component below can be set, whether or not the config file spells it out:

- Several values: `--config.data.train.images=train2014,val2014`, or a Python literal,
  `"--config.data.train.images=('a, b', 'c')"`. A path with a comma that exists is one path.
- A number or none: `--config.model.layers.kernel_stddev=0.01`, `=None`.
- Transforms: `--config.data.transforms=horizontal_flip,photometric_distortion`, with options
  `"--config.data.transforms=(dict(name='horizontal_flip', probability=0.2),)"`, none
  `"--config.data.transforms=()"`, an option of the first of them
  `--config.data.transforms.0.probability=0.2`.
- Another component: `--config.model.neck.name=conv_pyramid --config.model.neck.depths=256,128`.
  Options that are not given have the new component's defaults; those of the one before are dropped.
- A whole block: `"--config.model.neck=dict(name='conv_pyramid', depths=(256, 128))"`.

Literals are numbers, text, `True`, `False`, `None`, tuples, lists and dictionaries; nothing in them
is computed.

## Code of your own in a run

A workdir is data that people send each other. Where its config.json names a component by a dotted
path, `'my_package.module:Name'`, the commands that open it (`evaluate`, `detect`, `export`,
`summary --workdir`) import that only if it is allowed: `--allow=my_package`, which may be repeated,
or `--allow=my_package.module`. In Python it is `ppn_jax.load(workdir, allow=('my_package',))`.
Training, also a resumed one, uses what `--config` names. See [extending.md](extending.md).
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
  tables = {table: block for block, table in reversed(config_module.COMPONENTS.items())}
  parts += [_components(NAMES.get(block, block), registry.load(block, table))
            for table, block in reversed(tables.items())]
  return '\n'.join(parts).rstrip() + '\n'


def _block(name: str, block: ConfigDict, comments: Mapping[str, str]) -> Iterator[str]:
  function = config_module.FUNCTIONS.get(name)
  meanings = _meanings((registry.load(name, function),) if function else ())
  if name == 'model':
    meanings = _meanings((ClassColumns,)) | meanings
  rows, inner = [], []
  for key, value in block.items():
    path = f'{name}.{key}'
    if path in config_module.COMPONENTS and key != 'transforms':
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
