"""Tests parameters and FLOPs against published and profiled numbers and counts by hand."""

import itertools
import json
import pathlib

import flax
import pytest
from tiny import tiny_config

from ppn_jax.cli.main import main
from ppn_jax.config import hard_negative_mining
from ppn_jax.config_files import load_config
from ppn_jax.detection.structures import Category
from ppn_jax.jobs.summary import (
  AFTER,
  BEFORE,
  PAPER,
  PAPER_CONVENTIONS,
  Totals,
  format_summary,
  paper_counts,
  summarize,
)
from ppn_jax.run import Ending, create_run

CONFIGS = pathlib.Path(__file__).resolve().parents[2] / 'configs'
MODELS = ('ppn', 'ssd', 'fpn')


def config_of(model, *overrides):
  return load_config(str(CONFIGS / f'{model}_mobilenet_v1_coco.py'),
                     [f'--config.model.{o}' for o in ('num_classes=90', *overrides)])


class Summaries(dict):
  """Summaries by model, each computed on first access."""

  def __missing__(self, model):
    self[model] = summarize(config_of(model))
    return self[model]


@pytest.fixture(scope='module')
def summaries():
  return Summaries()


def tiny(**model):
  config = tiny_config().copy_and_resolve_references()
  config.model.num_classes = 3
  config.model.update(model)
  return config


# From TensorFlow's profiler and the variables of the reference (docs/reference.md 14).
COUNTS = [
    ('ppn', 91, 'trainable', 2_173_818), ('ssd', 91, 'trainable', 6_819_839),
    ('ppn', 91, 'variables', 2_194_682), ('ssd', 91, 'variables', 6_845_183),
    ('ppn', 91, 'variables_without_scale', 2_184_250),
    ('ssd', 91, 'variables_without_scale', 6_832_511),
    ('ppn', 92, 'trainable', 2_176_896), ('ssd', 92, 'trainable', 6_834_464),
    ('ppn', 91, 'network_flops', 2_347_628_744), ('ssd', 91, 'network_flops', 2_474_440_931),
    ('ppn', 92, 'network_flops', 2_350_703_744), ('ssd', 92, 'network_flops', 2_476_975_712),
    ('ppn', 91, 'multiply_adds', 1_173_529_536), ('ssd', 91, 'multiply_adds', 1_237_129_408)]


@pytest.mark.parametrize('model, columns, field, value', [
    pytest.param(*case, marks=() if case[:2] == ('ppn', 91) else pytest.mark.slow)
    for case in COUNTS])
def test_counts_of_the_reference(summaries, model, columns, field, value):
  assert getattr(summaries[model].by_columns[columns], field) == value


@pytest.mark.slow
@pytest.mark.parametrize('model, flops', [('ppn', 2_348_565_283), ('ssd', 2_475_244_249)])
def test_image_to_detections_is_close_to_the_profiler(summaries, model, flops):
  ours = summaries[model].by_columns[91].detection_flops
  assert ours == pytest.approx(flops, rel=1e-4)
  assert f'{ours / 1e9:.2f}' == f'{flops / 1e9:.2f}'


def test_exactly_these_conventions_give_the_table_of_the_paper(summaries):
  def fits(beyond, parameters, flops):
    return all((f'{getattr(totals, parameters) / 1e6:.2f}M', f'{getattr(totals, flops) / 1e9:.2f}B')
               == PAPER[row] for row, totals in (
                   ('PPN', summaries['ppn'].by_columns[90 + beyond]),
                   ('SSD', summaries['ssd'].by_columns[90 + beyond])))
  every = itertools.product(
      range(3), [f for f in Totals._fields if f.startswith(('trainable', 'variables'))],
      [f for f in Totals._fields if f.endswith('flops')])
  assert {reading for reading in every if fits(*reading)} == set(PAPER_CONVENTIONS)


def test_rows_of_the_paper(summaries):
  assert [r.row for r in paper_counts(summaries['ppn'])] == ['PPN'] * 3
  assert [r.row for r in paper_counts(summaries['ssd'])] == ['SSD'] * 3


@pytest.mark.slow
def test_a_model_that_is_not_in_the_paper(summaries):
  assert [r.row for r in paper_counts(summaries['fpn'])] == [None] * 3
  assert 'not known' in format_summary(summaries['fpn'])


@pytest.mark.slow
def test_background_column_is_one_of_the_columns(summaries):
  background = summarize(config_of('ppn', 'background_column=True'))
  assert background.num_classes == 90 and background.columns == 91
  assert list(background.by_columns) == [90, 91, 92]
  assert background.totals == background.by_columns[91]
  without = summaries['ppn'].by_columns[91]
  assert background.totals._replace(detection_flops=0) == without._replace(detection_flops=0)
  # The background of an anchor is not compared with the score threshold.
  assert without.detection_flops - background.totals.detection_flops == 3000


@pytest.mark.slow
def test_blocks_that_no_output_depends_on(summaries):
  whole = summarize(config_of('ppn', 'backbone.last_block=13', 'background_column=True'))
  assert whole.totals.trainable + whole.totals.unused == 3_767_674  # docs/reference.md 14.
  assert whole.by_columns[90] == summaries['ppn'].totals._replace(
      unused=whole.totals.unused, detection_flops=whole.by_columns[90].detection_flops)
  assert f'{whole.totals.unused:,} further trainable' in format_summary(whole)


@pytest.mark.parametrize('model', [
    pytest.param(m, marks=pytest.mark.slow if m == 'fpn' else ()) for m in MODELS])
def test_layers_sum_to_totals(summaries, model):
  summary = summaries[model]
  layers = {layer.name: layer for layer in summary.layers}
  assert summary.layers[0].name == BEFORE and summary.layers[-1].name == AFTER
  assert len(layers) == len(summary.layers)
  assert sum(layer.parameters for layer in summary.layers) == summary.totals.trainable
  assert (sum(layer.parameters + layer.statistics for layer in summary.layers)
          == summary.totals.variables)
  assert sum(layer.multiply_adds for layer in summary.layers) == summary.totals.multiply_adds
  assert sum(layer.flops for layer in summary.layers) == summary.totals.detection_flops
  assert layers[BEFORE].flops == 2 * 300 * 300 * 3
  assert (summary.totals.detection_flops - summary.totals.network_flops
          == layers[BEFORE].flops + layers[AFTER].flops)


def test_a_network_counted_by_hand():
  config = tiny(image_size=32)
  config.model.backbone = dict(name='mobilenet_v1', depth_multiplier=0.25, last_block=1)
  config.model.neck = dict(name='pooling_pyramid', stride=2, num_levels=2, projection=0)
  config.model.head.depth = 4
  config.model.anchors.aspect_ratios = (1.0,)  # Two anchors a cell, with SSD's extra one.
  summary = summarize(config)
  pixels, cells = 16 * 16, 16 * 16 + 8 * 8
  rows = {name: (parameters, statistics, macs, flops) for
          name, parameters, statistics, macs, flops, _ in summary.layers}
  assert rows.pop(AFTER)[:3] == (0, 0, 0)
  assert rows == {
      BEFORE: (0, 0, 0, 2 * 32 * 32 * 3),
      'backbone/conv2d_0': (27 * 8 + 16, 16, pixels * 8 * 27, 2 * pixels * 8 * 27),
      'backbone/conv2d_1/depthwise': (9 * 8 + 16, 16, pixels * 8 * 9, 2 * pixels * 8 * 9),
      'backbone/conv2d_1/pointwise': (8 * 16 + 32, 32, pixels * 8 * 16, 2 * pixels * 8 * 16),
      'neck': (0, 0, 0, 8 * 8 * 16 * 4),
      'head': (0, 0, 0, 0),  # The tower's ReLU6.
      'head/tower': (16 * 4, 0, cells * 16 * 4, 2 * cells * 16 * 4),
      'head/norm_0': (8, 8, 0, 0), 'head/norm_1': (8, 8, 0, 0),
      'head/box': (4 * 8 + 8, 0, cells * 4 * 8, 2 * cells * 4 * 8 + cells * 8),
      'head/class': (4 * 6 + 6, 0, cells * 4 * 6, 2 * cells * 4 * 6 + cells * 6)}
  other = {layer.name: layer.other_ops for layer in summary.layers}
  assert other['head'] == cells * 4
  # Per output a product, a sum and ReLU6; per channel scale * rsqrt(var + eps), bias - mean * it.
  assert other['backbone/conv2d_0'] == 3 * pixels * 8 + (1 + 2 + 1 + 1 + 1) * 8


@pytest.mark.slow
def test_only_the_model_counts():
  """Counts do not depend on the form of convolutions, the dtype or Flax's naming of scopes."""
  config = tiny()
  config.model.layers.conv_form = 'native'
  native = summarize(config)
  config.model.layers.conv_form = 'shifted'
  before = config.to_json()
  assert summarize(config) == native
  assert config.to_json() == before
  config.model.layers.update(conv_form='auto', dtype='bfloat16')
  with flax.config.temp_flip_flag('profile', False):
    assert summarize(config) == native


def test_a_softmax_keeps_its_background():
  config = tiny(num_classes=1)
  hard_negative_mining(config)
  summary = summarize(config)
  assert list(summary.by_columns) == [2, 3] and summary.columns == 2


@pytest.mark.slow
def test_command(capsys):
  config = f'--config={CONFIGS}/ppn_mobilenet_v1_coco.py'
  assert main(['summary', config, '--config.model.num_classes=90']) == 0
  text = capsys.readouterr().out
  assert '2,176,896' in text and '2,350,703,744' in text and 'as PPN there' in text
  assert main(['summary', config, '--config.model.num_classes=90', '--json']) == 0
  printed = json.loads(capsys.readouterr().out)
  assert printed['by_columns']['92']['trainable'] == 2_176_896
  assert printed['layers'][1]['name'] == 'backbone/conv2d_0'
  assert {r['row'] for r in printed['paper']} == {'PPN'}


@pytest.mark.slow
def test_command_takes_classes_from_the_data_and_models_from_runs(tmp_path, capsys):
  assert main(['summary', f'--config={CONFIGS}/quickstart.py', '--json']) == 0
  quickstart = json.loads(capsys.readouterr().out)
  assert quickstart['num_classes'] == 5 and quickstart['paper'] == []
  create_run(tmp_path, tiny_config(), (Category(3, 'cat'), Category(7, 'dog'))).save()
  assert main(['summary', f'--workdir={tmp_path}']) == 0
  assert capsys.readouterr().out.startswith('64 px, 2 classes in 2 columns')


@pytest.mark.slow
def test_command_tells_that_a_run_ended_early(tmp_path, capsys):
  run = create_run(tmp_path, tiny_config(), (Category(3, 'cat'), Category(7, 'dog')))
  run.save()
  run.note_ending(Ending(1200, 'AP has not improved for 3 evaluations'))
  assert main(['summary', f'--workdir={tmp_path}']) == 0
  assert capsys.readouterr().out.endswith(
      '\nTraining ended at step 1,200: AP has not improved for 3 evaluations.\n')
  assert main(['summary', f'--workdir={tmp_path}', '--json']) == 0
  assert json.loads(capsys.readouterr().out)['ended']['step'] == 1200


@pytest.mark.parametrize('arguments, message', [
    ([f'--config={CONFIGS}/ppn_mobilenet_v1_coco.py'], 'give --config.model.num_classes=N'),
    ([f'--config={CONFIGS}/quickstart.py', '--config.model.num_classes=-1'], 'must be positive'),
    ([f'--config={CONFIGS}/quickstart.py', '--config.model.num_class=1'], "mean 'num_classes'"),
    (['--config=nowhere.py'], "no file 'nowhere.py'"),
    (['--workdir=nowhere'], 'is not a run'),
    ([], 'one of the arguments --config --workdir --model is required'),
    (['--config=a.py', '--workdir=b'], 'not allowed with')])
def test_command_refuses_in_one_line(arguments, message, capsys):
  assert main(['summary', *arguments]) == 2
  error = capsys.readouterr().err
  assert message in error and error.count('\n') == 1
