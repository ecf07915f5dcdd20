"""`ppn_jax.load`: its inputs and outputs, and agreement with evaluation."""

import io
import subprocess
import sys
import zipfile

import jax
import numpy as np
import pytest
from PIL import Image
from tiny import tiny_config, untrained_run

import ppn_jax
from ppn_jax import zoo
from ppn_jax.cli.main import main
from ppn_jax.data.transforms.basic import Resize
from ppn_jax.detection.structures import Category, Detections, unlabelled_example
from ppn_jax.distributed import sharding
from ppn_jax.errors import InputError
from ppn_jax.models import convolution
from ppn_jax.run import create_run, load_variables, open_run


@pytest.fixture(scope='module')
def run(tmp_path_factory):
  return untrained_run(tmp_path_factory.mktemp('run'), steps=(3, 6), ema_decay=0.9)


@pytest.fixture(scope='module')
def detector(run):
  return ppn_jax.load(run, batch_size=3)


def pictures(*sizes, seed=0):
  rng = np.random.default_rng(seed)
  return [rng.integers(0, 256, (*size, 3), dtype=np.uint8) for size in sizes]


def assert_same(a, b):
  assert a.names == b.names
  for x, y in zip((a.boxes, a.scores, a.labels, a.level), (b.boxes, b.scores, b.labels, b.level),
                  strict=True):
    np.testing.assert_array_equal(x, y)


def test_import_is_light():
  code = ('import sys, ppn_jax\nassert ppn_jax.__all__ and "load" in dir(ppn_jax)\n'
          'assert not {"jax", "numpy", "flax", "cv2"} & set(sys.modules)\n'
          'try: ppn_jax.lod\nexcept AttributeError as e: assert "lod" in str(e)\n'
          'assert ppn_jax.load.__module__ == "ppn_jax.image_detector" and "cv2" in sys.modules\n'
          'assert not {"jax", "etils", "simplejpeg", "scipy"} & set(sys.modules)')
  subprocess.run([sys.executable, '-c', code], check=True)


def test_detections_are_those_of_the_detector_in_pixels(run, detector):
  image, = pictures((48, 96))
  found = detector(image)
  opened = open_run(run)
  built = opened.detector()
  resized = Resize(64, opened.config.data.resize)(unlabelled_example(image)).image
  _, variables = load_variables(opened, built, sharding.data_mesh())
  expected = Detections(*(np.asarray(f)[0] for f in jax.jit(built.detect)(
      variables, np.stack([resized, resized * 0, resized * 0]))))
  assert len(found.boxes) == expected.valid.sum() > 0
  np.testing.assert_array_equal(found.boxes,
                                expected.boxes[expected.valid] * np.float32([48, 96, 48, 96]))
  np.testing.assert_array_equal(found.scores, expected.scores[expected.valid])
  np.testing.assert_array_equal(found.level, expected.level[expected.valid])
  assert found.names == tuple(opened.categories[label].name for label in found.labels)
  assert (np.diff(found.scores) <= 0).all()
  assert detector.step == 6 and detector.categories == opened.categories


def test_images_of_any_number_and_size_are_compiled_once(detector):
  images = pictures((48, 96), (10, 300), (200, 7), (64, 64), (1, 1), (33, 50), (64, 64))
  found = detector(images)
  assert len(found) == 7
  for image, one in zip(images, found, strict=True):
    assert_same(detector(image), one)
    height, width = image.shape[:2]
    assert (one.boxes >= 0).all() and (one.boxes <= [height, width, height, width]).all()
  assert detector.predictor.detect.func._cache_size() == 1
  assert detector([]) == []
  batch = np.stack(pictures((40, 40), (40, 40)))
  for one, again in zip(detector(batch), detector(list(batch)), strict=True):
    assert_same(one, again)


def test_files_and_arrays_are_the_same(detector, tmp_path):
  image, = pictures((48, 96))
  Image.fromarray(image).save(tmp_path / 'a.png')
  exif = Image.Exif()
  exif[0x0112] = 6  # Rotate by 90 degrees clockwise.
  Image.fromarray(np.rot90(image)).save(tmp_path / 'turned.png', exif=exif)
  expected = detector(image)
  assert_same(detector(str(tmp_path / 'a.png')), expected)
  for one in detector([tmp_path / 'a.png', image, tmp_path / 'turned.png']):
    assert_same(one, expected)


def test_every_form_of_an_image_alone_and_in_any_iterable(detector, tmp_path, monkeypatch):
  image, = pictures((48, 96))
  monkeypatch.setenv('HOME', str(tmp_path))
  Image.fromarray(image).save(tmp_path / 'a.png')
  exif = Image.Exif()
  exif[0x0112] = 6
  Image.fromarray(np.rot90(image)).save(tmp_path / 'turned.png', exif=exif)
  expected = detector(image)
  forms = [image, '~/a.png', tmp_path / 'a.png', Image.fromarray(image),
           Image.open(tmp_path / 'turned.png'), np.dstack([image, image[..., 0] * 0 + 255])]
  for form in forms:
    assert_same(detector(form), expected)
  for several in (forms, tuple(forms), (form for form in forms), np.array(['~/a.png'] * 2)):
    for found in detector(several):
      assert_same(found, expected)
  for nothing in ([], (), iter([])):
    assert detector(nothing) == []


@pytest.mark.parametrize('given, message', [
    (None, 'the image is of type NoneType'), (7, 'of type int'), (b'a.png', 'of type bytes'),
    ({'image': 1}, 'of type dict'), ({'a.png'}, 'of type set'), ([None], 'image 0 is of type None'),
    (np.zeros((8, 8, 3), np.float32), 'float32'), (np.zeros((2, 8, 8, 3)), 'image 0 is float64'),
    (['%s', {}], 'image 1 is of type dict'), (io.BytesIO(b'x'), 'of type BytesIO')])
def test_other_types_are_type_errors_of_one_line(detector, tmp_path, given, message):
  Image.new('RGB', (4, 4)).save(tmp_path / 'a.png')
  if isinstance(given, list):
    given = [tmp_path / 'a.png' if entry == '%s' else entry for entry in given]
  with pytest.raises(TypeError, match=message) as error:
    detector(given)
  assert isinstance(error.value, InputError) and '\n' not in str(error.value)


def test_threshold(detector):
  image, = pictures((64, 64))
  every = detector(image)
  cut = float(every.scores[len(every.scores) // 2])
  kept = detector(image, threshold=cut)
  count = int((every.scores >= cut).sum())
  assert 0 < len(kept.scores) == count < len(every.scores)
  assert_same(kept, ppn_jax.ImageDetections(*(field[:count] for field in every[:5])))
  assert detector(image, threshold=1.0).boxes.shape == (0, 4)


def test_stream_reads_no_more_than_a_batch_ahead(detector):
  read = []

  def images():
    for i, image in enumerate(pictures(*[(20, 30)] * 8)):
      read.append(i)
      yield image

  stream = detector.stream(images())
  assert not read
  next(stream)
  assert len(read) == 3
  assert len(list(stream)) == 7


def test_mistakes(run, detector, tmp_path):
  (tmp_path / 'cut.jpg').write_bytes(b'\xff\xd8\xff')
  image, = pictures((8, 8))
  for given, message in [
      (str(tmp_path / 'cut.jpg'), 'cut.jpg'), (str(tmp_path / 'none.jpg'), 'none.jpg'),
      (tmp_path, 'cannot be read'), (image.astype(np.float32), 'float32'),
      (image[..., :2], '[8, 8, 2]'), (image[:0], '[0, 8, 3]'),
      ([image, image[..., :2]], 'image 1 is uint8 [8, 8, 2]')]:
    with pytest.raises(InputError, match=message.replace('[', r'\[')):
      detector(given)
  for threshold in (-0.1, 1.5, float('nan')):
    with pytest.raises(InputError, match='threshold'):
      detector(image, threshold=threshold)
  for options, message in [({'step': 5}, 'no checkpoint of step 5'),
                           ({'batch_size': 0}, 'batch_size'), ({'batch_size': 2.0}, 'batch_size')]:
    with pytest.raises(InputError, match=message):
      ppn_jax.load(run, **options)
  for name, message in [('', 'is not a run'),
                        ('nothing', 'neither a workdir nor an exported file')]:
    with pytest.raises(InputError, match=message):
      ppn_jax.load(tmp_path / name)
  create_run(tmp_path / 'new', tiny_config(), [Category(1, 'thing')]).save()
  for options, message in [({}, 'no checkpoint yet'), ({'ema': True}, 'ema_decay')]:
    with pytest.raises(InputError, match=message):
      ppn_jax.load(tmp_path / 'new', **options)


@pytest.mark.slow
def test_step_and_average(run):
  image, = pictures((64, 64))
  scores = {options: ppn_jax.load(run, batch_size=3, **dict(options))(image).scores[:5].tolist()
            for options in [(), (('ema', True),), (('ema', False),), (('step', 3),)]}
  assert scores[()] == scores[('ema', True),] != scores[('ema', False),]
  assert scores[('step', 3),] not in (scores[()], scores[('ema', False),])


def test_products_of_bfloat16_operands(monkeypatch):
  monkeypatch.setattr(convolution, 'multiplies_bfloat16', lambda: False)
  model = zoo.find('ppn_voc')
  (image, *_), found = pictures((300, 300)), {}
  for name in (None, 'same', 'bfloat16', 'auto'):
    found[name] = ppn_jax.load(model, matmul_dtype=name)(image, threshold=0.0)
  assert_same(found[None], found['same'])
  assert_same(found[None], found['auto'])
  difference = np.abs(found['same'].scores - found['bfloat16'].scores).max()
  assert 0 < difference < 0.02
  monkeypatch.setattr(convolution, 'multiplies_bfloat16', lambda: True)
  difference = np.abs(ppn_jax.load(model, matmul_dtype='auto')(image, threshold=0.0).scores
                      - found['same'].scores).max()
  assert 0 < difference < 0.02
  with pytest.raises(InputError, match="matmul_dtype 'float16'; did you mean 'bfloat16'"):
    ppn_jax.load(model, matmul_dtype='float16')


@pytest.fixture(scope='module')
def exported(run, tmp_path_factory):
  pytest.importorskip('flatbuffers', reason="pip install 'ppn_jax[export]'")
  path = tmp_path_factory.mktemp('export') / 'model'
  assert main(['export', f'--workdir={run}', '--format=stablehlo', '--batch_size=3',
               f'--output={path}']) == 0
  return path


@pytest.mark.slow
def test_export_detects_what_its_run_does(detector, exported, tmp_path):
  loaded = ppn_jax.load(exported)
  assert (loaded.categories, loaded.step) == (detector.categories, detector.step)
  assert (loaded.predictor.batch_size, loaded.predictor.resize) == (3, detector.predictor.resize)
  images = pictures((48, 96), (10, 300), (64, 64), (33, 50))
  Image.fromarray(images[0]).save(tmp_path / 'a.png')
  images.append(tmp_path / 'a.png')
  for found, expected in zip(loaded(images), detector(images), strict=True):
    assert found.names == expected.names and len(found.names)
    np.testing.assert_allclose(found.scores, expected.scores, atol=1e-5)
    np.testing.assert_allclose(found.boxes, expected.boxes, atol=300 * 1e-5)
    np.testing.assert_array_equal(found.level, expected.level)
  assert len(loaded(images[0], threshold=1.0).names) == 0


@pytest.mark.slow
def test_export_is_loaded_without_models_and_training(exported):
  code = ('import sys, numpy, ppn_jax\n'
          'found = ppn_jax.load(sys.argv[1])(numpy.zeros((9, 9, 3), numpy.uint8))\n'
          'heavy = ("ppn_jax.models", "ppn_jax.training", "ppn_jax.jobs", "ppn_jax.detector",'
          ' "ppn_jax.run", "flax", "optax", "orbax")\n'
          'sys.exit(" ".join(m for m in sys.modules if m.startswith(heavy)) or 0)')
  process = subprocess.run([sys.executable, '-c', code, exported], capture_output=True, text=True,
                           check=False)
  assert process.returncode == 0, process.stderr


@pytest.mark.slow
def test_mistakes_with_exports(exported, tmp_path):
  for options, message in [({'step': 6}, 'step and ema choose'),
                        ({'ema': False}, 'step and ema choose'),
                        ({'matmul_dtype': 'auto'}, 'exported file, whose types are fixed'),
                        ({'batch_size': 2}, 'takes 3 images at a time'),
                        ({'batch_size': 0}, 'at least 1')]:
    with pytest.raises(InputError, match=message):
      ppn_jax.load(exported, **options)
  (tmp_path / 'other').write_bytes(exported.read_bytes())
  with zipfile.ZipFile(tmp_path / 'other.keras', 'w') as archive:
    archive.writestr('metadata.json', '{"keras_version": "3.0"}')
  (tmp_path / 'listed').write_text('')
  (tmp_path / 'listed.json').write_text('[1]')
  (tmp_path / 'short').write_text('')
  (tmp_path / 'short.json').write_text('{"format": "tflite", "step": 1}')
  (tmp_path / 'folder').mkdir()
  (tmp_path / 'folder' / 'saved_model.pb').write_text('')
  for name, message in [('other', 'no other.json beside it'), ('other.keras', 'not name a format'),
                     ('listed', 'not name a format'), ('short', 'lacks input, labels'),
                     ('folder', 'not an export')]:
    with pytest.raises(InputError, match=message):
      ppn_jax.load(tmp_path / name)
