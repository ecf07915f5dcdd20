"""Server that imitates Google Cloud Storage, with folders as buckets.

For gcsfs, TensorStore and google-cloud-storage: objects are read in parts, listed, written in one
or many pieces, copied, moved and deleted, subject to the generation that a client requires.
"""

import base64
import contextlib
import email
import email.policy
import hashlib
import http.server
import itertools
import json
import os
import pathlib
import re
import threading
import urllib.parse
from collections.abc import Callable

_OBJECTS = re.compile(r'(?:/(?:upload|download|resumable))?/storage/v1/b/([^/]+)'
                      r'(?:/o(?:/([^/]+)(?:/(rewrite|copy|move)To(?:/b/([^/]+))?/o/([^/]+))?)?)?/?')


class _Buckets:
  """Folders, and the generation of each object that was written through the server."""

  def __init__(self, root: pathlib.Path):
    self._root, self._generations, self._count = root, {}, itertools.count(2)
    self.lock, self.uploads = threading.RLock(), {}

  def exists(self, bucket: str) -> bool:
    return (self._root / bucket).is_dir()

  def path(self, bucket: str, name: str) -> pathlib.Path:
    return self._root / bucket / name

  def generation(self, path: pathlib.Path) -> int:
    return self._generations.get(path, 1) if path.is_file() else 0

  def write(self, bucket: str, name: str, data: bytes) -> dict:
    path = self.path(bucket, name)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f'{path.name}.partial')
    partial.write_bytes(data)
    os.replace(partial, path)
    self._generations[path] = next(self._count)
    return self.resource(bucket, path)

  def delete(self, bucket: str, path: pathlib.Path) -> None:
    path.unlink()
    for folder in path.parents:  # Folders exist only as long as something is in them.
      if folder == self._root / bucket or any(folder.iterdir()):
        break
      folder.rmdir()

  def resource(self, bucket: str, path: pathlib.Path) -> dict:
    name = path.relative_to(self._root / bucket).as_posix()
    generation = str(self.generation(path))
    return {'kind': 'storage#object', 'name': name, 'bucket': bucket, 'generation': generation,
            'md5Hash': base64.b64encode(hashlib.md5(path.read_bytes()).digest()).decode(),
            'metageneration': '1', 'size': str(path.stat().st_size),
            'id': f'{bucket}/{name}/{generation}', 'updated': '2026-01-01T00:00:00Z',
            'timeCreated': '2026-01-01T00:00:00Z'}

  def listing(self, bucket: str, query: dict) -> dict:
    prefix, delimiter = query.get('prefix', ''), query.get('delimiter', '')
    first, end = query.get('startOffset', ''), query.get('endOffset', '\U0010ffff')
    items, folders = [], set()
    for path in sorted(p for p in (self._root / bucket).rglob('*') if p.is_file()):
      name = path.relative_to(self._root / bucket).as_posix()
      if name.startswith(prefix) and first <= name < end:
        head, found, _ = name[len(prefix):].partition(delimiter) if delimiter else (name, '', '')
        if found:
          folders.add(prefix + head + delimiter)
        else:
          items.append(self.resource(bucket, path))
    return {'kind': 'storage#objects', 'items': items, 'prefixes': sorted(folders)}


class _Handler(http.server.BaseHTTPRequestHandler):
  protocol_version = 'HTTP/1.1'
  wbufsize, disable_nagle_algorithm = 1 << 16, True  # Otherwise each answer takes 40 ms.
  buckets: _Buckets
  refuse: Callable[[str, str, str], int]

  def do_GET(self):
    self._answer(self._get)

  def do_POST(self):
    self._answer(self._continue_upload if 'upload_id=' in self.path else self._post)

  do_PUT = do_POST

  def do_DELETE(self):
    self._answer(self._delete)

  def _answer(self, method: Callable[..., None]):
    url = urllib.parse.urlsplit(self.path)
    self.query = dict(urllib.parse.parse_qsl(url.query, keep_blank_values=True))
    self.body = self._read_body()
    at = _OBJECTS.fullmatch(url.path)
    if not at:
      return self._send(404)
    bucket, name, *to = (urllib.parse.unquote(part or '') for part in at.groups())
    named = name or self.query.get('name', '')
    if not named and self.query.get('uploadType') in ('multipart', 'resumable'):
      named = self._upload_parts()[0].get('name', '')
    if status := self.refuse(self.command, bucket, named):
      return self._send(status)
    if not self.buckets.exists(bucket):
      return self._send(404)
    with self.buckets.lock:
      method(bucket, name, *to)

  def _get(self, bucket: str, name: str, *_):
    if name:
      path = self.buckets.path(bucket, name)
      if self._condition_holds(path) and self._is_there(path):
        if self.query.get('alt') == 'media' or self.path.startswith('/download'):
          self._send_part(path)
        else:
          self._send(200, self.buckets.resource(bucket, path))
    elif re.search(r'/o/?(\?|$)', self.path):
      self._send(200, self.buckets.listing(bucket, self.query))
    else:
      self._send(200, {'kind': 'storage#bucket', 'name': bucket})

  def _post(self, bucket: str, name: str, how: str, to_bucket: str, to_name: str):
    if how:
      path = self.buckets.path(bucket, name)
      if self._is_there(path):
        made = self.buckets.write(to_bucket or bucket, to_name, path.read_bytes())
        if how == 'move':
          self.buckets.delete(bucket, path)
        self._send(200, {'done': True, 'resource': made} if how == 'rewrite' else made)
      return
    metadata, data = self._upload_parts()
    name = self.query.get('name') or metadata['name']
    if not self._condition_holds(self.buckets.path(bucket, name)):
      return
    if self.query['uploadType'] == 'resumable':
      upload = str(len(self.buckets.uploads))
      self.buckets.uploads[upload] = (name, bytearray())
      host = self.headers['Host']
      return self._send(200, Location=f'http://{host}/resumable/storage/v1/b/{bucket}/o'
                                      f'?upload_id={upload}')
    self._send(200, self.buckets.write(bucket, name, data))

  def _continue_upload(self, bucket: str, *_):
    name, data = self.buckets.uploads[self.query['upload_id']]
    data += self.body
    if self.headers['Content-Range'].endswith('/*'):
      return self._send(308, Range=f'bytes=0-{len(data) - 1}')
    self._send(200, self.buckets.write(bucket, name, bytes(data)))

  def _delete(self, bucket: str, name: str, *_):
    path = self.buckets.path(bucket, name)
    if self._is_there(path) and self._condition_holds(path):
      self.buckets.delete(bucket, path)
      self._send(204)

  def _is_there(self, path: pathlib.Path) -> bool:
    if not path.is_file():
      self._send(404)
    return path.is_file()

  def _condition_holds(self, path: pathlib.Path) -> bool:
    """Returns whether the object has the generation that the client requires; answers if not."""
    now = self.buckets.generation(path)
    if int(self.query.get('ifGenerationMatch', now)) != now:
      self._send(412)
      return False
    if int(self.query.get('ifGenerationNotMatch', -1)) == now:
      self._send(304 if self.command == 'GET' else 412)
      return False
    return True

  def _upload_parts(self) -> tuple[dict, bytes]:
    kind = self.headers.get('Content-Type', '')
    if kind.startswith('multipart/'):
      whole = f'Content-Type: {kind}\r\n\r\n'.encode() + self.body
      parts = email.message_from_bytes(whole, policy=email.policy.HTTP).get_payload()
      return json.loads(parts[0].get_payload(decode=True)), self._last_part(kind)
    if self.query['uploadType'] == 'resumable':
      return json.loads(self.body or b'{}'), b''
    return {}, self.body

  def _last_part(self, kind: str) -> bytes:
    """Returns the body unchanged, since the parser of mails changes ends of lines."""
    boundary = re.search(r'boundary="?([^";]+)', kind)[1].encode()
    part = self.body.split(b'--' + boundary)[2]
    return re.split(rb'\r?\n\r?\n', part, maxsplit=1)[1].removesuffix(b'\n').removesuffix(b'\r')

  def _read_body(self) -> bytes:
    if self.headers.get('Transfer-Encoding') != 'chunked':
      return self.rfile.read(int(self.headers.get('Content-Length') or 0))
    chunks = []
    while size := int(self.rfile.readline(), 16):
      chunks.append(self.rfile.read(size))
      self.rfile.readline()
    self.rfile.readline()
    return b''.join(chunks)

  def _send_part(self, path: pathlib.Path):
    data = path.read_bytes()
    headers = {'X-Goog-Generation': str(self.buckets.generation(path))}
    part = re.fullmatch(r'bytes=(\d*)-(\d*)', self.headers.get('Range', ''))
    if not part:
      return self._send(200, data, **headers)
    first = int(part[1]) if part[1] else max(0, len(data) - int(part[2]))
    last = min(int(part[2]), len(data) - 1) if part[1] and part[2] else len(data) - 1
    if first > last:
      return self._send(416, **{'Content-Range': f'bytes */{len(data)}'})
    return self._send(206, data[first:last + 1],
                      **{'Content-Range': f'bytes {first}-{last}/{len(data)}'}, **headers)

  def _send(self, status: int, data: bytes | dict | None = None, **headers: str):
    if data is None:
      data = {'error': {'code': status, 'message': f'status {status}'}} if status >= 400 else b''
    content = json.dumps(data).encode() if isinstance(data, dict) else data
    self.send_response(status)
    headers.setdefault('Content-Type', 'application/json')
    for key, value in headers.items():
      self.send_header(key, value)
    if status not in (204, 304):
      self.send_header('Content-Length', str(len(content)))
    self.end_headers()
    if status not in (204, 304):
      self.wfile.write(content)

  def log_message(self, *args):
    pass

  def handle(self):
    with contextlib.suppress(ConnectionError):  # The client closed the connection.
      super().handle()


@contextlib.contextmanager
def serve(root: pathlib.Path, refuse: Callable[[str, str, str], int] = lambda *_: 0):
  """Serves each folder in `root` as a bucket and yields the environment for clients.

  `refuse(method, bucket, object)` returns the HTTP status of a refusal, or 0.
  """
  members = {'buckets': _Buckets(root), 'refuse': staticmethod(refuse)}
  server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), type('Handler', (_Handler,), members))
  thread = threading.Thread(target=server.serve_forever, daemon=True)
  thread.start()
  address = f'http://127.0.0.1:{server.server_port}'
  try:
    yield {'STORAGE_EMULATOR_HOST': address,  # gcsfs and google-cloud-storage.
           'CLOUD_STORAGE_EMULATOR_ENDPOINT': address,  # ArrayRecord's own reader.
           'TENSORSTORE_GCS_HTTP_URL': address, 'GOOGLE_AUTH_TOKEN_FOR_TESTING': 'none',
           'GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT': 'false'}
  finally:
    server.shutdown()
    server.server_close()


def forget_clients() -> None:
  """Makes the libraries connect to another server, or to the same one again."""
  import gcsfs
  from etils.epath import backend

  from ppn_jax import storage
  storage._client.cache_clear()
  storage._check_bucket.cache_clear()
  gcsfs.GCSFileSystem.clear_instance_cache()
  backend.fsspec_backend._get_filesystem.cache_clear()
