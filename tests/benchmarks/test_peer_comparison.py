"""Flags, ratios and comparison of results in benchmarks/peers.py, without peers."""

import json
import pathlib
import sys

import numpy as np
import pytest

BENCHMARKS = pathlib.Path(__file__).resolve().parents[2] / 'benchmarks'
sys.path.append(str(BENCHMARKS))
import peers  # noqa: E402


@pytest.mark.parametrize('flags, named', [
    (['--sides=ours,caffe'], 'caffe'), (['--sides=torch'], 'ours'), (['--batch=8,x'], '8,x'),
    (['--batch=0'], '--batch'), (['--rounds=0'], '--rounds'), (['--dtypes=float16'], 'float16'),
    (['--workloads=fly'], 'fly'), (['--device=cuda', '--sides=ours,tensorflow'], 'tensorflow')])
def test_bad_flags_are_reported_with_code_2(flags, named, capsys):
  with pytest.raises(SystemExit) as e:
    peers.parse(flags)
  assert e.value.code == 2
  assert named in capsys.readouterr().err.splitlines()[-1]


def test_a_gpu_has_no_tensorflow_and_two_dtypes():
  args = peers.parse(['--device=cuda'])
  assert args.sides == ['ours', 'torch', 'torch_compiled']
  assert args.dtypes == ['float32', 'bfloat16']


def test_ratios_are_taken_round_by_round_against_the_peer_of_the_lowest_median():
  got = peers.ratios({'ours': [10, 30, 20], 'slow': [5, 99, 99], 'fast': [20, 20, 40]})
  assert got == {'best_peer': 'fast', 'ratio_to_best_peer': {
      'median': 0.5, 'fastest': 0.5, 'slowest': 1.5}}
  assert peers.ratios({'ours': [1.0]})['ratio_to_best_peer'] is None
  got = peers.ratios({'ours': [10], 'torch': [5], 'torch_float32': [20]})
  assert got['best_peer'] == 'torch' and got['best_float32_peer'] == 'torch_float32'
  assert got['ratio_to_best_float32_peer']['median'] == 0.5


def test_achieved_divides_by_the_median_time():
  description = {'program': {'flops': 3e12, 'bytes': -1}}
  assert peers.achieved(description, [1500, 9000, 1000]) == {'tflop_per_s': 2.0}


def _detections(labels):
  boxes = np.linspace(0, 1, 16, dtype=np.float32).reshape(1, 4, 4)
  return {'boxes': boxes, 'scores': np.array([[.9, .8, .7, .6]], np.float32),
          'labels': np.array([labels]), 'valid': np.ones((1, 4), bool)}


def test_a_side_that_computes_something_else_is_not_timed(tmp_path):
  np.savez(tmp_path / 'ours.npz', **_detections([1, 2, 3, 4]))
  np.savez(tmp_path / 'torch.npz', **_detections([1, 2, 3, 4]))
  task = {'kind': 'detect', 'dtype': 'float32'}
  assert peers.compare(tmp_path, 'torch', task) == dict.fromkeys(
      ('scores', 'scores_mean', 'boxes', 'unmatched'), 0)
  np.savez(tmp_path / 'torch.npz', **_detections([1, 2, 3, 7]))
  with pytest.raises(peers.SideFailed, match='not timed: unmatched'):
    peers.compare(tmp_path, 'torch', task)
  for bad in (np.nan, 1.0):
    np.savez(tmp_path / 'ours.npz', box_codes=np.zeros(3))
    np.savez(tmp_path / 'torch.npz', box_codes=np.array([0, 0, bad]))
    with pytest.raises(peers.SideFailed, match='outputs'):
      peers.compare(tmp_path, 'torch', {'kind': 'network', 'dtype': 'float32'})


def test_an_update_is_compared_with_its_size():
  before = {'params/head/box_kernel': np.zeros(4), 'params/head/class_kernel': np.ones(4),
            'batch_stats/norm/mean': np.zeros(2)}
  moved = {'params/head/box_kernel': np.ones(4), 'params/head/class_kernel': np.full(4, 2.0),
           'batch_stats/norm/mean': np.array([1.0, 2.0]), 'loss': np.float32(2)}
  other = {**moved, 'params/head/box_kernel': np.full(4, 1.5), 'loss': np.float32(3)}
  found = peers.step_differences(moved, other, before)
  assert found['loss'] == 0.5 and found['head_update'] == 0.5 and found['averages'] == 0
  assert found['update'] == pytest.approx(0.5 / np.sqrt(2))


def test_last_line_of_a_side_that_dies_is_reported(tmp_path):
  task = json.dumps({'kind': 'train'})  # The folder is missing.
  side = peers.Side('torch', sys.executable, {'device': 'cpu', 'not': task}, tmp_path / 'log')
  with pytest.raises(peers.SideFailed, match=r'ended with 1: \w+Error'):
    side.ask('prepare x')
  side.end()
