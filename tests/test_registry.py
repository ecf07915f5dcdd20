"""Components by name and by dotted path."""

import pytest

from ppn_jax import registry
from ppn_jax.errors import InputError, did_you_mean

KNOWN = {'counter': 'collections:Counter', 'lost': 'collections:Nothing'}


def area(width, height=2):
  return width * height


def test_known_names_and_dotted_paths_lead_to_the_same():
  assert registry.resolve('thing', 'counter', KNOWN) is registry.resolve(
      'thing', 'collections:Counter', KNOWN)


@pytest.mark.parametrize('name, hint', [
    ('countr', "did you mean 'counter'"), ('', 'legal'), (None, 'legal'),
    ('collections:Countr', 'cannot be loaded'), ('no_such_module:X', 'cannot be loaded'),
    ('lost', 'cannot be loaded')])
def test_a_name_that_leads_nowhere(name, hint):
  with pytest.raises(InputError, match=hint):
    registry.resolve('thing', name, KNOWN)


def test_build_passes_options_and_what_the_system_gives():
  block = {'name': f'{__name__}:area', 'height': 5}
  assert registry.build('thing', block, {}, width=3) == 15
  assert block == {'name': f'{__name__}:area', 'height': 5}


def test_an_unknown_option_is_named_with_the_nearest():
  with pytest.raises(InputError, match="no option 'heigth'; did you mean 'height'"):
    registry.build('thing', {'name': f'{__name__}:area', 'heigth': 5}, {}, width=3)
  with pytest.raises(InputError, match="no option 'width'"):  # The system's, not the user's.
    registry.build('thing', {'name': f'{__name__}:area', 'width': 5}, {}, width=3)


def test_did_you_mean_without_anything_near_lists_all():
  assert did_you_mean('zzz', ['b', 'a']) == "legal: 'a', 'b'"
