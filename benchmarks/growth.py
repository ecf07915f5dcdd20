"""Measures how time and memory of the training step grow with the size of its inputs.

  python benchmarks/growth.py --json

Starts from the paper's config (configs/ppn_mobilenet_v1_coco.py, except for its dtype) and changes
one quantity at a time: images per batch, boxes that the ground truth of an image is padded to,
classes, and the side of the image (with as many pyramid levels as it takes to shrink to one cell).
Each round takes one step at every point, so that all see the same disturbances. For each point it
reports the median, fastest and slowest step, the times of assignment and of the loss with its
gradient, and the bytes that the step holds on a device by XLA's count. For each quantity it reports
the log-log slope of time and memory by least squares (1 is proportional), the slope of time in each
round (median, lowest, highest), and for boxes and classes the milliseconds that 100 more add.
Slopes are computed over the whole range and over its upper half, where fixed costs matter less.

--large uses a base and ranges for a GPU. Points that do not fit into its memory are skipped and
listed. With --json the last line is JSON; a picture is written to --picture.
"""

import argparse
import json
import pathlib
from typing import TYPE_CHECKING

import hardware
import jax
import numpy as np
import train_step

from ppn_jax.config_files import load_config
from ppn_jax.telemetry.profiling import program_bytes
from ppn_jax.visualization.drawing import save_picture
from ppn_jax.visualization.plotting import MUTED, plot

if TYPE_CHECKING:
  from matplotlib.axes import Axes

ROOT = pathlib.Path(__file__).resolve().parents[1]
CONFIG = ROOT / 'configs' / 'ppn_mobilenet_v1_coco.py'
QUANTITIES = {'batch': 'images per batch', 'boxes': 'boxes that ground truth is padded to',
              'classes': 'classes', 'side': 'side of the image in pixels'}
CPU = ({'batch': 8, 'boxes': 100, 'classes': 80, 'side': 300},
       {'batch': (2, 4, 8, 16, 32), 'boxes': (10, 30, 100, 200, 500),
        'classes': (20, 80, 300, 600, 1200), 'side': (160, 224, 300, 448, 640)})
LARGE = ({'batch': 256, 'boxes': 100, 'classes': 80, 'side': 300},
         {'batch': (32, 64, 128, 256, 512, 1024), 'boxes': (10, 30, 100, 200, 500),
          'classes': (20, 80, 300, 600, 1200), 'side': (160, 224, 300, 448, 640)})
PARTS = ('step', 'assignment', 'loss')
TIME, MEMORY = '#0072b2', '#d55e00'


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
  parser.add_argument('--large', action='store_true', help='sizes for a GPU')
  parser.add_argument('--dtype', default='', choices=('float32', 'bfloat16'),
                      help='default: float32 on a CPU, which has no fast bfloat16, else bfloat16')
  parser.add_argument('--rounds', type=int, default=7)
  parser.add_argument('--only', default='', metavar='NAME,...',
                      help=f'some of {", ".join(QUANTITIES)}')
  parser.add_argument('--picture', metavar='FILE.png', help='draw the curves')
  parser.add_argument('--json', action='store_true', help='print JSON as the last line')
  args = parser.parse_args()
  quantities = args.only.split(',') if args.only else list(QUANTITIES)
  if unknown := set(quantities) - set(QUANTITIES):
    parser.error(f'--only: unknown {sorted(unknown)[0]!r}; legal: {", ".join(QUANTITIES)}')
  if args.rounds < 1:
    parser.error(f'--rounds={args.rounds} must be at least 1')
  if args.picture and not args.picture.endswith('.png'):
    parser.error(f'--picture={args.picture} must end in .png')
  dtype = args.dtype or ('float32' if jax.default_backend() == 'cpu' else 'bfloat16')

  base, ranges = LARGE if args.large else CPU
  points = {(name, value): base | {name: value} for name in quantities for value in ranges[name]}
  measured, too_large = measure(list(points.values()), dtype, args.rounds)
  curves = {name: curve(name, [(value, measured[_key(points[name, value])])
                               for value in ranges[name] if _key(points[name, value]) in measured])
            for name in quantities}
  result = {'benchmark': 'growth', 'dtype': dtype, 'base': base, 'rounds': args.rounds,
            'curves': curves, 'does_not_fit': too_large, **hardware.describe()}
  for name in quantities:
    print_curve(name, curves[name])
  if args.picture:
    draw(pathlib.Path(args.picture), result)
  if args.json:
    print(json.dumps(result))


def _key(point: dict) -> tuple:
  return tuple(point.values())


def measure(points: list[dict], dtype: str, rounds: int) -> tuple[dict, list[dict]]:
  """Returns {values of a point: {bytes, compile_s, ms by part and round}}, and points too large."""
  runs, measured, too_large = {}, {}, []
  for key, point in {_key(p): p for p in points}.items():
    try:
      setup = train_step.set_up(build_config(point, dtype), point['batch'], point['boxes'])
      parts = train_step.loss_parts(setup)
      setup.train_step()
    except jax.errors.JaxRuntimeError as e:
      if 'RESOURCE_EXHAUSTED' not in str(e):
        raise
      too_large.append(point)
      print(f'{point} does not fit into memory', flush=True)
      continue
    runs |= {(key, 'step'): setup.train_step, (key, 'assignment'): parts['assignment'],
             (key, 'loss'): parts['loss_with_gradient']}
    measured[key] = {'bytes': program_bytes(setup.compiled),
                     'compile_s': round(setup.compile_seconds, 1)}
    print(f'compiled {point} in {setup.compile_seconds:.1f} s', flush=True)
  for (key, part), times in train_step.in_turns(runs, rounds).items():
    measured[key][part] = times
  return measured, too_large


def build_config(point: dict, dtype: str):
  """Returns the paper's config at a point."""
  config = load_config(str(CONFIG), [])
  with config.unlocked():
    config.model.image_size, config.model.num_classes = point['side'], point['classes']
    cells = -(-point['side'] // config.model.neck.stride)
    config.model.neck.num_levels = 1 + int(np.ceil(np.log2(cells)))
    config.model.layers.dtype = dtype
  return config


def curve(name: str, points: list[tuple[int, dict]]) -> dict:
  """Returns times, memory and slopes of a quantity from the measurements at its values."""
  values = np.array([value for value, _ in points], float)
  times = {part: np.array([m[part] for _, m in points]) for part in PARTS}  # [values, rounds]
  upper = slice(len(values) // 2, None)
  slopes = [_slope(values, of_round) for of_round in times['step'].T]
  median = {part: np.median(t, axis=1) for part, t in times.items()}
  memory = np.array([m['bytes'] for _, m in points], float)
  found = {
      'values': [value for value, _ in points],
      **{f'{part}_ms': [{'median': _round(np.median(t)), 'fastest': _round(t.min()),
                         'slowest': _round(t.max())} for t in times[part]] for part in PARTS},
      'bytes': [m['bytes'] for _, m in points], 'compile_s': [m['compile_s'] for _, m in points],
      'slope': {'median': _round(np.median(slopes)), 'lowest': _round(min(slopes)),
                'highest': _round(max(slopes))},
      'slope_of_upper_half': _round(_slope(values[upper], median['step'][upper])),
      'slope_of_memory': _round(_slope(values, memory))}
  if name in ('boxes', 'classes'):
    found['ms_of_100_more'] = {p: _round(100 * np.polyfit(values, m, 1)[0])
                               for p, m in median.items()}
    found['megabytes_of_100_more'] = _round(np.polyfit(values, memory, 1)[0] / 1e4)
  return found


def _slope(x: np.ndarray, y: np.ndarray) -> float:
  return float(np.polyfit(np.log(x), np.log(y), 1)[0]) if len(x) > 1 else float('nan')


def _round(value: float) -> float:
  return round(float(value), 3)


def print_curve(name: str, found: dict) -> None:
  print(f'\n{QUANTITIES[name]}')
  for i, value in enumerate(found['values']):
    step = found['step_ms'][i]
    print(f'{value:7} {step["median"]:9.1f} ms ({step["fastest"]:.1f} to {step["slowest"]:.1f})  '
          f'assignment {found["assignment_ms"][i]["median"]:7.2f}  '
          f'loss {found["loss_ms"][i]["median"]:7.2f}  {found["bytes"][i] / 1e6:9.1f} MB')
  print('slope {median} ({lowest} to {highest}), '.format(**found['slope']) +
        f'of the upper half {found["slope_of_upper_half"]}, '
        f'of memory {found["slope_of_memory"]}')
  if 'ms_of_100_more' in found:
    print('100 more add {step} ms, of which assignment {assignment}, loss {loss}; '.format(
        **found['ms_of_100_more']) + f'{found["megabytes_of_100_more"]} MB')


def draw(path: pathlib.Path, result: dict) -> None:
  """Draws time above memory for each quantity, on shared logarithmic scales."""
  curves, base = result['curves'], result['base']
  with plot(1.2 + 2.9 * len(curves), 4.6) as picture:
    rows = picture.figure.subplots(2, len(curves), sharey='row', sharex='col', squeeze=False)
    for upper, lower, (name, found) in zip(*rows, curves.items(), strict=True):
      values, times = found['values'], found['step_ms']
      upper.fill_between(values, [t['fastest'] for t in times], [t['slowest'] for t in times],
                         color=TIME, alpha=0.2, linewidth=0)
      _line(upper, values, [t['median'] for t in times], TIME, found['slope']['median'])
      _line(lower, values, [b / 1e6 for b in found['bytes']], MEMORY, found['slope_of_memory'])
      for axes in (upper, lower):
        axes.axvline(base[name], color=MUTED, linewidth=0.8, linestyle=(0, (4, 3)))
      lower.set_xticks(values, [f'{v:,}' for v in values])
      lower.set_xlabel(QUANTITIES[name])
    rows[0][0].set_ylabel('ms per step')
    rows[1][0].set_ylabel("MB per step, by XLA's count")
    picture.figure.suptitle(
        f'PPN, {result["dtype"]}, on {result["device"]}; dashed: batch {base["batch"]}, '
        f'{base["boxes"]} boxes, {base["classes"]} classes, {base["side"]} px, from which one '
        'is changed at a time', x=0.008, ha='left', fontsize=11)
  save_picture(path, picture.pixels)


def _line(axes: 'Axes', x: list, y: list, colour: str, slope: float) -> None:
  from matplotlib.ticker import LogLocator, NullFormatter
  axes.plot(x, y, color=colour, marker='o', markersize=4, linewidth=1.6)
  axes.set(xscale='log', yscale='log', title=f'slope {slope:.2f}')
  axes.xaxis.set_minor_formatter(NullFormatter())
  axes.tick_params(axis='x', which='minor', bottom=False)
  axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
  axes.yaxis.set_major_formatter('{x:,.0f}')
  axes.yaxis.set_minor_formatter(NullFormatter())


if __name__ == '__main__':
  main()
