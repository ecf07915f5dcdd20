"""A folder of folders served as Google Cloud Storage serves buckets: enough to read objects."""

import contextlib
import http.server
import json
import pathlib
import re
import threading
import urllib.parse


class _Handler(http.server.BaseHTTPRequestHandler):
  protocol_version = 'HTTP/1.1'
  root: pathlib.Path

  def do_GET(self):
    url = urllib.parse.urlsplit(self.path)
    query = dict(urllib.parse.parse_qsl(url.query))
    at = re.fullmatch(r'(?:/download)?/storage/v1/b/([^/]+)(?:/o(?:/(.+))?)?', url.path)
    if not at:
      return self._send(404, b'{}')
    bucket, name = at[1], urllib.parse.unquote(at[2] or '')
    if name:
      path = self.root / bucket / name
      if not path.is_file():
        return self._send(404, json.dumps({'error': {'code': 404}}).encode())
      if query.get('alt') == 'media':
        return self._send_part(path.read_bytes())
      return self._send(200, json.dumps(_resource(self.root / bucket, path)).encode())
    if url.path.endswith('/o'):
      return self._send(200, json.dumps(_listing(self.root / bucket, query)).encode())
    return self._send(200, json.dumps({'kind': 'storage#bucket', 'name': bucket}).encode())

  def _send_part(self, data: bytes):
    part = re.fullmatch(r'bytes=(\d*)-(\d*)', self.headers.get('Range', ''))
    if not part:
      return self._send(200, data)
    first = int(part[1]) if part[1] else max(0, len(data) - int(part[2]))
    last = min(int(part[2]), len(data) - 1) if part[1] and part[2] else len(data) - 1
    if first > last:
      return self._send(416, b'', **{'Content-Range': f'bytes */{len(data)}'})
    return self._send(206, data[first:last + 1],
                      **{'Content-Range': f'bytes {first}-{last}/{len(data)}'})

  def _send(self, status: int, data: bytes, **headers: str):
    self.send_response(status)
    headers.setdefault('Content-Type', 'application/json')
    for key, value in headers.items() | {('Content-Length', str(len(data)))}:
      self.send_header(key, value)
    self.end_headers()
    self.wfile.write(data)

  def log_message(self, *args):
    pass

  def handle(self):
    with contextlib.suppress(ConnectionError):  # A client that hangs up early.
      super().handle()


def _resource(bucket: pathlib.Path, path: pathlib.Path) -> dict:
  name = path.relative_to(bucket).as_posix()
  return {'kind': 'storage#object', 'name': name, 'bucket': bucket.name, 'generation': '1',
          'metageneration': '1', 'size': str(path.stat().st_size), 'id': f'{bucket.name}/{name}/1',
          'updated': '2026-01-01T00:00:00Z', 'timeCreated': '2026-01-01T00:00:00Z'}


def _listing(bucket: pathlib.Path, query: dict) -> dict:
  prefix, delimiter = query.get('prefix', ''), query.get('delimiter', '')
  items, folders = [], set()
  for path in sorted(p for p in bucket.rglob('*') if p.is_file()):
    name = path.relative_to(bucket).as_posix()
    if name.startswith(prefix):
      head, found, _ = name[len(prefix):].partition(delimiter) if delimiter else (name, '', '')
      if found:
        folders.add(prefix + head + delimiter)
      else:
        items.append(_resource(bucket, path))
  return {'kind': 'storage#objects', 'items': items, 'prefixes': sorted(folders)}


@contextlib.contextmanager
def serve(root: pathlib.Path):
  """Serves each folder in `root` as a bucket; gives the environment by which clients find it."""
  handler = type('Handler', (_Handler,), {'root': root})
  server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), handler)
  thread = threading.Thread(target=server.serve_forever, daemon=True)
  thread.start()
  address = f'http://127.0.0.1:{server.server_port}'
  try:
    yield {'STORAGE_EMULATOR_HOST': address,  # gcsfs, for what is small.
           'CLOUD_STORAGE_EMULATOR_ENDPOINT': address,  # ArrayRecord's own reader.
           'GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT': 'false'}
  finally:
    server.shutdown()
    server.server_close()
