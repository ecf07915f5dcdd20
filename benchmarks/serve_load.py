"""Sends many requests of good, broken, huge and slow kinds to a server on this machine.

  python benchmarks/serve_load.py --workdir=runs/mine --requests=10000

Starts `ppn serve`, and prints JSON: for each kind the answers, and the time of the good ones; the
server's memory at the beginning and the end.
"""

import argparse
import collections
import concurrent.futures
import http.client
import io
import json
import random
import re
import socket
import subprocess
import sys
import time

import numpy as np
import psutil
from PIL import Image

# Kind -> share of the requests.
KINDS = {'good': 0.85, 'large': 0.02, 'broken': 0.05, 'too many pixels': 0.02,
         'too many bytes': 0.03, 'slow': 0.01, 'gone': 0.02}


def pictures() -> dict[str, bytes]:
  """Returns a body for each kind that has one."""
  def file(height: int, width: int, form: str) -> bytes:
    small = np.random.default_rng(0).integers(0, 255, (height // 50 + 1, width // 50 + 1, 3),
                                              np.uint8)
    data = io.BytesIO()
    Image.fromarray(small).resize((width, height)).save(data, form)
    return data.getvalue()

  good = file(480, 640, 'JPEG')
  return {'good': good, 'large': file(3000, 4000, 'JPEG'), 'broken': good[:len(good) // 2],
          'too many pixels': file(8000, 8000, 'PNG'), 'too many bytes': bytes(11_000_000)}


def ask(address: tuple[str, int], kind: str, bodies: dict[str, bytes]) -> tuple[str, float]:
  """Sends one request; returns the status, or what happened to the connection, and the seconds."""
  start = time.perf_counter()
  if kind in ('slow', 'gone'):
    with socket.create_connection(address, timeout=60) as client:
      client.sendall(b'POST /detect HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\nabc')
      answer = '' if kind == 'gone' else client.recv(100).decode().split(' ')[1]
    return answer or 'closed by the client', time.perf_counter() - start
  try:
    connection = http.client.HTTPConnection(*address, timeout=60)
    connection.request('POST', '/detect', bodies[kind])
    answer = connection.getresponse()
    answer.read()
    return str(answer.status), time.perf_counter() - start
  except (BrokenPipeError, ConnectionResetError):
    # The server has refused the picture before it had arrived.
    return 'closed by the server', time.perf_counter() - start
  finally:
    connection.close()


def main() -> None:
  parser = argparse.ArgumentParser()
  parser.add_argument('--workdir', required=True)
  parser.add_argument('--requests', type=int, default=10_000)
  parser.add_argument('--clients', type=int, default=16)
  parser.add_argument('--batch_size', type=int, default=4)
  args = parser.parse_args()
  bodies = pictures()
  kinds = random.Random(0).choices(list(KINDS), list(KINDS.values()), k=args.requests)
  command = [sys.executable, '-m', 'ppn_jax.cli.main', 'serve', f'--workdir={args.workdir}',
             '--port=0', '--timeout=5', f'--batch_size={args.batch_size}']
  with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
    host, port = re.search(r'http://([\d.]+):(\d+)', server.stdout.readline()).groups()
    address, memory = (host, int(port)), []
    process = psutil.Process(server.pid)
    results, start = [], time.perf_counter()
    with concurrent.futures.ThreadPoolExecutor(args.clients) as pool:
      for i, (kind, result) in enumerate(zip(kinds, pool.map(
          lambda kind: ask(address, kind, bodies), kinds), strict=True)):
        results.append((kind, *result))
        if i % max(1, args.requests // 20) == 0:
          memory.append(round(process.memory_info().rss / 2**20))
    seconds = time.perf_counter() - start
    server.terminate()
  answers = {kind: dict(collections.Counter(a for k, a, _ in results if k == kind))
             for kind in KINDS}
  good = np.array([s for kind, answer, s in results if kind == 'good' and answer == '200']) * 1000
  print(json.dumps({
      'requests': len(results), 'seconds': round(seconds, 1), 'exit_code': server.returncode,
      'answers': answers, 'good_ms': {f'p{p}': round(float(np.percentile(good, p)), 1)
                                      for p in (50, 90, 99)},
      'memory_mib': memory}, indent=1))


if __name__ == '__main__':
  main()
