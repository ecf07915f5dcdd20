"""Reports of errors by commands."""

import errno

import pytest

from ppn_jax.errors import InputError, Stopped, StoreError, exit_status


class Refused(Exception):
  """Error of a bucket's client library."""


Refused.__module__ = 'google.api_core.exceptions'


@pytest.mark.parametrize('error, code, line', [
    (InputError('steps=0\nis too few'), 2, 'ppn: error: steps=0 is too few'),
    (PermissionError(errno.EACCES, 'Permission denied', '/data'), 2,
     'ppn: error: /data: Permission denied'),
    (OSError(errno.ENOSPC, 'No space left on device', '/run'), 1,
     'ppn: error: /run: No space left on device'),
    (OSError(errno.EROFS, 'Read-only file system'), 2, 'ppn: error: Read-only file system'),
    (Stopped('loss is nan'), 1, 'ppn: training stopped: loss is nan'),
    (StoreError('gs://b/x: 503'), 1, 'ppn: failed: gs://b/x: 503'),
    (Refused('503 try\nagain'), 1, 'ppn: failed: 503 try again'),
    (Refused(), 1, 'ppn: failed: Refused'),
    (KeyboardInterrupt(), 130, 'ppn: interrupted'),
    (OSError(errno.EIO, 'Input/output error'), 1, None),
    (ZeroDivisionError('a bug'), 1, None),
])
def test_one_line_or_a_traceback(error, code, line):
  assert exit_status(error) == (code, line)
