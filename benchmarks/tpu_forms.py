"""Estimates the effect of each optimisation of the training step on TPUs, by their compiler.

  python benchmarks/tpu_forms.py --json

Compiles PPN at 300 px with 90 classes in bfloat16 by `ppn plan` for one v5e and one v6e chip: the
naive form, then with each change added to those before it, at the commit that introduced it, and
last the step of the newest commit. Needs libtpu (extra `tpu`) but no TPU, and takes one to three
minutes per compilation. Cycles are the sum of the compiler's estimates, and bytes what the program
reads from and writes to HBM; images/s follow from either at the chip's clock and bandwidth. With
--json the last line is JSON. Results in --output are not compiled again, so that an interrupted
call can be repeated.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import tarfile
import tempfile

import hardware

ROOT = pathlib.Path(__file__).resolve().parents[1]
# (change, commit that has it, flags). The first two share a commit, whose own form is the second.
STAGES = (
    ('naive', 'becf990', ('--config.model.layers.conv_form=native',)),
    ('narrow depthwise convolutions dense', 'becf990', ()),
    ('focal loss by cell', '6c61d10', ()),
    ('float32 kernel gradients', '6192ef4', ()),
    ('newest commit', 'HEAD', ()),
)
# The first and last stage are compiled at all of these, the others at the second only.
BATCHES = (64, 128, 256)
KEYS = ('cycles', 'hbm_bytes', 'images_per_second_by_cycles', 'images_per_second_by_bytes',
        'peak_hbm', 'compile_seconds', 'libtpu_version')


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
  parser.add_argument('--topology', action='append', metavar='NAME',
                      help='one chip (default: v5e:1x1 and v6e:1x1)')
  parser.add_argument('--output', default='', metavar='FILE',
                      help='JSON lines with results, which are read first if the file exists')
  parser.add_argument('--json', action='store_true', help='print JSON as the last line')
  args = parser.parse_args()

  done = _read(args.output)
  rows = []
  with tempfile.TemporaryDirectory() as folder:
    for topology in args.topology or ('v5e:1x1', 'v6e:1x1'):
      for stage, batch in _runs():
        key = [topology, STAGES[stage][0], batch]
        row = done.get(tuple(key)) or _plan(pathlib.Path(folder), topology, stage, batch)
        if args.output and tuple(key) not in done:
          with open(args.output, 'a', encoding='utf-8') as file:
            file.write(json.dumps({'key': key} | row) + '\n')
        rows.append(dict(zip(('topology', 'form', 'batch_per_chip'), key, strict=True)) | row)
        print(_line(rows[-1]), flush=True)
  if args.json:
    print(json.dumps({'benchmark': 'tpu_forms', 'rows': rows, **hardware.describe()}))


def _runs() -> list[tuple[int, int]]:
  """Returns all pairs of a stage and a number of images per chip."""
  ends = (0, len(STAGES) - 1)
  return [(stage, batch) for stage in range(len(STAGES)) for batch in BATCHES
          if stage in ends or batch == BATCHES[1]]


def _plan(folder: pathlib.Path, topology: str, stage: int, batch: int) -> dict:
  """Returns the estimate of `ppn plan` at the commit of a stage."""
  _, commit, flags = STAGES[stage]
  tree = folder / commit
  if not tree.exists():
    archive = folder / f'{commit}.tar'
    subprocess.run(['git', 'archive', f'--output={archive}', commit, 'ppn_jax', 'configs'],
                   cwd=ROOT, check=True)
    with tarfile.open(archive) as files:
      files.extractall(tree, filter='data')
  command = [sys.executable, '-m', 'ppn_jax.cli.main', 'plan',
             '--config=configs/ppn_mobilenet_v1_coco.py', '--config.model.num_classes=90',
             f'--topology={topology}', f'--batch_per_chip={batch}', '--json', *flags]
  path = os.pathsep.join(filter(None, (str(tree), os.environ.get('PYTHONPATH'))))
  result = subprocess.run(command, cwd=tree, capture_output=True, text=True, check=False,
                          env=os.environ | {'PYTHONPATH': path})
  if result.returncode:
    raise SystemExit(f'{" ".join(command)}: {result.stderr.strip()[-2000:]}')
  estimate, = json.loads(result.stdout)
  return {k: estimate[k] for k in KEYS} | {'ms_by_cycles': 1000 * estimate['step_seconds'][0],
                                           'ms_by_bytes': 1000 * estimate['step_seconds'][1]}


def _read(output: str) -> dict[tuple, dict]:
  if not output or not pathlib.Path(output).exists():
    return {}
  rows = [json.loads(line) for line in pathlib.Path(output).read_text('utf-8').splitlines()]
  return {tuple(row.pop('key')): row for row in rows}


def _line(row: dict) -> str:
  return (f'{row["topology"]:8} {row["batch_per_chip"]:4} {row["form"]:40} '
          f'{row["ms_by_cycles"]:6.1f} ms by cycles, {row["ms_by_bytes"]:6.1f} by bytes')


if __name__ == '__main__':
  main()
