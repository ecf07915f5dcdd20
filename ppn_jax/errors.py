"""Errors for user mistakes, reported in one line."""

import difflib
import errno
import pathlib
import re
import shlex
from collections.abc import Iterable
from typing import NamedTuple


class InputError(ValueError):
  """Mistake in a config, a flag, a data set, an image or a checkpoint.

  The message is one line: what is wrong, the value, and the legal values or the fix. Commands print
  it to stderr and exit with code 2. Any other exception is a bug and keeps its traceback.
  """


class InputTypeError(InputError, TypeError):
  """Argument of the wrong type."""


class StoreError(OSError):
  """Failed read or write of a bucket. The message is one line."""


# Modules of the client libraries for buckets. Their errors mean that storage is unavailable, not
# that its content is bad.
_STORE_CLIENTS = ('aiohttp.', 'gcsfs.', 'google.api_core.', 'google.auth.', 'google.cloud.',
                  'requests.')


class Stopped(RuntimeError):
  """Failure of a run that cannot continue although its input is valid. The message is one line.

  Commands print it to stderr and exit with code 1.
  """


# Operating system errors that concern a path, not the storage that it is on.
_PATH_ERRORS = frozenset({errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENOTEMPTY,
                         errno.ELOOP, errno.ENAMETOOLONG, errno.EINVAL, errno.EPIPE, errno.ESPIPE})


def is_outage(error: BaseException | None) -> bool:
  """Returns whether an error means that storage is unavailable, not that its content is bad.

  Outages are EIO, ESTALE, EMFILE or ENOMEM of a disk, for example, and anything that a client
  library of a bucket raises, also as the cause of another error. OSErrors without a number, which
  libraries raise, concern content.
  """
  while error is not None:
    if (isinstance(error, (StoreError, PermissionError, ConnectionError, TimeoutError, MemoryError))
        or type(error).__module__.startswith(_STORE_CLIENTS)
        or (isinstance(error, OSError) and error.errno not in {None, *_PATH_ERRORS})
        or (isinstance(error, OSError) and str(error).startswith('Forbidden'))):
      return True
    error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
  return False


class ExitStatus(NamedTuple):
  """Exit code and message of a command that ends with an exception."""
  code: int  # Exit code.
  line: str | None  # Printed to stderr; None for a bug, whose traceback is printed.


# Exit codes for a read-only and a full disk. A full one may have space again at the next start.
_DISK_ERRORS = {errno.EROFS: 2, errno.ENOSPC: 1, errno.EDQUOT: 1}


def exit_status(error: BaseException) -> ExitStatus:
  """Returns the exit code and the message of a command that ends with `error`."""
  text = ' '.join(str(error).split())
  if isinstance(error, InputError):
    return ExitStatus(2, f'ppn: error: {text}')
  if isinstance(error, (PermissionError, NotADirectoryError, IsADirectoryError, FileExistsError)):
    return ExitStatus(2, f'ppn: error: {error.filename}: {error.strerror}')
  if isinstance(error, OSError) and error.errno in _DISK_ERRORS:
    where = f'{error.filename}: ' if error.filename else ''
    return ExitStatus(_DISK_ERRORS[error.errno], f'ppn: error: {where}{error.strerror}')
  if isinstance(error, Stopped):
    return ExitStatus(1, f'ppn: training stopped: {text}')
  if isinstance(error, StoreError) or type(error).__module__.startswith(_STORE_CLIENTS):
    return ExitStatus(1, f'ppn: failed: {text[:300] or type(error).__name__}')
  if isinstance(error, KeyboardInterrupt):
    return ExitStatus(130, f'ppn: interrupted{text and ": "}{text}')
  if isinstance(error, OSError) and error.filename and is_outage(error):
    return ExitStatus(1, f'ppn: failed: {error.filename}: {error.strerror}')
  return ExitStatus(1, None)


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
  """Returns a hint for an error about an unknown name: the nearest legal one, or else all of them.

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
