"""Runs the server until it is told to end."""

import signal
import threading
from typing import Any

import uvicorn

from ppn_jax.errors import InputError
from ppn_jax.serving.app import Server


def serve(server: Server, host: str, port: int, *, max_connections: int, timeout: float,
          on_start: Any = lambda address: None) -> None:
  """Listens until SIGTERM or Ctrl-C; requests in progress are answered first.

  Args:
    server: The server.
    host, port: Where to listen; port 0 is any free one.
    max_connections: Further connections are refused with status 503.
    timeout: Seconds after which an idle connection is closed, and for requests in progress at the
      end.
    on_start: Called with the address when it listens.

  Raises:
    InputError: If the port cannot be used.
  """
  config = uvicorn.Config(
      server.app, host=host, port=port, log_level='critical', access_log=False, lifespan='off',
      limit_concurrency=max_connections, timeout_keep_alive=max(1, round(min(timeout, 5))),
      timeout_graceful_shutdown=max(1, round(timeout)), server_header=False)
  try:
    socket = config.bind_socket()
    socket.listen(config.backlog)  # Connections wait from now on.
  except (SystemExit, OSError) as e:  # It exits if the port is in use.
    raise InputError(f'--host={host} --port={port}: cannot listen there; is the port in use?'
                     ) from e
  listening = uvicorn.Server(config)
  # In a thread of its own, uvicorn leaves signals alone, which the command handles.
  thread = threading.Thread(target=listening.run, args=([socket],), name='ppn serve', daemon=True)
  before = _on_sigterm(lambda *_: setattr(listening, 'should_exit', True))
  try:
    thread.start()
    on_start(f'http://{host}:{socket.getsockname()[1]}')
    while thread.is_alive():
      thread.join(0.2)
  finally:
    listening.should_exit = True
    thread.join()
    server.close()
    if before is not None:
      signal.signal(signal.SIGTERM, before)


def _on_sigterm(handler: Any) -> Any:
  """Sets the handler of SIGTERM and returns the previous one; None outside the main thread."""
  if threading.current_thread() is not threading.main_thread():
    return None
  return signal.signal(signal.SIGTERM, handler) or signal.SIG_DFL
