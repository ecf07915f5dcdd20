"""What a caller did wrong, said so that the caller can mend it."""

import difflib
import errno
import pathlib
import re
import shlex
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


# What the operating system says of a path, not of the store that it is on.
_OF_THE_PATH = frozenset({errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENOTEMPTY,
                          errno.ELOOP, errno.ENAMETOOLONG, errno.EINVAL, errno.EPIPE, errno.ESPIPE})


def is_outage(error: BaseException | None) -> bool:
  """Returns whether an error tells of a store that cannot be used now, not of what is in it.

  Such as EIO, ESTALE, EMFILE or ENOMEM of a disk, and whatever a client of a bucket raises. An
  error that was raised from one counts as one. OSErrors without a number, which libraries raise,
  tell of content.
  """
  while error is not None:
    if (isinstance(error, (StoreError, PermissionError, ConnectionError, TimeoutError, MemoryError))
        or type(error).__module__.startswith(STORE_CLIENTS)
        or (isinstance(error, OSError) and error.errno not in {None, *_OF_THE_PATH})
        or (isinstance(error, OSError) and str(error).startswith('Forbidden'))):
      return True
    error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
  return False


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
    return Verdict(130, f'ppn: interrupted{text and ": "}{text}')
  if isinstance(error, OSError) and error.filename and is_outage(error):
    return Verdict(1, f'ppn: failed: {error.filename}: {error.strerror}')
  return Verdict(1, None)


def install_command(extra: str) -> str:
  """Returns the command that installs an optional extra, such as 'tpu'.

  In a clone the command names the clone's folder, so that it works anywhere and does not replace
  the clone by a package from an index.
  """
  root = pathlib.Path(__file__).resolve().parents[1]
  try:
    is_clone = re.search(r'^name = "ppn_jax"$', (root / 'pyproject.toml').read_text('utf-8'), re.M)
  except (OSError, UnicodeDecodeError):
    is_clone = None
  return (f'pip install -e {shlex.quote(f"{root}[{extra}]")}' if is_clone else
          f'pip install {shlex.quote(f"ppn_jax[{extra}]")}')


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
