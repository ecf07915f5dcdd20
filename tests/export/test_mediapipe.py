"""Files for MediaPipe: what is refused, and that its runtime finds what JAX does."""

import io
import json
import zipfile

import numpy as np
import pytest
from tiny import tiny_config

from ppn_jax.detection.structures import Anchors
from ppn_jax.errors import InputError
from ppn_jax.export.formats import ANCHORS, ExportOptions, load_library, make_metadata
from ppn_jax.export.tflite_operations import operations
from ppn_jax.jobs import mediapipe_file


@pytest.mark.parametrize('options, message', [
    (dict(format='onnx', layout='mediapipe'), 'layout mediapipe is for format tflite, not onnx'),
    (dict(format='tflite', layout='mediapip'), "unknown layout 'mediapip'; did you mean"),
    (dict(format='tflite', layout='mediapipe', batch_size=2), 'one image at a time'),
    (dict(format='weights', layout='mediapipe', batch_size=None), 'is for format tflite')])
def test_options_that_do_not_go_together(options, message):
  with pytest.raises(InputError, match=message):
    ExportOptions(**options)


def test_softmax_has_no_integer_scores():
  config = tiny_config().copy_and_resolve_references().unlock()
  config.model.score_activation = 'softmax'
  mediapipe_file.check_supported(config, ExportOptions('tflite', layout='mediapipe'))
  with pytest.raises(InputError, match=r"score_activation='softmax'.*--precision=float16"):
    mediapipe_file.check_supported(
        config, ExportOptions('tflite', precision='int8', layout='mediapipe'))


def test_a_missing_library_is_named_with_its_extra():
  with pytest.raises(InputError, match=r'layout mediapipe needs mediapipe_xyz.*mediapipe\]'):
    load_library('mediapipe_xyz.tasks', 'mediapipe')


@pytest.mark.parametrize('precision, kind', [('float32', 'float32'), ('int8', 'uint8')])
def test_metadata_describes_input_and_outputs(precision, kind):
  made = make_metadata(
      ExportOptions('tflite', precision=precision, layout='mediapipe'), image_size=64,
      resize='area', labels=['a'], category_ids=[1], step=3, model={}, decoder={'candidates': 9})
  assert made['layout'] == 'mediapipe' and made['input']['type'] == kind
  assert ('127.5' in made['input']['preprocessing']) == (kind == 'float32')
  assert set(made['outputs']) == {'boxes', 'logits', 'anchors'}
  assert made['decoder'] == {'candidates': 9} and json.dumps(made)


def test_anchors_are_in_the_archive(tmp_path):
  path, anchors = tmp_path / 'a', Anchors(np.eye(4, dtype=np.float32), np.arange(4))
  mediapipe_file.attach_anchors(path, anchors)
  with zipfile.ZipFile(path) as archive, np.load(io.BytesIO(archive.read(ANCHORS))) as stored:
    np.testing.assert_array_equal(stored['boxes'], anchors.boxes)
    assert stored['level'].tolist() == [0, 1, 2, 3]


@pytest.mark.slow
@pytest.mark.parametrize('precision', ['float32', 'float16', 'int8'])
def test_mediapipe_finds_what_jax_does(shared, tmp_path, precision):
  pytest.importorskip('mediapipe', reason="pip install 'ppn_jax[mediapipe]'")
  pytest.importorskip('tensorflow', reason="pip install 'ppn_jax[tflite]'")
  import ppn_jax
  from ppn_jax.cli.main import main
  # Trained and on photographs: of equal scores, which suppresses the other is a matter of rounding.
  photographs = sorted((shared / 'data/voc300/val').glob('*.jpg'))[::40]
  for photograph in photographs:
    (tmp_path / 'images').mkdir(exist_ok=True)
    (tmp_path / 'images' / photograph.name).symlink_to(photograph)
  path = tmp_path / 'a.tflite'
  # The command compares the file with JAX in LiteRT and in MediaPipe, and fails if they differ.
  assert main(['export', '--model=ppn_voc', '--format=tflite', '--layout=mediapipe',
               f'--precision={precision}', f'--images={tmp_path / "images"}',
               f'--output={path}']) == 0
  if precision == 'float32':
    found, expected = (ppn_jax.load(model)(photographs[0]) for model in (path, 'ppn_voc'))
    np.testing.assert_allclose(found.scores, expected.scores, atol=1e-4)
  made = operations(path)
  assert {op.subgraph for op in made} == {0}  # MediaPipe refuses more.
  if precision == 'int8':
    # Only the last operations of the outputs return floats, and nothing takes any.
    assert [op.name for op in made if op.has_floats] == ['DEQUANTIZE'] * 2
