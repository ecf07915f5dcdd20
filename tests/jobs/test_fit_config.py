"""Tests the configs that `ppn import-tf` makes for detectors in TFLite files."""

import jax
import pytest

pytest.importorskip('tflite')
from tflite_writer import TFLiteWriter, write_ssd

from ppn_jax.config_files import load_config
from ppn_jax.detection.structures import Category
from ppn_jax.errors import InputError
from ppn_jax.jobs.import_tf import config_of, fit_config, import_run
from ppn_jax.run import build_detector, create_run, resolve_classes
from ppn_jax.weights import importer
from ppn_jax.weights.postprocessing import compare
from ppn_jax.weights.read import read_weights


def fitted(path, *given, **options):
  """Returns a written detector, the config for it, and the line on what was changed."""
  write_ssd(path / 'x.tflite', **options)
  file = read_weights(path / 'x.tflite')
  return file, *fit_config(load_config(config_of(file)), file, given)


def detector_of(path, config, classes):
  """Builds the detector, with its losses, of a run with this config."""
  categories = [Category(i + 1, f'{i}') for i in range(classes)]
  return create_run(path / 'run', config, categories).detector()


@pytest.mark.parametrize('options, line, anchors', [
    # 19 x 19 cells with 3 anchors each, and 10 x 10, 5 x 5, ... with 6.
    ({}, '', 1917),
    ({'counts': (6, 6)}, 'model.anchors.reduce_lowest_level=False', 3000),
    ({'activation': 'SOFTMAX'},
     'model.score_activation=softmax loss.name=hard_negative_mining', 1917),
    ({'background': False}, 'model.background_column=False', 1917),
    ({'size': 320, 'classes': 1}, 'model.image_size=320', 2034),
    # 12 x 12, 6 x 6, 3 x 3, 2 x 2, 1 x 1 and 1 x 1 again.
    ({'size': 192, 'weights': 'INT8'}, 'model.image_size=192 model.neck.repeat_1x1=True', 738)])
def test_settings_of_a_detector(tmp_path, options, line, anchors):
  file, config, changed = fitted(tmp_path, **options)
  assert changed == ('set from the file: model.backbone.depth_multiplier=0.25 '
                     f'model.neck.depths=128,64,64,32 {line}').strip()
  detector = detector_of(tmp_path, config, options.get('classes', 5))
  imported = importer.import_detector(file, jax.eval_shape(detector.init, jax.random.key(0)))
  assert imported.report.matched == 199 and not imported.report.unused
  assert len(detector.anchors.boxes) == len(file.postprocessing.anchors) == anchors
  assert f'of {anchors:,}, most by' in compare(file.postprocessing, detector.anchors, {})[0]


def test_another_network_is_named_whatever_the_config(tmp_path):
  writer = TFLiteWriter('FLOAT32')
  image = writer.image(32)
  x = writer.layer('a', image, 8, side=3, stride=2, name='mobilenetv2_1.00_32/Conv1')
  writer.write(tmp_path / 'x.tflite', [image], [x])
  file = read_weights(tmp_path / 'x.tflite')
  for make in (config_of, lambda f: import_run(f, load_config('quickstart'), tmp_path / 'run')):
    with pytest.raises(InputError, match=r'MobileNet-v2 .network., not MobileNet-v1; supported: a'):
      make(file)


def test_what_is_given_is_kept(tmp_path):
  _, config, changed = fitted(tmp_path, 'model.neck', 'loss.name', 'model.image_size',
                              activation='SOFTMAX', size=192)
  assert config.model.neck.depths == (512, 256, 256, 128) and config.model.image_size == 300
  assert config.loss.name == 'focal' and 'loss' not in changed and 'repeat_1x1' not in changed


def test_options_that_a_config_leaves_out(tmp_path):
  write_ssd(tmp_path / 'x.tflite', min_depth=16)
  file = read_weights(tmp_path / 'x.tflite')
  config = load_config(config_of(file)).copy_and_resolve_references().unlock()
  config.model.backbone = dict(name='mobilenet_v1', last_block=13)
  config, changed = fit_config(config, file)
  assert 'model.backbone.depth_multiplier=0.25 model.backbone.min_depth=16' in changed
  assert config.model.backbone.to_dict() == {'name': 'mobilenet_v1', 'last_block': 13,
                                             'depth_multiplier': 0.25, 'min_depth': 16}


def test_another_number_of_anchors_is_named(tmp_path):
  file, config, _ = fitted(tmp_path, counts=(3, 5))
  like = jax.eval_shape(detector_of(tmp_path, config, 5).init, jax.random.key(0))
  with pytest.raises(InputError, match=r'for 5 and 6 anchors per cell; there is one for each of '
                                       r'model\.anchors\.aspect_ratios, and one more'):
    importer.import_detector(file, like)


@pytest.mark.slow
def test_a_detector_without_background_is_imported(tmp_path):
  file, config, _ = fitted(tmp_path, background=False, classes=3,
                           labels={'labels.txt': 'cat\ncow\ndog\n'})
  run = import_run(file, config, tmp_path / 'run').run
  assert [c.name for c in run.categories] == ['cat', 'cow', 'dog']


@pytest.mark.parametrize('image, text', [((1, 240, 320, 3), '240x320 px'),
                                         ((1, -1, -1, 3), 'any image size')])
def test_images_of_other_shapes_need_a_size(tmp_path, image, text):
  message = rf'multiplier 0.25, {text}, uint8, but .*choose it with --config.model.image_size=N'
  with pytest.raises(InputError, match=message):
    fitted(tmp_path, image=image)
  assert fitted(tmp_path, 'model.image_size', image=image)[1].model.image_size == 300


def test_a_batch_of_images_is_of_their_size(tmp_path):
  assert fitted(tmp_path, image=(4, 320, 320, 3))[1].model.image_size == 320


def test_levels_of_a_pyramid_at_a_small_size(shared):
  file = read_weights(shared / 'golden/ckpt_ppn_s1')
  for size, repeats in ((160, True), (256, True), (257, False)):
    config = load_config(config_of(file)).copy_and_resolve_references().unlock()
    config.model.image_size = size
    config, line = fit_config(config, file, ('model.image_size',))
    assert ('model.neck.repeat_1x1=True' in line) is repeats, line
    assert build_detector(resolve_classes(config, [
        Category(i + 1, f'{i}') for i in range(3)])).num_levels == 6
