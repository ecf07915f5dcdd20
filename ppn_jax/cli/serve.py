"""`ppn serve`."""

import argparse
import math

from ppn_jax.cli.flags import (
  add_matmul_dtype_flag,
  add_model_flags,
  allowed,
  keep_programs,
)
from ppn_jax.errors import InputError, install_command

HELP = """Answer pictures over HTTP by the objects in them.

POST the bytes of a picture to /detect, and get JSON, or with ?format=picture the picture with
its boxes drawn. Pictures of several clients are detected in batches. /health and /metrics are
for supervisors and Prometheus. It has neither encryption nor passwords, and listens on this
machine only unless --host says otherwise: put it behind a proxy that has them."""

TAKES_CONFIG = False


def add_arguments(parser: argparse.ArgumentParser) -> None:
  add_model_flags(parser, model='instead: a file that `ppn export` wrote')
  parser.add_argument('--step', type=int, metavar='N', help='which checkpoint (default: newest)')
  parser.add_argument('--host', default='127.0.0.1', help='where to listen (default: %(default)s)')
  parser.add_argument('--port', type=int, default=8000, metavar='N',
                      help='port, 0 for any free one (default: %(default)s)')
  parser.add_argument('--threshold', type=float, metavar='SCORE',
                      help='lowest score of a box, if a request does not say (default: the best of '
                           'its class, if the model was evaluated, otherwise 0.3)')
  parser.add_argument('--batch_size', type=int, metavar='N',
                      help='pictures that are detected at a time (default: 4, or that of the '
                           'exported file)')
  add_matmul_dtype_flag(parser)
  parser.add_argument('--wait', type=float, default=5, metavar='MS',
                      help='milliseconds that a picture waits for others (default: %(default)s)')
  parser.add_argument('--max_megabytes', type=float, default=10, metavar='N',
                      help='largest picture file (default: %(default)s)')
  parser.add_argument('--max_megapixels', type=float, default=50, metavar='N',
                      help='largest picture (default: %(default)s)')
  parser.add_argument('--max_requests', type=int, default=32, metavar='N',
                      help='pictures at a time; others are refused (default: %(default)s)')
  parser.add_argument('--timeout', type=float, default=30, metavar='SECONDS',
                      help='for a picture to arrive, and to be detected (default: %(default)s)')


def run(args: argparse.Namespace) -> int:
  try:
    import starlette  # noqa: F401
    import uvicorn  # noqa: F401
  except ImportError as e:
    raise InputError(f"ppn serve needs Starlette and uvicorn; {install_command('serve')}") from e
  if args.threshold is not None and not 0 <= args.threshold <= 1:
    raise InputError(f'--threshold={args.threshold} must be between 0 and 1')
  if not 0 <= args.port <= 65535:
    raise InputError(f'--port={args.port} must be 0 to 65535')
  for name in ('max_megabytes', 'max_megapixels', 'timeout'):
    if not 0 < (value := getattr(args, name)) < math.inf:
      raise InputError(f'--{name}={value} must be a number above 0')
  if not 0 <= args.wait <= 10_000:
    raise InputError(f'--wait={args.wait} must be 0 to 10,000 milliseconds')
  from ppn_jax.serving.limits import Limits
  limits = Limits(round(args.max_megabytes * 1e6), round(args.max_megapixels * 1e6),
                  args.max_requests, args.timeout)
  from ppn_jax.export.runtimes import is_export
  from ppn_jax.export.weights_file import is_weights_file
  from ppn_jax.image_detector import load
  from ppn_jax.serving.app import Server
  from ppn_jax.serving.run import serve
  from ppn_jax.telemetry.host_memory import keep_freed_memory
  keep_freed_memory()
  keep_programs()
  path = args.workdir if args.model is None else args.model
  batch_size = args.batch_size
  if batch_size is None and (is_weights_file(path) or not is_export(path)):
    batch_size = 4
  detector = load(path, step=args.step, batch_size=batch_size, matmul_dtype=args.matmul_dtype,
                  allow=allowed(args))
  server = Server(detector, limits, threshold=args.threshold, wait=args.wait / 1000)
  server.warm_up()
  serve(server, args.host, args.port, max_connections=8 * args.max_requests, timeout=args.timeout,
        on_start=lambda address: print(f'ready at {address} (Ctrl-C ends it)', flush=True))
  return 0
