"""Tests that the input of a training can be checked for devices that are not here."""

import jax
import pytest
from tiny import tiny_config

from ppn_jax.cli.main import main
from ppn_jax.errors import InputError
from ppn_jax.jobs.train_check import check_training


def changed(**entries):
  config = tiny_config(evaluate_every=6).copy_and_resolve_references().unlock()
  config.update_from_flattened_dict({key.replace('__', '.'): v for key, v in entries.items()})
  return config.lock()


def test_devices_that_are_not_here_can_share_a_batch(tmp_path):
  assert jax.device_count() != 4
  assert check_training(changed(), tmp_path / 'run', 4) == (
      'the config fits 4 devices, 1 images each; 10 images to train on, 6 images to evaluate on')
  assert not any(tmp_path.iterdir())


@pytest.mark.parametrize('entries, devices, message', [
    ({}, 3, 'train.batch_size=4 cannot be split over 3'),
    ({'model__layers__norm_group_size': 3}, 4, 'norm_group_size=3 does not divide'),
    ({'data__train__num_images': 0}, 4, 'num_images'),
    ({'model__backbone__name': 'vgg'}, 4, 'vgg'),
    ({'train__log_every': 0}, 4, 'train.log_every=0'),
    ({}, 0, '--check=0'),
])
def test_mistakes_are_found(tmp_path, entries, devices, message):
  with pytest.raises(InputError, match=message):
    check_training(changed(**entries), tmp_path / 'run', devices)


def test_without_data_the_rest_is_checked(tmp_path):
  elsewhere = {'data__train__num_images': 0}
  assert 'not checked' in check_training(changed(**elsewhere), tmp_path, 4, with_data=False)
  with pytest.raises(InputError, match='vgg'):
    check_training(changed(**elsewhere, model__backbone__name='vgg'), tmp_path, 4, with_data=False)


def test_statistics_that_would_cross_slices_are_found_before_there_are_slices(tmp_path):
  within = changed(model__layers__norm_group_size=2)
  assert check_training(within, tmp_path / 'run', 2, slices=2).startswith(
      'the config fits 2 devices in 2 slices, 2 images each; ')
  with pytest.raises(InputError, match=r'between 2 slices in every layer.* of the 2 images'):
    check_training(changed(), tmp_path / 'run', 2, slices=2)
  with pytest.raises(InputError, match='--slices=3 must be at least 1 and divide the 4 devices'):
    check_training(within, tmp_path / 'run', 4, slices=3)


@pytest.mark.parametrize('flag', ['--without_data', '--slices=2'])
def test_flags_that_need_check(tmp_path, capsys, flag):
  assert main(['train', '--config=quickstart', f'--workdir={tmp_path}/run', flag]) == 2
  assert f'{flag} is for --check' in capsys.readouterr().err
