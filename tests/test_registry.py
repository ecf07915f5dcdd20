"""Components by name and by dotted path."""

import copy
import json
import pickle

import pytest
from ml_collections import ConfigDict

from ppn_jax import registry
from ppn_jax.config import plain
from ppn_jax.errors import InputError, did_you_mean

KNOWN = {'counter': 'collections:Counter', 'lost': 'collections:Nothing'}


def area(width, height=2):
  return width * height


def test_known_names_and_dotted_paths_resolve_to_the_same():
  assert registry.resolve('thing', 'counter', KNOWN) is registry.resolve(
      'thing', 'collections:Counter', KNOWN)


@pytest.mark.parametrize('name, hint', [
    ('countr', "did you mean 'counter'"), ('', 'legal'), (None, 'legal'),
    ('collections:Countr', 'cannot be loaded'), ('no_such_module:X', 'cannot be loaded'),
    ('lost', 'cannot be loaded')])
def test_a_name_that_cannot_be_resolved(name, hint):
  with pytest.raises(InputError, match=hint):
    registry.resolve('thing', name, KNOWN)


def test_build_passes_options_and_arguments_of_the_system():
  block = {'name': f'{__name__}:area', 'height': 5}
  assert registry.build('thing', block, {}, width=3) == 15
  assert block == {'name': f'{__name__}:area', 'height': 5}


def test_an_unknown_option_is_named_with_the_nearest():
  with pytest.raises(InputError, match="no option 'heigth'; did you mean 'height'"):
    registry.build('thing', {'name': f'{__name__}:area', 'heigth': 5}, {}, width=3)
  # The system supplies this one.
  with pytest.raises(InputError, match="no option 'width'"):
    registry.build('thing', {'name': f'{__name__}:area', 'width': 5}, {}, width=3)


def test_did_you_mean_without_anything_near_lists_all():
  assert did_you_mean('zzz', ['b', 'a']) == "legal: 'a', 'b'"


def test_a_blocked_name_is_not_imported(tmp_path, import_from):
  (tmp_path / 'planted.py').write_text('raise RuntimeError("imported")')
  import_from(tmp_path)
  config = registry.block_imports(
      {'name': 'counter', 'inner': [{'name': 'planted:X', 'depth': 3}]}, (), 'W')
  assert config == {'name': 'counter', 'inner': ({'name': 'planted:X', 'depth': 3},)}
  with pytest.raises(InputError, match=r"thing 'planted:X' in W is code.*--allow=planted, in Py"):
    registry.build('thing', config['inner'][0], KNOWN)
  # Copies and conversions of the config are blocked too.
  block = ConfigDict(config).copy_and_resolve_references().inner[0]
  for copied in (block, copy.deepcopy(block), pickle.loads(pickle.dumps(block)), plain(block)):
    with pytest.raises(InputError, match='planted'):
      registry.select('thing', copied, KNOWN)
  assert json.loads(json.dumps(config))['inner'][0]['name'] == 'planted:X'


@pytest.mark.parametrize('allow, allowed', [
    (('my_pkg',), True), (('other', 'my_pkg.nets'), True), (('my_pkg.nets:Net',), True),
    (('my_pkg.net',), False), (('my',), False), (('my_pkg.nets:Other',), False), (('',), False),
    ((), False)])
def test_allowed_components(allow, allowed):
  name = registry.block_imports({'name': 'my_pkg.nets:Net'}, allow, 'W')['name']
  assert isinstance(name, registry.BlockedName) is not allowed


def typed(*, rate: float = 0.1, count: int = 3, nesterov: bool = False, where: str = '',
          other=None):
  return rate


@pytest.mark.parametrize('options, words', [
    ({'rate': 'x'}, r"thing 'typed': rate is 'x', legal: a number"), ({'rate': None}, 'a number'),
    ({'rate': float('nan')}, 'rate is nan, legal: a finite number'), ({'rate': True}, 'a number'),
    ({'other': float('inf')}, 'a finite number'), ({'count': '3'}, "count is '3', legal: a number"),
    ({'nesterov': 'no'}, 'True, False'), ({'where': 3}, 'where is 3, legal: text')])
def test_values_of_another_type_are_refused(options, words):
  with pytest.raises(InputError, match=words):
    registry.build('thing', {'name': 'typed', **options}, {'typed': f'{__name__}:typed'})


def options(a, b: int = 3, *, c: 'float | None' = None, d=(1, 2), **others):
  pass


def test_options_of_a_component():
  found = registry.options_of(options, given=['a'])
  assert found.types == {'b': int, 'c': float | None, 'd': tuple}
  assert found.defaults == {'b': 3, 'c': None, 'd': (1, 2)} and found.open
