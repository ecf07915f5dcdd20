"""What a caller did wrong, said so that the caller can mend it."""

import difflib
import errno
from collections.abc import Iterable
from typing import NamedTuple


class InputError(ValueError):
  """A mistake in a config, a flag, a data set, an image or a checkpoint.

  The message is one line: what is wrong, the value, and the legal values or the fix.
  Commands print it to stderr and exit with code 2; any other exception is a bug of
  ours and keeps its traceback.
  """


class InputTypeError(InputError, TypeError):
  """A value of a type that a function does not take."""


class StoreError(OSError):
  """A bucket did not take or give what it should. The message is one line."""


# Of the libraries that speak to buckets: their errors tell of a store that cannot be used, not of
# what is in it.
STORE_CLIENTS = ('aiohttp.', 'gcsfs.', 'google.api_core.', 'google.auth.', 'google.cloud.',
                 'requests.')


class Stopped(RuntimeError):
  """A run cannot go on, though nothing that was given is wrong; the message is one line.

  Commands print it to stderr and exit with code 1.
  """


class Verdict(NamedTuple):
  """What a command makes of an exception."""
  code: int  # It exits with.
  line: str | None  # On stderr; None for the traceback of a bug.


# What a disk does that is nobody's bug -> exit code. A full one may be free by the next start.
_STORE_ERRORS = {errno.EROFS: 2, errno.ENOSPC: 1, errno.EDQUOT: 1}


def verdict(error: BaseException) -> Verdict:
  """How a command ends on `error`."""
  text = ' '.join(str(error).split())
  if isinstance(error, InputError):
    return Verdict(2, f'ppn: error: {text}')
  if isinstance(error, (PermissionError, NotADirectoryError, IsADirectoryError, FileExistsError)):
    return Verdict(2, f'ppn: error: {error.filename}: {error.strerror}')
  if isinstance(error, OSError) and error.errno in _STORE_ERRORS:
    where = f'{error.filename}: ' if error.filename else ''
    return Verdict(_STORE_ERRORS[error.errno], f'ppn: error: {where}{error.strerror}')
  if isinstance(error, Stopped):
    return Verdict(1, f'ppn: training stopped: {text}')
  if isinstance(error, StoreError) or type(error).__module__.startswith(STORE_CLIENTS):
    return Verdict(1, f'ppn: failed: {text[:300] or type(error).__name__}')
  if isinstance(error, KeyboardInterrupt):
    return Verdict(130, 'ppn: interrupted')
  return Verdict(1, None)


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
