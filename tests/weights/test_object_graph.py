"""Checkpoints of TensorFlow 2's detection zoo: names, shapes and layouts on disk, and mistakes."""

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from foreign import VALUE, object_detector, write_bundle, write_objects

from ppn_jax.config_files import load_config
from ppn_jax.detection.structures import Category
from ppn_jax.errors import InputError
from ppn_jax.jobs.import_tf import config_of, fit_config
from ppn_jax.run import create_run
from ppn_jax.weights import importer, names
from ppn_jax.weights.architecture import model_settings
from ppn_jax.weights.initial import initial_weights
from ppn_jax.weights.read import read_weights
from ppn_jax.weights.tf_bundle import OBJECT_GRAPH, read_tf_bundle

EXTRACTOR, BACKBONE = 'FeatureExtractor/MobilenetV2', 'model/_feature_extractor'
CLASSES = [Category(i, f'{i}') for i in (1, 2, 3)]


def shapes_of(tmp_path, config, categories=CLASSES):
  """Returns the shapes of the variables of a run with this config."""
  detector = create_run(tmp_path / 'run', config, categories).detector()
  return jax.eval_shape(detector.init, jax.random.key(0))


def fitted(file, tmp_path, *overrides):
  """Returns the config of a file, the line on what was set, and the shapes of its variables."""
  config, line = fit_config(load_config(config_of(file), overrides), file)
  return config, line, shapes_of(tmp_path, config)


SMALL = ('set from the file: model.backbone.depth_multiplier=0.35 model.backbone.min_depth=16 '
         'model.neck.depths=179,89,89,44')


@pytest.mark.parametrize('full_names, alpha, line', [
    (True, 1.0, ''), (True, 0.35, SMALL), (False, 0.35, SMALL)])
def test_every_variable_of_an_ssd(tmp_path, full_names, alpha, line):
  written = object_detector(alpha=alpha)
  write_objects(tmp_path / 'ckpt-0', written, full_names=full_names)
  file = read_weights(tmp_path / 'ckpt-0')
  contents = importer.recognise(file)
  assert (contents.kind, contents.network) == ('ssd', 'MobilenetV2')
  assert importer.class_columns(file) == 4
  _, changed, like = fitted(file, tmp_path)
  assert changed == line
  imported = importer.import_detector(file, like)
  assert imported.report.matched == 324
  assert imported.report.unused == {'the global step': ('save_counter',)}
  params, stats = imported.variables['params'], imported.variables['batch_stats']
  backbone = f'{BACKBONE}/classification_backbone/layer_with_weights'
  level = f'{BACKBONE}/feature_map_generator/convolutions'
  head = 'model/_box_predictor/_prediction_heads'
  block = params['backbone']['expanded_conv_16']
  for ours, theirs in [
      (params['backbone']['conv']['kernel'], f'{backbone}-0/kernel'),
      (params['backbone']['expanded_conv']['project']['norm']['bias'], f'{backbone}-5/beta'),
      (np.swapaxes(block['depthwise']['kernel'], 2, 3), f'{backbone}-98/depthwise_kernel'),
      (stats['backbone']['conv_1']['norm']['var'], f'{backbone}-103/moving_variance'),
      (params['neck']['extra_2']['reduce']['kernel'], f'{level}/2/0/kernel'),
      (stats['neck']['extra_5']['shrink']['norm']['mean'], f'{level}/5/4/moving_mean'),
      (params['head']['level_0']['box_bias'],
       f'{head}/box_encodings/0/_box_encoder_layers/0/bias'),
      (params['head']['level_3']['class_kernel'],
       f'{head}/class_predictions_with_background/3/_class_predictor_layers/0/kernel')]:
    np.testing.assert_array_equal(ours, written[theirs][1])


def test_the_config_of_the_zoo(tmp_path):
  config = load_config('ssd_mobilenet_v2_coco_reference')
  detector = create_run(tmp_path / 'run', config,
                        [Category(i, f'{i}') for i in range(1, 91)]).detector()
  # 19 x 19 cells with 3 anchors, and 10 x 10, 5 x 5, 3 x 3, 2 x 2, 1 x 1 with 6: zoo's 1,917.
  assert detector.image_size == 300 and len(detector.anchors.boxes) == 1917
  like = flatten_dict(jax.eval_shape(detector.init, jax.random.key(0)))
  ours = {tuple(leaf.shape) for leaf in like.values()}
  theirs = {array.shape for _, array in object_detector(alpha=1.0, columns=91).values()}
  depthwise = {shape for shape in theirs if len(shape) == 4 and shape[3] == 1}
  assert ours == theirs - depthwise - {()} | {(a, b, d, c) for a, b, c, d in depthwise}


def test_values_that_training_leaves(tmp_path):
  written = object_detector()
  kernel = f'{BACKBONE}/classification_backbone/layer_with_weights-0/kernel'
  name, value = written[kernel]
  slot = f'{kernel}/.OPTIMIZER_SLOT/optimizer'
  written |= {
      f'{slot}/momentum': (f'{name}/momentum', value), f'{slot}/average': ('', value + 1),
      'optimizer/iter': ('iter', np.int64(3)),
      'optimizer/_variables/1': (f'm/{name}', value), 'step': ('global_step', np.int64(9))}
  write_objects(tmp_path / 'ckpt-5', written)
  file = read_weights(tmp_path / 'ckpt-5.index')
  _, _, like = fitted(file, tmp_path)
  plain, average = (importer.import_detector(file, like, average=a) for a in (False, True))
  assert {what: len(group) for what, group in plain.report.unused.items()} == {
      'moving averages': 1, 'the global step': 2, "the optimizer's": 3}
  for imported, expected in ((plain, value), (average, value + 1)):
    np.testing.assert_array_equal(imported.variables['params']['backbone']['conv']['kernel'],
                                  expected)


def test_a_copy_of_the_model_is_left_out(tmp_path):
  written = object_detector()
  copy = {path.replace('model/', 'copy/', 1): (name, np.zeros_like(value))
          for path, (name, value) in written.items() if path.startswith('model/')}
  write_objects(tmp_path / 'x', copy | written)
  file = read_weights(tmp_path / 'x')
  assert len(file.tensors) == len(copy) + len(written)
  for name, tensor in file.tensors.items():
    assert name.startswith('copy/') == (not tensor.any())


def test_layouts_on_disk(tmp_path):
  zoo = tmp_path / 'ssd_mobilenet_v2_320x320_coco17_tpu-8'
  (zoo / 'checkpoint').mkdir(parents=True)
  (zoo / 'saved_model').mkdir()
  (zoo / 'saved_model' / 'saved_model.pb').write_bytes(b'')
  variables = object_detector()
  write_objects(zoo / 'checkpoint' / 'ckpt-0', variables)
  (zoo / 'checkpoint' / 'checkpoint').write_text('model_checkpoint_path: "ckpt-0"\n')
  for given in (zoo, zoo / 'checkpoint', zoo / 'checkpoint' / 'ckpt-0',
                zoo / 'checkpoint' / 'ckpt-0.index'):
    assert read_weights(given).path == str(zoo / 'checkpoint' / 'ckpt-0')
  with pytest.raises(InputError, match=r'is a SavedModel, which is not read; give the '
                                       r'checkpoint that came with it, such as .*/checkpoint$'):
    read_weights(zoo / 'saved_model')
  write_objects(zoo / 'checkpoint' / 'ckpt-12', variables)
  assert read_weights(zoo).path.endswith('ckpt-0')  # That of the file `checkpoint`.
  with pytest.raises(InputError, match=r'no checkpoint at .*ckpt-7'):
    read_weights(zoo / 'checkpoint' / 'ckpt-7')


@pytest.mark.parametrize('text, size', [
    ('model { ssd { image_resizer { fixed_shape_resizer {\n height: 320\n width: 320 } } } }', 320),
    ('image_resizer: { fixed_shape_resizer: { width: 512  # wide\n height: 256 } }', (256, 512)),
    ('# fixed_shape_resizer { height: 320 width: 320 }', 0),
    ('fixed_shape_resizer { height: 320 }', 0),
    ('image_resizer { keep_aspect_ratio_resizer { min_dimension: 320 } }', 0), (None, 0)])
def test_image_size_of_the_pipeline(tmp_path, text, size):
  (tmp_path / 'zoo' / 'checkpoint').mkdir(parents=True)
  write_objects(tmp_path / 'zoo' / 'checkpoint' / 'ckpt-0', object_detector(alpha=1.0))
  if text is not None:
    (tmp_path / 'zoo' / 'pipeline.config').write_text(text)
  file = read_weights(tmp_path / 'zoo')
  assert file.image_size == size
  line = f'set from the file: model.image_size={"256,512" if size == (256, 512) else size}'
  config, changed = fit_config(load_config(config_of(file)), file)
  assert (config.model.image_size, changed) == ((size, line) if size else (300, ''))
  assert fit_config(load_config(config_of(file)), file, ['model.image_size'])[1] == ''
  fpn = file._replace(tensors={f'FeatureExtractor/{name}': value for name, value in {
      'MobilenetV1/Conv2d_0/weights': np.zeros(3), 'MobilenetV1/fpn/x': np.zeros(3)}.items()})
  assert fit_config(load_config('fpn_mobilenet_v1_coco'), fpn)[1] == ''


@pytest.mark.parametrize('full_names', [True, False])
@pytest.mark.parametrize('kind, network, words', [
    ('fpn', 'mobilenet_v1', 'a MobileNet FPN detector,'),
    ('fpnlite', 'mobilenet_v2', 'a MobileNet FPN detector of separable convolutions (FPNLite),')])
def test_of_an_fpn_the_backbone_can_be_taken(tmp_path, kind, network, words, full_names):
  write_objects(tmp_path / 'ckpt-0', object_detector(kind, alpha=0.5), full_names=full_names)
  file = read_weights(tmp_path / 'ckpt-0')
  config = load_config('fpn_mobilenet_v1_coco').copy_and_resolve_references().unlock()
  if network == 'mobilenet_v2':
    config.model.backbone = dict(name=network, last_stride=32, endpoint='output')
  config.model.backbone.depth_multiplier = 0.5
  config.model.backbone.min_depth = 16
  like = shapes_of(tmp_path, config)
  for refused in (lambda: config_of(file), lambda: importer.import_detector(file, like)):
    with pytest.raises(InputError) as error:
      refused()
    assert f'looks like {words}' in str(error.value)
    assert f'--config.init.backbone={file.path}' in str(error.value)
    assert ('last_stride=32' in str(error.value)) == (network == 'mobilenet_v2')
  backbone = importer.import_backbone(file, like)
  found = initial_weights(like, CLASSES, weights=str(tmp_path / 'ckpt-0'))
  for variables in (backbone.variables, found.variables):
    paths = set(flatten_dict(variables))
    assert paths == {path for path in flatten_dict(like) if path[1] == 'backbone'}


def test_initial_weights_of_an_ssd(tmp_path):
  write_objects(tmp_path / 'ckpt-0', object_detector(alpha=1.0, columns=91))
  config = load_config('ssd_mobilenet_v2_coco_reference')
  cars = [Category(1, 'car'), Category(2, 'anything')]
  like = shapes_of(tmp_path, config, cars)
  found = initial_weights(like, cars, weights=str(tmp_path / 'ckpt-0'))
  assert found.report.transferred == found.report.total == 324 and found.report.partial == 12
  assert '1 of 2 by name (car); the background' in found.report.classes
  backbone = initial_weights(like, cars, backbone=str(tmp_path / 'ckpt-0'))
  assert {path[1] for path in flatten_dict(backbone.variables)} == {'backbone'}


def test_of_ssdlite_the_backbone_can_be_taken(tmp_path):
  written = object_detector(alpha=1.0)
  head = 'model/_box_predictor/_prediction_heads/box_encodings/0/_box_encoder_layers'
  written = {path.replace('_layers/0', '_layers/3'): value for path, value in written.items()}
  written[f'{head}/0/depthwise_kernel'] = (
      'BoxPredictor/ConvolutionalBoxHead_0/BoxEncodingPredictor_depthwise/depthwise_kernel',
      np.ones((3, 3, 576, 1), np.float32))
  write_objects(tmp_path / 'ckpt-0', written)
  file = read_weights(tmp_path / 'ckpt-0')
  like = shapes_of(tmp_path, load_config('ssd_mobilenet_v2_coco_reference'))
  with pytest.raises(InputError, match=r'looks like an SSD detector of separable convolutions '
                     r'\(SSDLite\), .* other layers .*name=mobilenet_v2 .*last_stride=32 --config'):
    importer.import_detector(file, like)
  found = initial_weights(like, CLASSES, weights=str(tmp_path / 'ckpt-0'))
  assert {path[1] for path in flatten_dict(found.variables)} == {'backbone'}


def test_configs_that_do_not_fit(tmp_path):
  write_objects(tmp_path / 'ckpt-0', object_detector(alpha=0.5))
  for name, hint in [('ssd_mobilenet_v1_coco_reference',
                      'set model.backbone.name=mobilenet_v2 model.backbone.last_stride=32$'),
                     ('ssd_mobilenet_v2_coco_reference',
                      'set model.backbone.depth_multiplier=0.5 .*neck.depths=256,128,128,64')]:
    like = shapes_of(tmp_path, load_config(name))
    for read in (importer.import_detector, importer.import_matching):
      with pytest.raises(InputError, match=hint):
        read(read_weights(tmp_path / 'ckpt-0'), like)


def test_the_last_layer_of_a_backbone():
  shapes = {f'MobilenetV2/{layer}/weights': (1, 1, 8, depth) for layer, depth in [
      ('Conv', 24), ('expanded_conv/project', 16), ('Conv_1', 1280)]}
  assert model_settings(shapes) == {'model.backbone.depth_multiplier': 0.75,
                                    'model.backbone.last_depth': 1280}
  assert model_settings(shapes | {'MobilenetV2/Conv_1/weights': (1, 1, 8, 960)}) == {
      'model.backbone.depth_multiplier': 0.75}


def test_other_networks_are_named(tmp_path):
  layer = 'model/_feature_extractor/classification_backbone/layer_with_weights-'
  zeros = np.zeros((7, 7, 3, 64), np.float32)
  write_objects(tmp_path / 'x', {f'{layer}{i}/kernel': (f'conv{i}_conv/kernel', zeros)
                                 for i in range(3)})
  contents = importer.recognise(read_weights(tmp_path / 'x'))
  assert contents.kind == 'unknown' and 'conv0_conv/kernel, conv1_conv' in contents.description


@pytest.mark.parametrize('graph, message', [
    (b'\xff\xff\xff', 'its object graph cannot be read'),
    (np.zeros(3), f'{OBJECT_GRAPH} is not a single string')])
def test_damaged_object_graphs(tmp_path, graph, message):
  write_bundle(tmp_path / 'x', {'a' + VALUE: np.zeros(3), OBJECT_GRAPH: graph})
  with pytest.raises(InputError, match=message):
    read_weights(tmp_path / 'x')


def test_any_flipped_bit_of_the_graph_is_found(tmp_path):
  write_objects(tmp_path / 'x', {'model/a': ('a', np.float32([1]))})
  path = tmp_path / 'x.data-00000-of-00001'
  whole = path.read_bytes()
  assert read_tf_bundle(tmp_path / 'x').keys() == {'model/a' + VALUE, OBJECT_GRAPH}
  for at in range(len(whole)):
    path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1:])
    with pytest.raises(InputError, match='damaged'):
      read_tf_bundle(tmp_path / 'x')


def test_files_of_tensorflow(tmp_path):
  tf = pytest.importorskip('tensorflow', reason='pip install tensorflow')
  written = object_detector()
  root = {}
  for path, (name, value) in written.items():
    *parents, leaf = path.split('/')
    node = root
    for parent in parents:
      node = node.setdefault(parent, {})
    node[leaf] = tf.Variable(value, name=name)
  del root['save_counter']  # That of `Checkpoint.save`.
  checkpoint = tf.train.Checkpoint(**{name: _trackable(tf, node) for name, node in root.items()})
  path = checkpoint.write(str(tmp_path / 'ckpt-0'))
  write_objects(tmp_path / 'ours', written)
  theirs, ours = read_weights(path), read_weights(tmp_path / 'ours')
  assert theirs.tensors.keys() == ours.tensors.keys() - {'save_counter'}
  for name, value in theirs.tensors.items():
    np.testing.assert_array_equal(value, ours.tensors[name])


def _trackable(tf, node):
  """Returns an object whose attributes are the entries of a dict, as deep as it is."""
  if not isinstance(node, dict):
    return node
  module = tf.Module()
  for name, value in node.items():
    setattr(module, name, _trackable(tf, value))
  return module


def test_groups_of_names():
  assert names.group('model/x/kernel/.OPTIMIZER_SLOT/optimizer/momentum') == "the optimizer's"
  assert names.group('optimizer/learning_rate') == "the optimizer's"
  assert names.group('save_counter') == 'the global step'
