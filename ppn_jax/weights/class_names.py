"""Matches classes of a data set with those of pretrained weights by their names."""

import collections
from collections.abc import Iterable, Sequence

from ppn_jax.errors import InputError, did_you_mean


def match_class_names(names: Sequence[str], theirs: Sequence[str], given: Sequence[str] = (), *,
                      origin: str) -> dict[str, str]:
  """Returns the name that each class has in other weights; classes without one are left out.

  Names match if they are equal, or else equal without case, spaces, hyphens and underscores, as
  `diningtable` and `Dining Table` are, provided that only one class on either side can be meant.

  Args:
    names: names of the data set's classes.
    theirs: names of the classes of the weights.
    given: further pairs, 'NAME=THEIRS' each, such as 'sofa=couch'; 'NAME=' matches nothing.
    origin: where the weights come from, for messages.

  Raises:
    InputError: If an entry of `given` is no such pair, or names a class that there is not.
  """
  chosen = _parse(given)
  if chosen and not theirs:
    raise InputError(f'init.class_names is given, but the classes of {origin} have no names; leave '
                     'it out')
  for name, other in chosen.items():
    for wanted, legal, where in ((name, names, 'the data'), (other, theirs, origin)):
      if wanted and wanted not in legal:
        raise InputError(f'init.class_names: {where} has no class {wanted!r}; '
                         f'{did_you_mean(wanted, legal)}')
  matched = {name: other for name, other in chosen.items() if other}
  open_names = [name for name in names if name not in chosen]
  matched |= {name: name for name in open_names if name in theirs}
  taken = set(matched.values())
  ours = _by_plain_name(name for name in open_names if name not in matched)
  others = _by_plain_name(name for name in theirs if name not in taken)
  return matched | {ours[key][0]: others[key][0] for key in ours
                    if len(ours[key]) == len(others.get(key, ())) == 1}


def _parse(given: Sequence[str]) -> dict[str, str]:
  """Returns {NAME: THEIRS}; a name may contain a '=' itself, THEIRS may not."""
  pairs = {}
  for text in given:
    name, equals, other = text.rpartition('=') if isinstance(text, str) else ('', '', '')
    if not equals or not name.strip():
      raise InputError(f"init.class_names: {text!r} must be 'NAME=THEIRS', a class of the data and "
                       "its name in the weights, such as 'sofa=couch'")
    if name.strip() in pairs:
      raise InputError(f'init.class_names gives {name.strip()!r} twice; give it once')
    pairs[name.strip()] = other.strip()
  return pairs


def _by_plain_name(names: Iterable[str]) -> dict[str, list[str]]:
  """Groups names that are equal without case, spaces, hyphens and underscores."""
  groups = collections.defaultdict(list)
  for name in names:
    groups[''.join(c for c in name.casefold() if c not in ' -_')].append(name)
  return groups
