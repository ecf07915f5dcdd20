"""Tests that the documentation agrees with the code: pages, links, commands, config keys."""

import argparse
import functools
import importlib
import importlib.util
import os
import pathlib
import re
import shlex
import subprocess
import sys
import unicodedata

import pytest

from ppn_jax.cli.main import COMMANDS, main
from ppn_jax.config import COMPONENTS, base_config
from ppn_jax.config_files import load_config, override

ROOT = pathlib.Path(__file__).resolve().parents[1]
DOCS = ROOT / 'docs'
# Every page that people read, relative to the repository.
PAGES = sorted(str(path.relative_to(ROOT)) for path in [
    *ROOT.glob('*.md'), *DOCS.glob('*.md'), ROOT / 'launch' / 'README.md'])
SITE_PACKAGES = ('mkdocs', 'material', 'mkdocstrings', 'mkdocstrings_handlers')

# A key of the component that docs/extending.md builds.
OWN_KEYS = frozenset({'model.backbone.width'})

_FENCE = re.compile(r'^```.*?^```$', re.M | re.S)
_CODE = re.compile(r'`[^`]*`')
_LINK = re.compile(r'\[(?:[^\[\]]|\[[^\]]*\])*\]\(([^)\s]+)\)')
_HEADING = re.compile(r'^#{1,6} (.*)$', re.M)
_FLAG = re.compile(r'(?<![\w-])--([a-z]\w*(?:[-.]\w+)*)')
_KEY = re.compile(r'--config\.([a-z_]+(?:\.\w+)+)')


def script(name):
  spec = importlib.util.spec_from_file_location(name, DOCS / f'{name}.py')
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


def make_configs():
  return script('make_configs')


@functools.cache
def text(page):
  return (ROOT / page).read_text(encoding='utf-8')


def test_the_config_reference_is_up_to_date():
  maker = make_configs()
  assert maker.PAGE.read_text(encoding='utf-8') == maker.page(), (
      'run python docs/make_configs.py')


def test_the_page_of_models_is_up_to_date():
  maker = script('make_models')
  assert maker.PAGE.read_text(encoding='utf-8') == maker.page(), 'run python docs/make_models.py'


def test_every_key_has_a_meaning():
  maker = make_configs()
  lines = maker.page().splitlines()
  empty = [line for line in lines if line.startswith('| `') and line.endswith('|  |')]
  assert not empty
  keys = {line.split('`')[1] for line in lines if line.startswith('| `')}
  config = base_config()
  assert {*maker.ORDER, 'loss'} == {*config}
  blocks = {path.rpartition('.')[2] for path in COMPONENTS}  # These have sections of their own.
  assert {*config.train, *config.optim, *config.postprocess,
          *config.model.layers} - blocks <= keys


def test_the_readme_is_short():
  readme = text('README.md')
  assert len(readme.splitlines()) <= 160
  assert len(readme.split()) <= 1200


@pytest.mark.parametrize('page', PAGES)
def test_relative_links_lead_somewhere(page):
  broken = [link for link in links(page) if not leads_somewhere(page, link)]
  assert not broken


def test_links_are_checked():
  """The checks above find what they look for."""
  assert 'docs/data.md' in links('README.md')
  assert 'docs/images/quickstart.jpg' in links('README.md')
  assert leads_somewhere('README.md', 'docs/data.md#formats')
  assert not leads_somewhere('README.md', 'docs/data.md#nowhere')
  assert not leads_somewhere('docs/index.md', 'docs/data.md')
  assert anchors('docs/reference.md') >= {'14-parameters-and-flops'}
  assert anchors('docs/configs.md') >= {'components-of-datatransforms'}


def links(page):
  """Returns the targets of a page's relative links and images."""
  prose = _FENCE.sub('', text(page))
  prose = re.sub(r'\[`([^`]*)`\]', r'[\1]', prose)  # Links whose text is code.
  return [link for link in _LINK.findall(_CODE.sub('', prose))
          if not re.match(r'[a-z]+:', link)]


def leads_somewhere(page, link):
  path, _, anchor = link.partition('#')
  target = (ROOT / page).parent / path if path else ROOT / page
  if not target.exists():
    return False
  return not anchor or anchor in anchors(str(target.resolve().relative_to(ROOT)))


def anchors(page):
  """Returns the anchors of a page's headings, which mkdocs and GitHub agree upon."""
  found = set()
  for heading in _HEADING.findall(_FENCE.sub('', text(page))):
    plain = unicodedata.normalize('NFKD', heading.replace('`', '')).encode('ascii', 'ignore')
    plain = re.sub(r'[^\w\s-]', '', plain.decode()).strip().lower()
    found.add(re.sub(r'[\s-]+', '-', plain))
  return found


@functools.cache
def legal_flags():
  """Returns {command: flags that it takes}."""
  flags = {}
  for command in COMMANDS:
    parser = argparse.ArgumentParser()
    importlib.import_module(f'ppn_jax.cli.{command.replace("-", "_")}').add_arguments(parser)
    flags[command] = {option.removeprefix('--') for option in parser._option_string_actions}
  return flags


def commands(page, spans=True):
  """Returns (command, line) of every `ppn COMMAND ...` in blocks and, if asked, spans of code."""
  whole = text(page).replace('\\\n', ' ')
  code = [*_FENCE.findall(whole), *(_CODE.findall(_FENCE.sub('', whole)) if spans else ())]
  lines = [line.strip('` ') for block in code for line in block.splitlines()]
  found = [re.match(r'(?:\w+=\S+ )*ppn ([a-z-]+)(.*)', line) for line in lines]
  return [(match[1], match[2]) for match in found if match]


@pytest.mark.parametrize('page', PAGES)
def test_commands_take_the_flags_that_pages_show(page):
  unknown = [f'ppn {command} --{flag}' for command, line in commands(page)
             for flag in _FLAG.findall(line.partition(' #')[0])
             if not flag.startswith('config.')
             and flag not in legal_flags().get(command, ())]
  assert not unknown


def examples(page):
  """Returns the whole commands in a page's blocks of code, as lists of arguments."""
  lines = [(command, line.partition(' #')[0]) for command, line in commands(page, spans=False)]
  # Others show where a value belongs, as in `ppn train --config=FILE [--config.KEY=VALUE ...]`.
  return [[command, *shlex.split(line)] for command, line in lines
          if not re.search(r'=[A-Z_]+\b(?!/)|[\[|]|\.\.\.', line)]


@pytest.mark.parametrize('page', PAGES)
def test_commands_of_pages_parse(page, monkeypatch):
  """Parses them as `ppn` does, and loads their configs with the entries that they change."""
  parsed = []
  for command in COMMANDS:
    module = importlib.import_module(f'ppn_jax.cli.{command.replace("-", "_")}')
    monkeypatch.setattr(module, 'run', lambda args: parsed.append(args) or 0)
  for argv in examples(page):
    parsed.clear()
    assert main(argv) == 0, argv
    config = getattr(parsed[0], 'config', None)
    if config and not (config.endswith('.py') and not (ROOT / config).exists()):
      load_config(config, parsed[0].overrides)
    elif parsed[0].overrides and not config:
      override(base_config(), [entry for entry in parsed[0].overrides if 'data.' not in entry])


def test_examples_are_found():
  assert ['train', '--config=own_data:coco_json'] in [
      argv[:2] for page in PAGES for argv in examples(page)]
  assert sum(len(examples(page)) for page in PAGES) > 15


@pytest.mark.parametrize('page', PAGES)
def test_pages_show_config_keys_that_exist(page):
  keys = re.findall(r'^\| `([\w.]+)` \|', text('docs/configs.md'), re.M)
  known = {key.rpartition('.')[2] for key in keys} | {*base_config().model} | {'name'}
  unknown = [key for key in _KEY.findall(text(page))
             if key.rpartition('.')[2] not in known or key.partition('.')[0] not in base_config()]
  unknown = [key for key in unknown if key not in OWN_KEYS]
  assert not unknown


def test_commands_are_found():
  assert ('evaluate', ' --workdir=runs/mine --report') in commands('README.md')
  assert {command for page in PAGES for command, _ in commands(page)} >= {*COMMANDS}


@pytest.mark.slow
def test_the_site_builds_strictly(tmp_path):
  missing = [name for name in SITE_PACKAGES if importlib.util.find_spec(name) is None]
  if missing:
    pytest.skip(f"{', '.join(missing)} not installed; pip install -e '.[docs]'")
  environment = os.environ | {'NO_MKDOCS_2_WARNING': '1', 'NO_COLOR': '1'}
  built = subprocess.run([sys.executable, '-m', 'mkdocs', 'build', '--strict', '--site-dir',
                          str(tmp_path / 'site')], cwd=ROOT, env=environment,
                         capture_output=True, text=True)
  assert built.returncode == 0, built.stderr
  assert 'WARNING' not in built.stderr
  import ppn_jax
  api = (tmp_path / 'site' / 'api' / 'index.html').read_text(encoding='utf-8')
  entries = [name for name in ppn_jax.__all__ if callable(getattr(ppn_jax, name))]
  assert entries and all(re.search(rf'<h2 id="[\w.]+\.{name}"', api) for name in entries)
