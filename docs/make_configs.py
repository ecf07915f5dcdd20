"""Writes docs/configs.md, the reference of all config keys, from the code.

  python docs/make_configs.py

Keys and defaults come from ppn_jax/config.py. The meaning of a key comes from the docstring of the
function that it is an argument of, or from the comment beside the key. A test checks that the page
is up to date.
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
from ppn_jax.detection.class_logits import ClassLogitsSpec

PAGE = pathlib.Path(__file__).with_name('configs.md')

ORDER = ('seed', 'model', 'matching', 'postprocess', 'init', 'data', 'optim', 'train', 'eval')

# Blocks that share a table, and its title.
NAMES = {'data.train': 'data.train` and `data.eval'}

# Arguments that the system supplies, and attributes that are no options.
GIVEN = config_module.GIVEN | {'max_boxes', 'source', 'on_bad_example'}

HEAD = """# Config keys

This page is written by `python docs/make_configs.py` from
[`ppn_jax/config.py`](../ppn_jax/config.py) and the docstrings of the functions that the keys are
arguments of; do not edit it. A key is set in a config file ([`configs/`](../configs)) or on the
command line: `--config.optim.learning_rate=0.1`. An unknown key is an error that suggests the
nearest one.

Whatever a config file leaves out has the default listed here, even if the file replaces a whole
block: `config.train = dict(steps=2, batch_size=2)` keeps `keep_last=3`.
`optim.warmup_learning_rate`, the learning rate at step 0, may be given instead of
`optim.warmup_factor`. Configs of earlier versions, and the config.json of their runs, may have
`cache`, `cache_size`, `resident` and `resident_size` in `data.train`; they are moved to
`data.cache` and `data.resident`; `optim.momentum` is now `optim.optimizer.momentum`.

## On the command line

Every option of a component below can be set, even if the config file does not list it:

- Several values: `--config.data.train.images=train2014,val2014`, or a Python literal,
  `"--config.data.train.images=('a, b', 'c')"`. An existing path that contains a comma is one path.
- A number or none: `--config.model.layers.kernel_stddev=0.01`, `=None`.
- Transforms: `--config.data.transforms=horizontal_flip,photometric_distortion`; with options,
  `"--config.data.transforms=(dict(name='horizontal_flip', probability=0.2),)"`; none,
  `"--config.data.transforms=()"`; an option of the first one,
  `--config.data.transforms.0.probability=0.2`.
- Another component: `--config.model.neck.name=conv_pyramid --config.model.neck.depths=256,128`.
  Options that are not given take the defaults of the new component; those of the previous one are
  dropped.
- Another optimizer or schedule: `--config.optim.optimizer.name=rmsprop`, `=optax:lion`;
  `--config.optim.schedule.name=step --config.optim.schedule.boundaries=0.6,0.9`.
- Factors of rates: `"--config.optim.rate_scale={'backbone/*': 0.1, 'head': 2}"`, or one of them,
  `'--config.optim.rate_scale.backbone/*=0.1'`.
- A whole block: `"--config.model.neck=dict(name='conv_pyramid', depths=(256, 128))"`.

Literals are numbers, strings, `True`, `False`, `None`, tuples, lists and dictionaries. No
expression is evaluated.

## Code of your own in a run

Workdirs are data that people exchange. If the config.json of one names a component by a dotted
path, `'my_package.module:Name'`, the commands that open it (`evaluate`, `detect`, `export`,
`summary --workdir`) import that module only if it is allowed: `--allow=my_package` or
`--allow=my_package.module`, once for each. In Python it is
`ppn_jax.load(workdir, allow=('my_package',))`. Training, including a resumed one, may import
whatever `--config` names. See [Extending](extending.md).
"""


def page() -> str:
  """Returns the text of docs/configs.md."""
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
    meanings = _meanings((ClassLogitsSpec,)) | meanings
  rows, inner = [], []
  for key, value in block.items():
    path = f'{name}.{key}'
    if path in config_module.COMPONENTS and key != 'transforms':
      continue
    if isinstance(value, ConfigDict) and path not in config_module.MAPPINGS:
      inner += _block(path, value, comments)
      continue
    value = config_module.plain(value)
    rows.append(f'| `{key}` | `{value!r}` | {meanings.get(key) or comments.get(path, "")} |')
  yield f'## `{name}`\n\n| key | default | meaning |\n|---|---|---|\n' + '\n'.join(rows) + '\n'
  yield from inner


def _components(block: str, known: Mapping[str, str]) -> str:
  lines = [f'## Components of `{block}`\n',
           "Chosen by `name`, or by a dotted path to your own, `'my_package.module:Name'`.\n"]
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
  return 'required' if parameter.default is parameter.empty else f'`{parameter.default!r}`'


def _meanings(functions: tuple[Callable[..., Any], ...]) -> dict[str, str]:
  """Returns {argument: its text in the docstrings, on one line}."""
  found = {}
  for function in functions:
    for entry in docstring_parser.parse(inspect.getdoc(function) or '').params:
      for name in entry.arg_name.split(', '):
        found.setdefault(name, ' '.join((entry.description or '').split()).replace('|', '\\|'))
  return found


def _comments() -> dict[str, str]:
  """Returns {'train.batch_size': the comment beside the key in ppn_jax/config.py}."""
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
