"""TensorFlow Lite files: every type of weights, other networks, and damage."""

import json
import random
import sys

import jax
import numpy as np
import pytest

pytest.importorskip('tflite')
from flatbuffers import flexbuffers
from test_importer import shapes_of
from tflite_writer import TFLiteWriter, add_mobilenet, write_classifier, write_ssd

from ppn_jax.config import ssd
from ppn_jax.detection.anchors import ssd_anchors
from ppn_jax.errors import InputError
from ppn_jax.weights import folded_norm, importer
from ppn_jax.weights.architecture import depth_multiplier, model_settings
from ppn_jax.weights.postprocessing import compare
from ppn_jax.weights.read import read_weights
from ppn_jax.weights.tflite_file import read_tflite
from ppn_jax.weights.tflite_network import read_tflite_network

GRIDS = ((19, 19), (10, 10), (5, 5), (3, 3), (2, 2), (1, 1))
KINDS = {'UINT8': 'uint8', 'INT8': 'int8 by channel', 'FLOAT32': 'float32', 'FLOAT16': 'float16'}
OPTIONS = {'score_threshold': 0.25, 'iou_threshold': 0.5, 'max_detections': 10}


def sizes(file):
  return {name: tensor.shape for name, tensor in file.tensors.items()}


def assert_expected(network, writer):
  assert network.tensors
  for name, value in network.tensors.items():
    np.testing.assert_array_equal(value, writer.expected[name], err_msg=name)
    assert value.dtype == np.float32 and np.ptp(value) > 0


@pytest.mark.parametrize('weights', KINDS)
@pytest.mark.parametrize('names', ['slim', 'generic'])
def test_classifiers(tmp_path, weights, names):
  writer = write_classifier(tmp_path / 'x.tflite', weights=weights, names=names)
  network = read_tflite_network(tmp_path / 'x.tflite')
  assert network.description == ('a classifier of 4 classes, MobileNet-v1 with depth multiplier '
                                 f'0.25, 64 px, {KINDS[weights]}')
  assert len(network.tensors) == 2 * 27
  assert_expected(network, writer)


@pytest.mark.parametrize('weights', KINDS)
def test_detectors(tmp_path, weights):
  writer = write_ssd(tmp_path / 'x.tflite', weights=weights)
  network = read_tflite_network(tmp_path / 'x.tflite')
  assert network.description == ('an SSD detector of 5 classes and a background, MobileNet-v1 with '
                                 f'depth multiplier 0.25, 300 px, {KINDS[weights]}')
  assert len(network.tensors) == 2 * (27 + 8 + 12)
  assert_expected(network, writer)
  assert network.postprocessing.score_activation == 'sigmoid'


@pytest.mark.parametrize('multiplier, classes', [(0.25, 1), (0.5, 3), (0.35, 11)])
def test_any_multiplier_and_number_of_classes(tmp_path, multiplier, classes):
  """With three classes and a background, class scores have as many columns as box codes."""
  write_ssd(tmp_path / 'x.tflite', multiplier=multiplier, classes=classes)
  file = read_weights(tmp_path / 'x.tflite')
  settings = model_settings(sizes(file))
  assert settings == {
      'model.backbone.depth_multiplier': multiplier, 'model.head.side': 1,
      'model.neck.depths': tuple(int(d * multiplier) for d in (512, 256, 256, 128)),
      'model.anchors.reduce_lowest_level': True}
  assert importer.class_columns(file) == classes + 1
  like = shapes_of(ssd, num_classes=classes, **{
      key.removeprefix('model.'): value for key, value in settings.items()})
  imported = importer.import_detector(file, like)
  assert imported.report.matched == len(jax.tree.leaves(like)) == 199
  assert not imported.report.unused
  assert len(folded_norm.folded_layers(imported.variables)) == 27 + 8


@pytest.mark.slow
def test_an_extractor_is_a_backbone(tmp_path):
  write_classifier(tmp_path / 'x.tflite', classes=0, multiplier=0.25, min_depth=16)
  file = read_weights(tmp_path / 'x.tflite')
  assert 'an extractor of features' in file.description
  assert model_settings(sizes(file)) == {'model.backbone.depth_multiplier': 0.25,
                                         'model.backbone.min_depth': 16}
  like = shapes_of(**{'backbone.depth_multiplier': 0.25, 'backbone.min_depth': 16})
  assert importer.import_backbone(file, like).report.matched == 115
  for wrong in ({}, {'backbone.depth_multiplier': 0.25}, {'backbone.depth_multiplier': 0.5}):
    with pytest.raises(InputError, match=r'set model.backbone.*min_depth=16'):
      importer.import_backbone(file, shapes_of(**wrong))
    with pytest.raises(InputError, match=r'set model.backbone.*min_depth=16'):
      importer.import_matching(file, shapes_of(**wrong))


@pytest.mark.parametrize('features, expected', [
    ([32, 64, 128], (1.0, 8)), ([8, 16, 32], (0.25, 8)), ([16, 16, 32], (0.25, 16)),
    ([24, 48, 96, 96], (0.75, 8)), ([19, 38, 76], (19 / 32, 8)), ([32, 64, 120], None), ([], None),
    ([32] * 15, None)])
def test_depth_multiplier(features, expected):
  assert depth_multiplier(features) == expected


def test_other_depths_of_the_neck_are_named(tmp_path):
  write_ssd(tmp_path / 'x.tflite')
  file = read_weights(tmp_path / 'x.tflite')
  like = shapes_of(ssd, num_classes=5, **{'backbone.depth_multiplier': 0.25})
  with pytest.raises(InputError, match=r'; set model\.neck\.depths=128,64,64,32'):
    importer.import_detector(file, like)
  found = importer.import_matching(file, like)
  assert 'to use all of it set model.neck.depths=128,64,64,32' in found.description


@pytest.mark.parametrize('text, expected', [
    ('a\nb\n???\nd\ne\n', ('a', 'b', '', 'd', 'e')),
    ('background\na\nb\nc\nd\ne', ('a', 'b', 'c', 'd', 'e')),
    ('???\na\nb\nc\nd\n???\n', ('a', 'b', 'c', 'd', '')), ('a\nb\n', ())])
def test_labels_of_the_metadata(tmp_path, text, expected):
  write_ssd(tmp_path / 'x.tflite', labels={'labelmap.txt': text})
  file = read_weights(tmp_path / 'x.tflite')
  assert file.labels == expected
  like = shapes_of(ssd, num_classes=5, **{'backbone.depth_multiplier': 0.25,
                                          'neck.depths': (128, 64, 64, 32)})
  named = [c.name for c in importer.import_matching(file, like).categories]
  assert named == [name or f'N/A {i}' for i, name in enumerate(expected, start=1)]


@pytest.mark.parametrize('attached, expected', [
    ({'score_calibration.txt': '1,2\n3,4\n', 'labelmap.txt': 'cat\ndog\n'}, ('cat', 'dog')),
    ({'a.txt': '1\n2\n', 'labels.txt': 'cat\ndog\n'}, ('cat', 'dog')),
    ({'dict.txt': '\ufeffcat\r\ndog\r\n\r\n\n'}, ('cat', 'dog'))])
def test_lists_of_labels(tmp_path, attached, expected):
  write_ssd(tmp_path / 'x.tflite', classes=2, labels=attached)
  assert read_tflite_network(tmp_path / 'x.tflite').labels == expected


def placed():
  anchors = ssd_anchors(GRIDS, min_scale=0.2, reduce_lowest_level=True)
  low, high = anchors.boxes[:, :2], anchors.boxes[:, 2:]
  return anchors, np.concatenate([(low + high) / 2, high - low], axis=1)


@pytest.mark.parametrize('weights', ['UINT8', 'FLOAT32'])
def test_anchors_are_compared(tmp_path, weights):
  anchors, values = placed()
  for change, message in [
      (lambda v: v, 'anchors: 1,917, equal to those of the config up to'),
      (lambda v: v + [0, 0, 0.1, 0] * (np.arange(len(v)) == 7)[:, None],
       r'anchors differ: 1 of 1,917, most by 0\.[01].*; the first is number 7 by its height: \[')]:
    write_ssd(tmp_path / 'x.tflite', weights=weights, anchors=change(values))
    found = read_weights(tmp_path / 'x.tflite').postprocessing
    line, = compare(found, anchors, OPTIONS)
    assert line.startswith(message) or np.all([part in line for part in ('number 7', 'height')])
    assert ('the file rounds them' in line) == (weights == 'UINT8')


def test_what_differs_in_the_post_processing_is_named(tmp_path):
  anchors, values = placed()
  write_ssd(tmp_path / 'x.tflite', anchors=values)
  found = read_weights(tmp_path / 'x.tflite').postprocessing
  _, line = compare(found, anchors, OPTIONS | {'iou_threshold': 0.6, 'max_detections': 100})
  assert line.endswith('postprocess.iou_threshold=0.6 (there 0.5), max_detections=100 (there 10)')
  fewer = anchors._replace(boxes=anchors.boxes[:9])
  assert '1,917 in the file, 9 here' in compare(found, fewer, OPTIONS)[0]
  write_ssd(tmp_path / 'y.tflite', post=False)
  found = read_weights(tmp_path / 'y.tflite').postprocessing
  assert compare(found, anchors, OPTIONS)[0].startswith('anchors: the file has none')


def test_box_codes_in_other_units(tmp_path):
  files = []
  for scales in ((10.0, 10.0, 5.0, 5.0), (1.0, 2.0, 5.0, 10.0)):
    write_ssd(tmp_path / 'x.tflite', scales=scales)
    files.append(read_weights(tmp_path / 'x.tflite').tensors)
  for leaf in ('weights', 'biases'):
    ours, theirs = (f[f'BoxPredictor_3/BoxEncodingPredictor/{leaf}'] for f in files)
    np.testing.assert_allclose(theirs, ours * np.tile([10, 5, 1, 0.5], 6), rtol=1e-6)


@pytest.mark.parametrize('options, activation', [
    ({'activation': 'SOFTMAX'}, 'softmax'), ({'activation': ''}, ''), ({'post': False}, 'sigmoid')])
def test_scores(tmp_path, options, activation):
  write_ssd(tmp_path / 'x.tflite', **options)
  file = read_weights(tmp_path / 'x.tflite')
  assert file.postprocessing.score_activation == activation
  assert importer.recognise(file).kind == 'ssd'


@pytest.mark.parametrize('low, high', [(0.0, 1.0), (0.0, 255.0)])
def test_other_scalings_of_pixels_become_part_of_the_first_layer(tmp_path, low, high):
  writer = TFLiteWriter('UINT8')
  image = writer.image(64, low, high)
  x = add_mobilenet(writer, image)[-1]
  writer.write(tmp_path / 'x.tflite', [image], [x])
  tensors = read_tflite_network(tmp_path / 'x.tflite').tensors
  theirs = writer.expected['MobilenetV1/Conv2d_0/weights']
  pixels = np.random.default_rng(0).integers(0, 256, (3, 3, 3)).astype(np.float64)

  def output(kernel, bias, low, high):
    return np.tensordot(pixels / 255 * (high - low) + low, kernel, 3) + bias

  np.testing.assert_allclose(
      output(tensors['MobilenetV1/Conv2d_0/weights'], tensors['MobilenetV1/Conv2d_0/biases'], -1,
             1),
      output(theirs, writer.expected['MobilenetV1/Conv2d_0/biases'], low, high), rtol=1e-4,
      atol=1e-4)


def test_padding_as_keras_writes_it(tmp_path):
  writer = TFLiteWriter('FLOAT32')
  image = writer.image(64)
  amounts = writer.tensor('paddings', (4, 2), 'INT32',
                          np.array([[0, 0], [0, 1], [0, 1], [0, 0]], np.int32))
  padded = writer.operation('PAD', [image, amounts], [writer.tensor('pad', (1, 65, 65, 3))])
  x = writer.layer('s', padded, 8, side=3, stride=2, name='s', padding='VALID')
  writer.write(tmp_path / 'x.tflite', [image], [x])
  from ppn_jax.weights.tflite_layers import LayerGraph
  layer, = LayerGraph(read_tflite(tmp_path / 'x.tflite')).layers
  assert layer.plain and layer.source == image


def residual(writer):
  """A block of MobileNet-v2: expansion, depthwise, linear projection, sum."""
  image = writer.image(32)
  x = writer.layer('a', image, 8, side=3, stride=2, name='a')
  y = writer.layer('b', x, 16, name='b')
  y = writer.layer('c', y, 0, side=3, depthwise=True, name='c')
  y = writer.layer('d', y, 8, activation='NONE', name='d', low=-6.0)
  return image, writer.operation('ADD', [x, y], [writer.activation('sum', (1, 16, 16, 8))])


def swish(writer):
  image = writer.image(32)
  x = writer.layer('a', image, 8, side=3, stride=2, name='a', activation='NONE', low=-6.0)
  gate = writer.operation('LOGISTIC', [x], [writer.activation('gate', (1, 16, 16, 8))])
  x = writer.operation('MUL', [x, gate], [writer.activation('swish', (1, 16, 16, 8))])
  return image, writer.layer('b', x, 0, side=3, depthwise=True, name='b')


def hard_swish(writer):
  image = writer.image(32)
  x = writer.layer('a', image, 8, side=3, stride=2, name='a', activation='NONE', low=-6.0)
  return image, writer.operation('HARD_SWISH', [x], [writer.activation('h', (1, 16, 16, 8))])


def plain_residual(writer):
  image = writer.image(32)
  x = writer.layer('a', image, 8, side=3, stride=2, name='a')
  y = writer.layer('b', x, 8, side=3, name='b')
  return image, writer.operation('ADD', [x, y], [writer.activation('sum', (1, 16, 16, 8))])


def yolo(writer):
  image = writer.image(32)
  x = writer.layer('a', image, 8, side=3, stride=2, name='a', activation='NONE', low=-6.0)
  x = writer.operation('LEAKY_RELU', [x], [writer.activation('l', (1, 16, 16, 8))])
  return image, writer.operation('RESIZE_NEAREST_NEIGHBOR', [x], [
      writer.activation('r', (1, 32, 32, 8))])


def head_only(writer):
  image = writer.activation('pool', (1, 1, 1, 64))
  return image, writer.layer('a', image, 10, name='logits', activation='NONE')


def named(name):
  def make(writer):
    image = writer.image(32)
    return image, writer.layer('a', image, 8, side=3, stride=2, name=name)
  return make


def other_activation(writer):
  image = writer.activation('image', (1, 64, 64, 3), -1.0, 1.0)
  writer.weights = 'FLOAT32'
  return image, add_mobilenet(writer, image, activation='RELU')[-1]


@pytest.mark.parametrize('make, description', [
    (residual, r'MobileNet-v2 \(a network with inverted residuals\)'),
    (swish, 'EfficientNet'), (hard_swish, 'MobileNet-v3'),
    (plain_residual, 'a residual network such as ResNet'),
    (yolo, 'YOLO'), (head_only, 'the classifier of a network, without its backbone'),
    (named('FeatureExtractor/MobilenetV2/Conv'), 'MobileNet-v2'),
    (named('efficientdet/box_net'), 'EfficientDet'), (named('model/yolov5/conv'), 'YOLO'),
    (other_activation, 'a network of 27 layers that is not MobileNet-v1')])
def test_other_networks_are_named(tmp_path, make, description):
  writer = TFLiteWriter('UINT8')
  image, output = make(writer)
  writer.write(tmp_path / 'x.tflite', [image], [output])
  file = read_weights(tmp_path / 'x.tflite')
  for act in (importer.import_backbone, importer.import_matching):
    with pytest.raises(InputError, match=f'looks like {description}.*; a backbone can be') as error:
      act(file, shapes_of())
    assert '\n' not in str(error.value)


@pytest.mark.parametrize('kind, name', [('MAX_POOL_2D', 'PPN'), ('RESIZE_NEAREST_NEIGHBOR', 'FPN')])
def test_other_detectors_are_backbones(tmp_path, kind, name):
  writer = TFLiteWriter('UINT8')
  image = writer.image(64)
  x = add_mobilenet(writer, image, blocks=11, scope='FeatureExtractor/MobilenetV1')[-1]
  y = writer.operation(kind, [x], [writer.activation('pooled', (1, 2, 2, 128))])
  outputs = [writer.tensor(f'out_{i}', (1, 10)) for i in range(4)]
  boxes = writer.layer('b', y, 24, name='boxes', activation='NONE')
  scores = writer.layer('c', y, 12, name='scores', activation='NONE')
  writer.operation('TFLite_Detection_PostProcess', [boxes, scores, boxes], outputs)
  writer.write(tmp_path / 'x.tflite', [image], outputs)
  file = read_weights(tmp_path / 'x.tflite')
  assert file.description.startswith(f'a detector other than SSD ({name}), MobileNet-v1 with')
  like = shapes_of(**{'backbone.depth_multiplier': 0.25})
  assert importer.import_backbone(file, like).report.matched == 115
  with pytest.raises(InputError, match=r'looks like a detector other than SSD .*--kind=backbone'):
    importer.import_detector(file, like)


def test_files_without_readable_weights(tmp_path):
  writer = TFLiteWriter('UINT8')
  image = writer.image(64)
  writer.operation('edgetpu-custom-op', [image], [writer.tensor('out', (1, 3))])
  writer.write(tmp_path / 'edge.tflite', [image], [1])
  metadata = {'format': 'tflite', 'category_ids': [], 'step': 3, 'model': {}}
  write_classifier(tmp_path / 'own.tflite', labels={'metadata.json': json.dumps(metadata)})
  for name, message in [('edge', 'compiled for the Edge TPU'), ('own', 'an export of `ppn export`'),
                        ('none', 'no TFLite file at')]:
    with pytest.raises(InputError, match=message):
      read_weights(tmp_path / f'{name}.tflite')
  (tmp_path / 'text.tflite').write_text('not a flatbuffer')
  (tmp_path / 'empty.tflite').write_bytes(b'')
  for name, message in [('text.tflite', 'not a TFLite file'), ('empty.tflite', 'empty')]:
    with pytest.raises(InputError, match=message):
      read_weights(tmp_path / name)


@pytest.mark.parametrize('name', ['x.TFLITE', 'x.bin', 'detect'])
def test_files_are_known_by_their_contents(tmp_path, name):
  write_classifier(tmp_path / name)
  assert len(read_weights(tmp_path / name).tensors) == 5 * 27


def test_a_missing_package_is_named(tmp_path, monkeypatch):
  write_classifier(tmp_path / 'x.tflite')
  monkeypatch.setitem(sys.modules, 'tflite', None)
  with pytest.raises(InputError, match=r'needs package tflite; pip install .*\[tflite_import\]'):
    read_weights(tmp_path / 'x.tflite')


def small(path):
  """Writes a network of two layers, for damage."""
  writer = TFLiteWriter('INT8')
  image = writer.image(8)
  x = writer.layer('a', image, 4, side=3, stride=2, name='a')
  x = writer.layer('b', x, 0, side=3, depthwise=True, name='b')
  writer.operation('TFLite_Detection_PostProcess', [x, x, x], [writer.tensor('o', (1, 4))],
                   custom=bytes(flexbuffers.Dumps({'num_classes': 4, 'y_scale': 10.0})))
  return writer.write(path, [image], [x], {'labels.txt': 'a\nb\n'})


@pytest.mark.slow
def test_damage_is_an_input_error_or_another_value(tmp_path):
  """A flatbuffer has no checksum: damage may go unnoticed, but must not raise anything else."""
  path, choose = tmp_path / 'x.tflite', random.Random(0)
  whole = small(path).read_bytes()
  changed = [whole[:length] for length in range(0, len(whole), 7)]
  for at in range(len(whole)):
    changed.append(whole[:at] + bytes([whole[at] ^ 1 << choose.randrange(8)]) + whole[at + 1:])
  rejected = 0
  for content in changed:
    path.write_bytes(content)
    try:
      read_weights(path)
    except InputError as e:
      rejected += 1
      assert '\n' not in str(e)
  assert len(changed) / 10 < rejected < len(changed)


@pytest.mark.parametrize('at', [0, 60, 200])
def test_damage_of_a_detector(tmp_path, at):
  """Bytes of offsets and shapes of a whole detector, of which the small file has few kinds."""
  path, choose = tmp_path / 'x.tflite', random.Random(at)
  write_ssd(path, size=96)
  whole = bytearray(path.read_bytes())
  for _ in range(15):
    content = bytearray(whole)
    for _ in range(20):
      content[choose.randrange(len(whole) // 4 if at else 400)] ^= 1 << choose.randrange(8)
    content[4:8] = b'TFL3'
    path.write_bytes(content)
    try:
      file = read_weights(path)
      importer.import_backbone(file, shapes_of(**{'backbone.depth_multiplier': 0.25}))
    except InputError as e:
      assert '\n' not in str(e)


def test_shapes_that_a_file_cannot_hold(tmp_path):
  writer = TFLiteWriter('UINT8')
  image = writer.image(8)
  writer.tensor('huge', (2**15, 2**15, 4), 'FLOAT32', np.zeros(1, np.float32))
  writer.write(tmp_path / 'x.tflite', [image], [image])
  with pytest.raises(InputError, match='damaged: huge is declared as an array'):
    read_weights(tmp_path / 'x.tflite')


@pytest.mark.parametrize('name, description, size, count', [
    ('ssd_mobilenet_v1_0.75_coco_quant', 'an SSD detector of 90 classes and a background', 300,
     199),
    ('mobilenet_v1_1.0_224_quant_embedding_extractor', 'an extractor of features', 224, 135),
    ('mobilenet_v1_0.5_160_quant', 'a classifier of 1,001 classes', 160, 135)])
def test_real_files(shared, name, description, size, count):
  file = read_weights(shared / f'weights/{name}.tflite')
  assert file.description.startswith(description) and file.image_size == size
  assert len(file.tensors) == count


def test_the_real_detector_fits_the_reference_config(shared):
  file = read_weights(shared / 'weights/ssd_mobilenet_v1_0.75_coco_quant.tflite')
  like = shapes_of(ssd, **{'backbone.depth_multiplier': 0.75, 'neck.depths': (384, 192, 192, 96)})
  assert importer.import_detector(file, like).report.matched == 199
  line, = compare(file.postprocessing, placed()[0], {})
  assert line.startswith('anchors: 1,917, equal to those of the config up to 0.0032')
  with pytest.raises(InputError, match='classifier of a network, without its backbone'):
    importer.import_backbone(read_weights(
        shared / 'weights/mobilenet_v1_1.0_224_quant_head_layers.tflite'), like)
