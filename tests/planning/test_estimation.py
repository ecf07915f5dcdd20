"""Planning for TPU slices; tests that compile need libtpu and are skipped without it."""

import importlib.util
import json
import pathlib
import subprocess
import sys

import jax
import pytest
from tiny import CONFIG_FILE, tiny_config

from ppn_jax.cli.main import main
from ppn_jax.config_files import load_config
from ppn_jax.device_data.exchange import choose_grid
from ppn_jax.distributed.sharding import data_mesh
from ppn_jax.errors import InputError
from ppn_jax.planning import estimation
from ppn_jax.planning import report as planning_report
from ppn_jax.planning import search as planning_search

TESTS = pathlib.Path(__file__).resolve().parents[1]

compiles = pytest.mark.skipif(importlib.util.find_spec('libtpu') is None,
                              reason="needs the TPU compiler: pip install -e '.[tpu]'")


def request(topology='v5e:2x2', batch_per_chip=4, program='train', **model):
  config = tiny_config().copy_and_resolve_references()
  with config.unlocked():
    config.model.update(num_classes=3, **model)
  return estimation.Request(config.to_dict(), topology, batch_per_chip, program)


@pytest.mark.parametrize('name', ['v5e', 'v5e:', 'v5e:4', 'v5e:2x2x2x2', 'v9z:2x2', 'v5e:2x', '',
                                  'v5litepod-8', 'v5e:2x4 '])
def test_malformed_topologies_are_reported_in_one_line(name):
  with pytest.raises(InputError, match='such as v5e:2x4') as caught:
    estimation.parse_topology(name)
  assert '\n' not in str(caught.value)


def test_peaks_and_clocks_of_the_table_agree():
  """Peak = clock x matrix units x side^2 x 2."""
  units = {'v4': (8, 128), 'v5e': (4, 128), 'v5p': (8, 128), 'v6e': (4, 256)}
  assert estimation.CHIPS.keys() == units.keys()
  for name, (count, side) in units.items():
    chip = estimation.CHIPS[name]
    assert chip.clock * count * side**2 * 2 == pytest.approx(chip.peak, rel=0.005), name


@pytest.mark.parametrize('message, needed_bytes', [
    ('RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries '
     '(19.57G) exceeds available HBM (15.75G).', 19.57 * 2**30),
    ('RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 16.20G of 15.75G hbm. '
     'Exceeded hbm capacity by 465.00M.', 16.20 * 2**30),
    ('Used 900.5M of 800.0M hbm', 900.5 * 2**20),
    ('INTERNAL: something else', None)])
def test_needed_memory_is_read_from_the_out_of_memory_message(message, needed_bytes):
  found = estimation._needed_hbm(message)
  assert found == (None if needed_bytes is None else int(needed_bytes))


@pytest.mark.slow
@pytest.mark.parametrize('program', ['train', 'detect'])
def test_both_programs_lower_for_any_mesh(program):
  lowered = estimation._lower(request(program=program), data_mesh(jax.devices()[:1]), chips=1)
  images = '4x64x64x3xui8'
  assert images in lowered.as_text()


@pytest.mark.parametrize('block, key', [('layers', 'norm_group_size'), ('loss', 'group_size')])
def test_groups_have_to_divide_the_batch_of_all_chips(block, key):
  asked = request()
  (asked.config['loss'] if block == 'loss' else asked.config['model'][block])[key] = 32
  with pytest.raises(InputError, match=f'{key}=32 does not divide the 4 images'):
    estimation._lower(asked, data_mesh(jax.devices()[:1]), chips=1)


def test_text_says_what_does_not_fit():
  e = estimation.Estimate('v5e:2x2', 'train', 4, 1, 1, 4096, fits=False, hbm=16 * 2**30,
                        peak_hbm=20 * 2**30)
  text = planning_report.format_estimate(e)
  assert 'does not fit: 20.00 GiB of HBM needed, the chip has 16' in text
  assert 'images/s' not in text


def test_text_gives_rates_hours_and_input():
  e = estimation.Estimate(
      'v5e:4x4', 'train', 16, 2, 1, 128, fits=True, hbm=16 * 2**30, peak_hbm=3 * 2**30,
      clock=1.5e9, bandwidth=819e9, images_per_second_by_cycles=2000.0,
      images_per_second_by_bytes=4000.0, collectives={'all-reduce': (49, 10_500_000)})
  e = e._replace(hbm_bytes=26_000_000_000, flops=1e12)
  text = planning_report.format_estimate(e, images=16 * 2000 * 3600 * 2)
  assert '2,000 images/s a chip by cycles (1.5 GHz), 4,000 by the roofline, which is memory' in text
  assert '32.0 to 64.0 ms a step; 32,000 to 64,000 images/s in all, 16,000 to 32,000 for' in text
  assert '49 all-reduce, 10.50 MB' in text
  assert 'takes 1.0 hours to 2.0 hours' in text
  assert 'takes 45.0 minutes to 1.5 hours' in planning_report.format_estimate(
      e, images=16 * 2000 * 60 * 90)
  assert 'takes 0.6 seconds to 1.2 seconds' in planning_report.format_estimate(e, images=38_400)
  assert 'largest' not in text
  text = planning_report.format_estimate(e._replace(largest_batch=640, hbm_bytes=1))
  assert 'which is arithmetic' in text and 'largest batch that was found to fit: 640' in text
  assert 'the configured run' not in text


def test_text_says_what_crosses_slices():
  e = estimation.Estimate(
      'v5e:4x4', 'train', 32, 8, 1, 32, fits=True, hbm=16 * 2**30, peak_hbm=2**30, clock=1.5e9,
      bandwidth=819e9, images_per_second_by_cycles=2000.0, images_per_second_by_bytes=4000.0,
      collectives={}, slices=2, across_slices=(3, 1_250_000))
  text = planning_report.format_estimate(e)
  assert text.startswith('2 slices of v5e:4x4: 32 chips on 8 hosts, ')
  assert 'to other slices: 3 transfers, 1.25 MB a device and step' in text
  assert 'slices' not in planning_report.format_estimate(e._replace(slices=1))


def test_json_has_what_the_text_has():
  e = estimation.Estimate(
      'v4:2x2x1', 'train', 4, 1, 2, 128, fits=True, hbm=32 * 2**30, peak_hbm=3 * 2**30,
      clock=1e9, bandwidth=1e12, flops=1.0, hbm_bytes=10, images_per_second_by_cycles=1000.0,
      images_per_second_by_bytes=500.0)
  found = json.loads(json.dumps(planning_report.as_json(e, images=3600 * 2000)))
  assert found['step_seconds'] == [0.256, 0.128] and found['roofline'] == 'memory'
  assert found['images_per_second'] == found['host_images_per_second'] == [2000.0, 4000.0]
  assert found['hours'] == [1.0, 0.5] and found['topology'] == 'v4:2x2x1'
  assert 'hours' not in planning_report.as_json(e._replace(fits=False))


@pytest.mark.parametrize('limit, per_image, start', [
    (700, 21e6, 128), (700, 21e6, 4096), (8, 1e9, 64), (7, 2e9, 64), (130, 1e6, 128)])
def test_search_for_the_largest_batch_ends_within_a_sixteenth(monkeypatch, limit, per_image, start):
  """Memory grows as on a TPU: linearly, then not at all near the limit, where XLA recomputes."""
  hbm, asked = 16 * 2**30, []

  def plan(request):
    batch = request.batch_per_chip
    asked.append(batch)
    fits = batch <= limit
    needed = min(batch * per_image, 0.98 * hbm) if fits else max(batch * per_image, 1.01 * hbm)
    return estimation.Estimate('v5e:1x1', 'train', 1, 1, 1, batch, fits=fits, hbm=hbm,
                             peak_hbm=int(needed))

  monkeypatch.setattr(estimation, 'plan', plan)
  first = request('v5e:1x1', start)
  found = planning_search.largest_batch(first, plan(first))
  assert len(asked) <= 1 + planning_search.MAX_TRIALS and len(asked) == len(set(asked))
  assert found == max((b for b in asked if b <= limit), default=0)
  assert found % 8 == 0 and found >= min(limit, 0.98 * hbm / per_image) * 0.85 - 8


def test_the_search_tries_batches_that_the_config_allows(monkeypatch):
  asked = []

  def plan(request):
    asked.append(request.batch_per_chip)
    return estimation.Estimate('v5e:1x2', 'train', 2, 1, 1, request.batch_per_chip, hbm=1000,
                             fits=request.batch_per_chip <= 150,
                             peak_hbm=6 * request.batch_per_chip)

  monkeypatch.setattr(estimation, 'plan', plan)
  first = request('v5e:1x2', 48)
  first.config['optim']['micro_batches'], first.config['loss']['group_size'] = 3, 16
  assert planning_search.largest_batch(first, plan(first)) == 144
  assert len(asked) > 1 and all(2 * batch % (3 * 16) == 0 for batch in asked)


def test_without_libtpu_the_extra_is_named(monkeypatch):
  monkeypatch.setattr(estimation.importlib.util, 'find_spec', lambda name: None)
  with pytest.raises(InputError, match=r"pip install .*\[tpu\]"):
    estimation.plan(request())


def test_a_process_that_aborts_is_survived(monkeypatch):
  monkeypatch.setattr(estimation.importlib.util, 'find_spec', lambda name: True)
  ran = subprocess.run

  def abort(command, **options):
    return ran([sys.executable, '-c', 'import os; os.abort()'], **options)

  monkeypatch.setattr(estimation.subprocess, 'run', abort)
  with pytest.raises(InputError, match='v5e:2x2: the compiler ended with SIGABRT'):
    estimation.plan(request())


def test_the_command_continues_after_a_topology_that_fails(monkeypatch, capsys, tmp_path):
  config = tmp_path / 'config.py'
  config.write_text(CONFIG_FILE.format(folder=str(TESTS)))

  def plan(asked):
    if asked.topology == 'v5e:32x32':
      raise InputError('v5e:32x32: the compiler ended with SIGABRT')
    return estimation.Estimate(asked.topology, asked.program, 4, 1, 1, asked.batch_per_chip,
                             fits=asked.topology != 'v5e:2x2', hbm=1, peak_hbm=2, collectives={})

  monkeypatch.setattr(estimation, 'plan', plan)
  flags = ['plan', f'--config={config}', '--batch_per_chip=2', '--json']
  assert main([*flags, '--topology=v5e:32x32', '--topology=v5e:4x4']) == 2
  out, err = capsys.readouterr()
  assert [e['topology'] for e in json.loads(out)] == ['v5e:4x4']
  assert err == 'ppn: error: v5e:32x32: the compiler ended with SIGABRT\n'
  assert main([*flags, '--topology=v5e:2x2']) == 1
  assert main([*flags, '--topology=v5e:4x4']) == 0


def test_a_batch_that_cannot_be_split_asks_for_a_size(capsys, tmp_path):
  config = tmp_path / 'config.py'
  config.write_text(CONFIG_FILE.format(folder=str(TESTS)))
  assert main(['plan', f'--config={config}', '--topology=v5e:4x4']) == 2
  assert 'train.batch_size=4 cannot be split over the 16 chips' in capsys.readouterr().err
  slices = ['plan', f'--config={config}', '--topology=v5e:2x2']
  assert main([*slices, '--slices=2']) == 2
  assert 'over the 8 chips of 2 slices of v5e:2x2' in capsys.readouterr().err
  assert main([*slices, '--resident_images=9', '--detect']) == 2
  assert '--resident_images is for the training step' in capsys.readouterr().err
  assert main([*slices, '--slices=0']) == 2
  assert '--slices=0 must be at least 1' in capsys.readouterr().err


@compiles
def test_compiles_the_training_step_for_a_slice():
  e = estimation.plan(request())
  assert e.fits and (e.chips, e.hosts, e.devices_per_chip) == (4, 1, 1)
  assert 0 < e.peak_hbm < e.hbm
  assert e.cycles > 0 and e.flops > 0 and e.bytes_accessed > 0
  assert e.images_per_second_by_cycles == pytest.approx(4 * e.clock / e.cycles)
  count, size = e.collectives['all-reduce']
  parameters = 4 * sum(x.size for x in jax.tree.leaves(_parameters(request())))
  assert count > 0 and size >= parameters / 2  # Gradients may be exchanged in bfloat16.


@compiles
@pytest.mark.slow
def test_resident_data_exchange_few_rows():
  asked = request()
  host = estimation.plan(asked)
  asked.config['data']['transforms'] = ({'name': 'horizontal_flip'},)
  e = estimation.plan(asked._replace(resident_images=1000))
  count, size = e.collectives['all-to-all']
  image = -(-3 * asked.config['model']['image_size']**2 // 4096) * 4096
  rows = choose_grid(asked.batch_per_chip, e.chips).exchanged
  assert count == 2 and rows * image <= size < 1.3 * rows * image
  assert e.collectives['all-reduce'] == host.collectives['all-reduce']


@compiles
@pytest.mark.slow
def test_slices_exchange_gradients_and_nothing_else():
  asked = request()._replace(slices=2)
  with pytest.raises(InputError, match='would be exchanged between 2 slices in every layer'):
    estimation.plan(asked)
  asked.config['model']['layers']['norm_group_size'] = asked.config['loss']['group_size'] = 4
  e = estimation.plan(asked)
  assert e.fits and (e.chips, e.slices) == (8, 2)
  count, size = e.across_slices
  parameters = sum(x.size for x in jax.tree.leaves(_parameters(asked)))
  # Each of the four chips sends its quarter. Arrays as small as these are mostly padding.
  assert count > 0 and 2 * parameters / 4 <= size <= 32 * parameters


@compiles
@pytest.mark.slow
def test_chips_of_a_pod_exchange_only_gradients_with_groups_of_their_own_images():
  config = load_config('ppn_mobilenet_v1_coco:groups=32', []).copy_and_resolve_references()
  with config.unlocked():
    config.model.num_classes = 90
  e = estimation.plan(estimation.Request(config.to_dict(), 'v5e:16x16', 32, 'train'))
  assert e.chips == 256 and set(e.collectives) == {'all-reduce'}
  assert e.collectives['all-reduce'][0] < 10


def _parameters(asked):
  detector = estimation.build_detector(estimation.ConfigDict(asked.config))
  return jax.eval_shape(detector.init, jax.random.key(0))['params']


@compiles
@pytest.mark.parametrize('topology, message', [
    ('v5e:3x3', 'not a topology that the compiler knows'), ('v5e:32x32', 'ended with SIGABRT')])
def test_topologies_that_the_compiler_cannot_take(topology, message):
  with pytest.raises(InputError, match=message):
    estimation.plan(request(topology))
