"""`ppn summary`."""

import argparse
import json

from ppn_jax.cli.flags import CONFIG_HELP, add_allow_flag, open_model

HELP = f"""Count a model's parameters and FLOPs, by layer and in total.

Nothing is trained, compiled or downloaded. The classes are those of the training data;
without data, give --config.model.num_classes=N.
{CONFIG_HELP}"""

TAKES_CONFIG = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
  model = parser.add_mutually_exclusive_group(required=True)
  model.add_argument('--config', metavar='FILE',
                     help='a config, such as ppn_mobilenet_v1_coco')
  model.add_argument('--workdir', metavar='DIR', help='folder of a run, instead of a config')
  model.add_argument('--model', metavar='FILE', help='weights file, instead of a config')
  add_allow_flag(parser)
  parser.add_argument('--json', action='store_true', help='print one JSON object')


def run(args: argparse.Namespace) -> int:
  ending = goodput = None
  if args.config is not None:
    from ppn_jax.config_files import load_config
    config = load_config(args.config, args.overrides)
  else:
    from ppn_jax.run import Run
    opened = open_model(args)
    config = opened.config
    if isinstance(opened, Run):
      from ppn_jax.telemetry.goodput import read, summarize
      ending, goodput = opened.ending(), summarize(read(opened.workdir))
  from ppn_jax.jobs.summary import fill_in_classes, format_summary, paper_counts
  from ppn_jax.jobs.summary import summarize as summarize_model
  summary = summarize_model(fill_in_classes(config))
  if args.json:
    print(json.dumps({**summary._asdict(),
                      'layers': [layer._asdict() for layer in summary.layers],
                      'totals': summary.totals._asdict(),
                      'by_columns': {n: t._asdict() for n, t in summary.by_columns.items()},
                      **({'ended': ending._asdict()} if ending else {}),
                      **({'goodput': {**goodput._asdict(), 'share': goodput.share}}
                         if goodput else {}),
                      'paper': [r._asdict() for r in paper_counts(summary)]}, indent=1))
  else:
    print(format_summary(summary))
    if ending:
      print(f'\nTraining ended at step {ending.step:,}: {ending.reason}.')
    if goodput:
      print(f'\n{goodput.describe()}')
  return 0
