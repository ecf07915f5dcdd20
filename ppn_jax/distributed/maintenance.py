"""Notice that this machine will be taken away, as Google Cloud's metadata server gives it.

JAX's preemption service hears SIGTERM only. That comes when a VM is already being shut down;
maintenance of a TPU's host is announced before, and so is the end of a spot VM. See
https://cloud.google.com/compute/docs/metadata/getting-live-migration-notice.
"""

import contextlib
import http.client
import os
import threading
from collections.abc import Callable

_ADDRESS = '169.254.169.254'  # On every VM of Google Cloud; elsewhere nobody, or another cloud.
_HEADERS = {'Metadata-Flavor': 'Google'}
_POLL_SECONDS = 1.0  # A spot VM has 30 s left.
_TIMEOUT = 2.0
_ATTEMPTS = 3

# What says that the machine will be taken away. Other maintenance moves VMs that go on meanwhile.
_NOTICES = {'maintenance-event': 'TERMINATE_ON_HOST_MAINTENANCE', 'preempted': 'TRUE'}


class MaintenanceWatch:
  """Asks the metadata server each second, in a thread; a context manager.

  Without such a server the thread ends by itself, and nothing waits for that. The environment is
  that of google-auth: GCE_METADATA_HOST names another server, NO_GCE_CHECK=true asks none.

  Args:
    on_notice: called once, in that thread. What had been announced before the start is no news:
      a run that has ended for it, and is started again on the same machine, goes on until SIGTERM.
  """

  def __init__(self, on_notice: Callable[[], None]):
    self._on_notice, self._stop = on_notice, threading.Event()
    self._host = os.environ.get('GCE_METADATA_HOST') or _ADDRESS

  def __enter__(self) -> 'MaintenanceWatch':
    if os.environ.get('NO_GCE_CHECK', '').lower() != 'true':
      threading.Thread(target=self._watch, name='ppn maintenance', daemon=True).start()
    return self

  def __exit__(self, *_: object) -> None:
    self._stop.set()

  def _watch(self) -> None:
    before = self._first_look()
    if before is None:
      return
    while not self._stop.wait(_POLL_SECONDS):
      now = self._announced()
      if now is None:
        continue
      if now - before and not self._stop.is_set():
        self._on_notice()
        return
      before = now

  def _first_look(self) -> set[str] | None:
    for _ in range(_ATTEMPTS):
      if (announced := self._announced()) is not None or self._stop.wait(_POLL_SECONDS):
        return announced
    return None

  def _announced(self) -> set[str] | None:
    """Which notices stand; None where no metadata server answers."""
    try:
      return {key for key, value in _NOTICES.items() if self._read(key) == value}
    except (OSError, http.client.HTTPException):
      return None

  def _read(self, key: str) -> str:
    connection = http.client.HTTPConnection(self._host, timeout=_TIMEOUT)
    with contextlib.closing(connection):
      connection.request('GET', f'/computeMetadata/v1/instance/{key}', headers=_HEADERS)
      answer = connection.getresponse()
      text = answer.read(1000).decode('ascii', 'replace').strip()
    if answer.headers.get('Metadata-Flavor') != 'Google':
      raise ConnectionError(f'{self._host} is no metadata server of Google Cloud')
    return text if answer.status == 200 else ''
