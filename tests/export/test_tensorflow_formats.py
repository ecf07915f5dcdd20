"""TensorFlow's formats against JAX: each primitive, each pyramid level, NMS and whole files.

Users of the reference got wrong results from its converted PPN, so every step where a conversion
can go wrong has a test. They need TensorFlow, which is not in the dev extra.
"""

import functools
import json
import zipfile
from concurrent import futures

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from tiny import tiny_config, untrained_run

tf = pytest.importorskip('tensorflow', reason="pip install 'ppn_jax[saved_model]'")

import ppn_jax  # noqa: E402
from ppn_jax.cli.main import main  # noqa: E402
from ppn_jax.detection.structures import Detections, Outputs  # noqa: E402
from ppn_jax.errors import InputError  # noqa: E402
from ppn_jax.export import comparison, tensorflow, tensorflow_ops  # noqa: E402
from ppn_jax.export.runtimes import open_export  # noqa: E402
from ppn_jax.run import build_detector  # noqa: E402


def in_tensorflow(function, *arguments):
  """Returns the function's outputs, computed by the operations that are written to files."""
  closed = jax.make_jaxpr(function)(*arguments)

  def graph(*inputs):
    operations = tensorflow_ops.Operations(tf.constant(0), 'test')
    outputs = tensorflow_ops.evaluate(closed, list(inputs), operations, 'test')
    return [operations.whole(x, v) for x, v in zip(outputs, closed.jaxpr.outvars, strict=True)]

  specs = [tf.TensorSpec(a.shape, a.dtype) for a in arguments]
  function = tf.function(graph, input_signature=specs, autograph=False)
  return [x.numpy() for x in function(*map(tf.constant, arguments))]


def in_lite(function, *arguments):
  """Returns the function's outputs, computed by LiteRT's built-in operations."""
  interpreters = pytest.importorskip('ai_edge_litert.interpreter',
                                     reason="pip install 'ppn_jax[tflite]'")
  closed = jax.make_jaxpr(function)(*arguments)

  def graph(*inputs):
    operations = tensorflow_ops.Operations(tf.constant(0), 'test')
    outputs = tensorflow_ops.evaluate(closed, list(inputs), operations, 'test')
    return [tf.identity(operations.whole(x, v), f'o{i}')
            for i, (x, v) in enumerate(zip(outputs, closed.jaxpr.outvars, strict=True))]

  specifications = [tf.TensorSpec(a.shape, a.dtype, name=f'i{i}') for i, a in enumerate(arguments)]
  concrete = tf.function(graph, input_signature=specifications,
                         autograph=False).get_concrete_function()
  converter = tf.lite.TFLiteConverter.from_concrete_functions([concrete])
  converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS]
  with tensorflow.quiet():
    interpreter = interpreters.Interpreter(model_content=converter.convert())
  interpreter.allocate_tensors()
  places = {d['name'].removeprefix('serving_default_').partition(':')[0]: d['index']
            for d in interpreter.get_input_details()}
  for i, argument in enumerate(arguments):
    interpreter.set_tensor(places[f'i{i}'], np.asarray(argument))
  interpreter.invoke()
  return [interpreter.get_tensor(d['index']) for d in interpreter.get_output_details()]


def floats(*shape, seed=0):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def integers(*shape, low=-9, high=9, seed=0):
  return np.random.default_rng(seed).integers(low, high, shape, dtype=np.int32)


def masks(a, b):
  return (a.view(jnp.uint32) & b.view(jnp.uint32)) != 0


NOTABLE = np.array([0, 1, -1, 2**31 - 1, -2**31, 65536, -65536, 5, 1431655765], np.int32)

PRIMITIVES = {
    'bits': (lambda a, b: jnp.bitwise_and(a[:, None], b), NOTABLE, NOTABLE),
    'divide': (lambda a, b: (a // b, a % b, lax.div(a, b), lax.rem(a, b)),
               integers(50), np.where(integers(50, seed=1) == 0, 3, integers(50, seed=1))),
    'sort': (lambda a, b: jnp.take_along_axis(b, jnp.argsort(a, axis=1), 1), integers(3, 40),
             floats(3, 40)),
    'sort_bool': (lambda a: jnp.argsort(a, axis=1), integers(3, 40) > 0),
    'top_k': (lambda a: lax.top_k(a, 7), integers(3, 40, low=0, high=4).astype(np.float32)),
    'finite': (lambda a: jnp.isfinite(a), np.float32([0, np.inf, -np.inf, np.nan, 3e38])),
    'take': (lambda a, i: a[i], floats(6, 4), np.int32([5, 0, 0, 3])),
    'take_axis_1': (lambda a, i: a[:, i], floats(2, 6, 4), np.int32([5, 0, 0])),
    'take_along': (lambda a, i: jnp.take_along_axis(a, i[..., None], 1), floats(2, 6, 4),
                   integers(2, 5, low=0, high=6)),
    'scatter': (jax.vmap(lambda a, i, b: a.at[i].set(b, mode='drop')), floats(2, 5),
                np.int32([[4, 7, 0], [9, 9, 1]]), floats(2, 3, seed=1)),
    'slice': (lambda a: (a[:, 1::2], a[:, -1], a[..., 2:3], a[0]), floats(3, 7, 4)),
    'dynamic_slice': (lambda a, i: lax.dynamic_slice_in_dim(a, i, 4, 1), floats(2, 6), np.int32(5)),
    'broadcast': (lambda a: jnp.sum(jnp.broadcast_to(a[:, None], (3, 5, 4)), 1), floats(3, 4)),
    'concatenate': (lambda a: jnp.concatenate([a, jnp.ones((3, 2))], 1), floats(3, 4)),
    'cumsum': (lambda a: jnp.cumsum(a, 1), integers(3, 9)),
    'matmul': (lambda a, b: jnp.einsum('bij,bj->bi', a, b), floats(2, 3, 4), floats(2, 4)),
    'softmax': (lambda a: jax.nn.softmax(a), floats(3, 5)),
    'loop': (lambda a: lax.while_loop(lambda s: (s < 50).any(), lambda s: s * 2 + 1, a),
             np.float32([1, 2, 3])),
    'loop_by_row': (jax.vmap(lambda a: lax.while_loop(lambda s: s < 50, lambda s: s * 2, a)),
                    np.float32([1, 40, 90])),
    'clamp': (lambda a: (lax.clamp(0.0, a, 6.0), jnp.clip(a, 0, 1)), floats(40) * 5),
}


@pytest.mark.parametrize('name', PRIMITIVES)
def test_primitive(name):
  function, *arguments = PRIMITIVES[name]
  expected = jax.tree.leaves(jax.jit(function)(*arguments))
  for found, wanted in zip(in_tensorflow(function, *arguments), expected, strict=True):
    assert found.shape == wanted.shape
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)


def test_bits_by_built_in_operations():
  def function(a, b):
    return jnp.bitwise_and(a[:, None], b)
  np.testing.assert_array_equal(in_lite(function, NOTABLE, NOTABLE)[0],
                                NOTABLE[:, None] & NOTABLE)


@pytest.mark.parametrize('size', [19, 10, 5, 3, 2])
def test_pooling_and_convolutions_of_odd_sizes(size):
  """SAME of an odd side pads at the end alone, of an even one not at all; pooling with -inf."""
  from ppn_jax.models import convolution
  x, kernel, full = -np.abs(floats(1, size, size, 4)) - 1, floats(3, 3, 1, 4), floats(3, 3, 4, 6)

  def function(x):
    return (convolution.max_pool(x, form='native'),
            convolution.depthwise_conv(x, kernel, stride=2, form='native'),
            convolution.depthwise_conv(x, kernel, form='native'),
            convolution.conv(x, full, stride=2, form='native'))
  for run in (in_tensorflow, in_lite):
    expected = jax.jit(function)(x)
    found = {wanted.shape: [] for wanted in expected}
    for f in run(function, x):
      found[f.shape].append(f)
    for wanted in expected:
      assert any(np.allclose(f, wanted, atol=1e-5) for f in found[wanted.shape])


def detector_and_variables(neck='pooling_pyramid', **changes):
  config = tiny_config().copy_and_resolve_references().unlock()
  config.model.num_classes = 5  # Not 4, the number of box codes: outputs are identified by shape.
  config.model.layers.conv_form = 'native'
  config.model.update(changes)
  if neck == 'conv_pyramid':
    config.model.neck = dict(name=neck, strides=(8,), depths=(16, 16))
    config.model.head = dict(name='per_level_box_predictor', side=1, prior=0.01)
  detector = build_detector(config.lock())
  leaves, tree = jax.tree.flatten(jax.device_get(detector.init(jax.random.key(0))))
  rng = np.random.default_rng(0)  # Makes the levels' batch norms differ and spreads the scores.
  return detector, jax.tree.unflatten(tree, [
      leaf * rng.uniform(0.5, 1.5, leaf.shape).astype(np.float32)
      + rng.normal(0, 0.1, leaf.shape).astype(np.float32) * (leaf.ndim == 1)
      * (np.var(leaf) == 0) for leaf in leaves])


@pytest.mark.parametrize('neck', ['pooling_pyramid', 'conv_pyramid'])
def test_every_level_of_the_network(neck):
  detector, variables = detector_and_variables(neck)
  images = np.random.default_rng(0).integers(0, 256, (1, 64, 64, 3), dtype=np.uint8)
  forward = functools.partial(detector.forward, variables)
  expected = jax.device_get(jax.jit(forward)(images))
  for run in (in_tensorflow, in_lite):
    found = {f.shape: f for f in run(forward, images)}
    for field in expected:
      for level in np.unique(detector.anchors.level):
        rows = detector.anchors.level == level
        wanted = field[:, rows]
        assert np.ptp(wanted) > 1e-3
        np.testing.assert_allclose(found[field.shape][:, rows], wanted, atol=2e-4,
                                   err_msg=f'level {level}')


def crowded_outputs(detector, rows=1):
  """Returns outputs whose anchors nearly all see one object, so that NMS takes several rounds."""
  rng = np.random.default_rng(3)
  anchors = np.asarray(detector.anchors.boxes)
  from ppn_jax.detection import boxes
  wanted = np.float32([0.3, 0.3, 0.7, 0.7]) + rng.normal(0, 0.01, anchors.shape)
  far = rng.random(len(anchors)) < 0.15
  wanted[far] = np.sort(rng.uniform(0, 1, (far.sum(), 2, 2)), axis=1).reshape(-1, 4)
  codes = np.float32(boxes.encode(wanted.astype(np.float32), anchors))
  logits = rng.normal(0, 1, (rows, len(anchors), 5)).astype(np.float32)
  logits[:, far] -= 8
  return Outputs(np.repeat(codes[None], rows, 0), logits)


@pytest.mark.parametrize('run', [in_tensorflow, in_lite])
@pytest.mark.parametrize('cross_class_iou', [1.0, 0.8])
def test_suppression_in_several_rounds_is_exact(run, cross_class_iou):
  detector, _ = detector_and_variables()
  outputs = crowded_outputs(detector, rows=2)
  from ppn_jax.detection.nms import postprocess

  def detect(codes, logits):
    return postprocess(Outputs(codes, logits), detector.anchors, class_spec=detector.class_spec,
                       candidates=64, cross_class_iou=cross_class_iou)
  expected = jax.device_get(jax.jit(detect)(*outputs))
  one_round = jax.jit(functools.partial(
      postprocess, anchors=detector.anchors, class_spec=detector.class_spec, max_detections=64,
      candidates=64))(outputs)
  assert expected.valid.sum() > (60 if cross_class_iou == 1 else 20) and one_round.valid.any()
  found = run(detect, *outputs)
  for wanted in expected:
    assert any(f.shape == wanted.shape and f.dtype == wanted.dtype
               and np.allclose(f, wanted, atol=1e-5) for f in found)


def test_unknown_operation_is_named():
  with pytest.raises(InputError, match='format test cannot express: erf_inv'):
    in_tensorflow(lambda x: lax.erf_inv(x), floats(3))


@pytest.fixture(scope='module')
def workdir(tmp_path_factory):
  return untrained_run(tmp_path_factory.mktemp('run'))


def assert_loads_as_its_run(path, workdir):
  """Checks that a file detects what its run does, also when called by several threads."""
  images = [np.random.default_rng(i).integers(0, 256, (40 + i, 90, 3), dtype=np.uint8)
            for i in range(6)]
  loaded, original = ppn_jax.load(path), ppn_jax.load(workdir, batch_size=2)
  assert (loaded.categories, loaded.step) == (original.categories, 6)
  found, tolerance = loaded(images), comparison.TOLERANCES['float32']
  for image, one, expected in zip(images, found, original(images), strict=True):
    one, expected = (Detections(d.boxes[None] / np.float32([*image.shape[:2]] * 2), d.scores[None],
                                d.labels[None], d.level[None], np.ones((1, len(d.names)), bool))
                     for d in (one, expected))
    difference = comparison.compare(expected, one, tolerance)
    assert difference.detections > 20 and not comparison.is_wrong(difference, tolerance)
  with futures.ThreadPoolExecutor(4) as pool:
    for one, again in zip(found * 5, pool.map(loaded, images * 5), strict=True):
      np.testing.assert_array_equal(one.boxes, again.boxes)


@pytest.mark.parametrize('output_format, layout, modules', [
    ('saved_model', 'detections', ()),
    ('tflite', 'detections', ('ai_edge_litert',)),
    ('tflite', 'detection_postprocess', ('ai_edge_litert',)),
    ('onnx', 'detections', ('tf2onnx', 'onnxruntime')),
])
def test_a_letterboxed_rectangle_finds_what_its_run_does(tmp_path, output_format, layout, modules):
  for module in modules:
    pytest.importorskip(module, reason=f"pip install 'ppn_jax[{output_format}]'")
  workdir = untrained_run(tmp_path / 'run', image_size=(48, 96), resize_mode='letterbox')
  path = tmp_path / 'model'
  assert main(['export', f'--workdir={workdir}', f'--format={output_format}',
               f'--layout={layout}', f'--output={path}']) == 0
  assert open_export(path).metadata['input']['shape'] == [1, 48, 96, 3]
  assert_loads_as_its_run(path, workdir)


@pytest.mark.parametrize('output_format, batch, precision, modules', [
    ('saved_model', 'free', 'float32', ()),
    ('tflite', '2', 'float32', ('ai_edge_litert',)),
    ('tflite', '1', 'float16', ('ai_edge_litert',)),
    ('tflite', '1', 'int8', ('ai_edge_litert', 'ai_edge_quantizer')),
    ('onnx', 'free', 'float32', ('tf2onnx', 'onnxruntime')),
])
def test_file_is_checked_and_carries_its_metadata(workdir, tmp_path, capsys, output_format, batch,
                                                  precision, modules):
  for module in modules:
    pytest.importorskip(module, reason=f"pip install 'ppn_jax[{output_format}]'")
  path = tmp_path / 'model'
  assert main(['export', f'--workdir={workdir}', f'--format={output_format}',
               f'--batch_size={batch}', f'--precision={precision}', '--calibration_images=4',
               f'--output={path}']) == 0
  assert 'largest difference from JAX on 6 images' in capsys.readouterr().out
  if precision == 'float32':
    assert_loads_as_its_run(path, workdir)
  detect = open_export(path)
  assert detect.metadata['labels'] == ['circle', 'square', 'star']
  assert detect.batch_size == (None if batch == 'free' else int(batch))
  found = detect(np.zeros((3, 64, 64, 3), np.uint8))
  assert found.boxes.shape == (3, 100, 4) and found.labels.dtype == np.int32
  assert found.valid.dtype == bool and (np.diff(found.scores) <= 0).all()
  assert [p.name for p in tmp_path.iterdir()] == ['model']
  if output_format == 'tflite':
    with zipfile.ZipFile(path) as archive:
      assert archive.read('labels.txt').split() == [b'circle', b'square', b'star']
      assert json.loads(archive.read('metadata.json'))['precision'] == precision
