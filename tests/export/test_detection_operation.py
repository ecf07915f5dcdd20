"""Files with TensorFlow Lite's own operation: what is refused, and that it finds what JAX does."""

import numpy as np
import pytest
from tiny import tiny_config, untrained_run

from ppn_jax.errors import InputError
from ppn_jax.export.detection_operation import NAME, OUTPUTS, detections
from ppn_jax.export.formats import ExportOptions, make_metadata
from ppn_jax.export.runtimes import open_export
from ppn_jax.export.tflite_operations import operations
from ppn_jax.jobs import postprocess_file

LAYOUT = 'detection_postprocess'


@pytest.mark.parametrize('options, message', [
    (dict(format='onnx', layout=LAYOUT), 'layout detection_postprocess is for format tflite'),
    (dict(format='tflite', layout=LAYOUT, batch_size=2), 'takes one image at a time')])
def test_options_that_do_not_go_together(options, message):
  with pytest.raises(InputError, match=message):
    ExportOptions(**options)


@pytest.mark.parametrize('key, value, precision, message', [
    ('postprocess.cross_class_iou', 0.7, 'float32', r'cross_class_iou=0.7.*--layout=detections'),
    ('model.score_activation', 'softmax', 'int8', r"score_activation='softmax'.*float16")])
def test_configs_that_the_operation_cannot_express(key, value, precision, message):
  config = tiny_config().copy_and_resolve_references().unlock()
  options = ExportOptions('tflite', precision=precision, layout=LAYOUT)
  postprocess_file.check_supported(config, options)
  config.update_from_flattened_dict({key: value})
  with pytest.raises(InputError, match=message):
    postprocess_file.check_supported(config, options)


@pytest.mark.parametrize('precision, kind', [('float32', 'float32'), ('int8', 'uint8')])
def test_metadata_describes_input_and_outputs(precision, kind):
  made = make_metadata(
      ExportOptions('tflite', precision=precision, layout=LAYOUT), image_size=64, resize='area',
      labels=['a'], category_ids=[1], step=3, model={})
  assert made['input']['type'] == kind and tuple(made['outputs']) == OUTPUTS
  assert ('127.5' in made['input']['preprocessing']) == (kind == 'float32')


def test_boxes_are_clipped_and_those_outside_dropped():
  boxes = np.float32([[[0.1, -0.2, 0.5, 0.4], [1.1, 0, 1.3, 0.5], [0, 0, 1, 1], [0, 0, 0.5, 0.5]]])
  found = detections(dict(zip(OUTPUTS, (
      boxes, np.float32([[2, 1, 0, 3]]), np.float32([[0.9, 0.8, 0.7, 0.6]]), np.float32([3])),
      strict=True)))
  assert found.valid.tolist() == [[True, True, False, False]]
  np.testing.assert_allclose(found.boxes[0], [[0.1, 0, 0.5, 0.4], [0, 0, 1, 1], [0] * 4, [0] * 4])
  assert found.labels.tolist() == [[2, 0, 0, 0]] and found.labels.dtype == np.int32
  np.testing.assert_allclose(found.scores, [[0.9, 0.7, 0, 0]])


@pytest.mark.slow
@pytest.mark.parametrize('precision', ['float32', 'int8'])
def test_litert_finds_what_jax_does(tmp_path, precision):
  pytest.importorskip('tensorflow', reason="pip install 'ppn_jax[tflite]'")
  import ppn_jax
  from ppn_jax.cli.main import main
  run, path = untrained_run(tmp_path / 'run'), tmp_path / 'a.tflite'
  # The command compares the file with JAX, and fails if they differ.
  assert main(['export', f'--workdir={run}', '--format=tflite', f'--layout={LAYOUT}',
               f'--precision={precision}', '--calibration_images=6', f'--output={path}']) == 0
  image = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
  found, expected = ppn_jax.load(path)(image), ppn_jax.load(run)(image)
  assert len(found.scores) and found.boxes.max() <= 64
  if precision == 'float32':
    np.testing.assert_allclose(found.scores, expected.scores, atol=1e-4)
    pixels = image[None]
    alone, *others = (open_export(path, threads=n)(pixels) for n in (1, 2, 3, 4))
    for other in others:  # The operation loses the class that is the number of threads.
      np.testing.assert_array_equal(other.labels, alone.labels)
  made = operations(path)
  place = [op.name for op in made].index(NAME)
  network = made[:place]
  assert made[place].takes == ('FLOAT32',) * 3
  assert [op.name for op in made[place + 1:]] == ['CAST', 'SUB', 'MAXIMUM', 'CAST']  # Of classes.
  if precision == 'int8':
    # Of codes and scores, for the operation itself.
    assert [op.name for op in network if op.has_floats] == ['DEQUANTIZE'] * 2
  else:
    from ai_edge_litert.interpreter import Interpreter
    details = Interpreter(model_path=str(path)).get_output_details()
    assert [len(d['shape']) for d in details] == [3, 2, 2, 1]  # Programs go by the order.
