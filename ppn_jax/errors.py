"""What a caller did wrong, said so that the caller can mend it."""

import difflib
from collections.abc import Iterable


class InputError(ValueError):
  """A mistake in a config, a flag, a data set, an image or a checkpoint.

  The message is one line: what is wrong, the value, and the legal values or the fix.
  Commands print it to stderr and exit with code 2; any other exception is a bug of
  ours and keeps its traceback.
  """


def did_you_mean(name: str, legal: Iterable[str]) -> str:
  """The hint that ends an error about an unknown name: the nearest legal one, else all.

  >>> did_you_mean('bacth_size', ['batch_size', 'steps'])
  "did you mean 'batch_size'?"
  >>> did_you_mean('zzz', ['batch_size', 'steps'])
  "legal: 'batch_size', 'steps'"
  """
  legal = sorted(legal)
  near = difflib.get_close_matches(name, legal, n=1)
  if near:
    return f'did you mean {near[0]!r}?'
  return 'legal: ' + (', '.join(repr(n) for n in legal) or 'none')
