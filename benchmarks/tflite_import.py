"""Measures imported TFLite files against LiteRT with the same files.

  python benchmarks/tflite_import.py detector --file=detect.tflite --data=../shared/data/coco100 \\
    --pictures=FOLDER
  python benchmarks/tflite_import.py classifier --file=extractor.tflite --head=head.tflite \\
    --images=FOLDER

`detector` scores both on the validation images of a COCO folder, this package in float32 with all
of its boxes and with as many as the runtime has. It compares every box code and class logit with
the runtime's dequantized tensors, and looks for the cause of the difference: each layer is computed
in float32 from the runtime's own input of that layer, and its output compared, in units of the last
place of the runtime's 8 bits. `classifier` compares the classes of photographs. Needs the extra
tflite_import, and ai-edge-litert. Prints JSON.
"""

import argparse
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from ppn_jax.config_files import load_config
from ppn_jax.data.loader import eval_batches, required_boxes
from ppn_jax.data.source import build_source
from ppn_jax.detection.structures import Detections
from ppn_jax.export.formats import load_library
from ppn_jax.jobs.import_tf import config_of, fit_config
from ppn_jax.metrics import coco
from ppn_jax.models.convolution import conv, depthwise_conv
from ppn_jax.models.mobilenet_v1 import MobileNetV1
from ppn_jax.run import build_detector, resolve_classes
from ppn_jax.visualization.drawing import draw_boxes, save_picture
from ppn_jax.weights import importer, labels
from ppn_jax.weights.read import WeightFile, read_weights
from ppn_jax.weights.tflite_file import Graph, read_tflite
from ppn_jax.weights.tflite_layers import LayerGraph

POST = 'TFLite_Detection_PostProcess'


class Runtime:
  """LiteRT's interpreter of a file, without delegates, which would hide tensors.

  Args:
    path: the file.
  """

  def __init__(self, path):
    library = load_library('ai_edge_litert.interpreter', 'tflite')
    self.interpreter = library.Interpreter(
        model_path=str(path), experimental_preserve_all_tensors=True, num_threads=2,
        experimental_op_resolver_type=library.OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES)
    self.interpreter.allocate_tensors()
    self.input, = self.interpreter.get_input_details()

  def __call__(self, values: np.ndarray) -> list[np.ndarray]:
    """Runs the graph on values of the input's own type, [1, ...]; returns its outputs."""
    self.interpreter.set_tensor(self.input['index'], values.astype(self.input['dtype']))
    self.interpreter.invoke()
    return [self.interpreter.get_tensor(output['index'])
            for output in self.interpreter.get_output_details()]

  def real(self, graph: Graph, number: int) -> np.ndarray:
    """Returns a tensor of the last run as float32."""
    values, quantization = self.interpreter.get_tensor(number), graph.tensors[number].quantization
    if quantization is None:
      return values.astype(np.float32)
    return ((values.astype(np.float64) - quantization.zero_point[0]) * quantization.scale[0]
            ).astype(np.float32)


def layer_errors(graph: Graph, layers: LayerGraph, runtime: Runtime) -> list[float]:
  """Returns each layer's largest difference, in units of its output's last place.

  The layer's input is the runtime's, so errors of earlier layers do not count.
  """
  errors = []
  for layer in layers.layers:
    x = runtime.real(graph, layer.operation.inputs[0])
    kernel, convolve = layers.kernel(layer), conv
    if layer.kind == 'depthwise':
      kernel, convolve = kernel.transpose(0, 1, 3, 2), depthwise_conv
    y = convolve(jnp.asarray(x), jnp.asarray(kernel), stride=layer.stride, form='native')
    y = np.asarray(y) + layers.bias(layer)
    quantization = graph.tensors[layer.output].quantization
    low, high = ((end - quantization.zero_point[0]) * quantization.scale[0] for end in (0, 255))
    if layer.operation.options['activation'] == 'RELU6':
      low, high = max(low, 0), min(high, 6)
    expected = np.clip(y, low, high)
    found = runtime.real(graph, layer.output)
    errors.append(float(np.abs(found - expected).max() / quantization.scale[0]))
  return errors


def differences(ours: list[np.ndarray], theirs: list[np.ndarray]) -> dict[str, float]:
  a, b = (np.concatenate([x.ravel() for x in side]) for side in (ours, theirs))
  return {'largest': float(np.abs(a - b).max()), 'mean': float(np.abs(a - b).mean()),
          'deviation_of_theirs': float(b.std()),
          'correlation': float(np.corrcoef(a, b)[0, 1])}


def with_pixels_of(file: WeightFile, layers: LayerGraph) -> WeightFile:
  """Returns weights whose first layer scales pixels as the runtime does: (x - 128) / 128."""
  low, high = layers.pixel_range(layers.layers[0])
  name = next(name for name in file.tensors if name.endswith('MobilenetV1/Conv2d_0/weights'))
  bias = name.replace('weights', 'BatchNorm/beta')
  factor, offset = (high - low) / 2, (high + low) / 2
  kernel = file.tensors[name]
  return file._replace(tensors=file.tensors | {
      name: (kernel * factor).astype(np.float32),
      bias: (file.tensors[bias] + kernel.sum((0, 1, 2)) * offset).astype(np.float32)})


def compare_detector(path: str, data: pathlib.Path, pictures: str, most: int) -> dict:
  file = read_weights(path)
  config, changed = fit_config(load_config(config_of(file)), file)
  columns = importer.class_columns(file)
  categories, _ = labels.detector_categories(columns - 1, None, names=file.labels)
  detector = build_detector(resolve_classes(config, categories))
  like = jax.eval_shape(detector.init, jax.random.key(0))
  graph = read_tflite(path)
  layers = LayerGraph(graph)
  imported = importer.import_detector(file, like)
  variables = imported.variables
  same_pixels = importer.import_detector(with_pixels_of(file, layers), like).variables
  detect, forward = jax.jit(detector.detect), jax.jit(detector.forward)
  source = build_source({'name': 'coco_json', 'images': str(data / 'val2017'),
                         'annotations': str(data / 'annotations/instances_val2017.json')},
                       key='data.eval')
  runtime = Runtime(path)
  post = next(op for op in graph.operations if op.kind == POST)
  logits = graph.producers[post.inputs[1]].inputs[0]
  rows = {'ours': [], 'ours_10': [], 'runtime': []}
  codes = {'ours': ([], []), 'ours_pixels': ([], []), 'runtime': ([], [])}
  units = []
  batches = eval_batches(source, image_size=detector.image_size, batch_size=1,
                         resize=config.data.resize, max_boxes=required_boxes(source))
  for number, batch in enumerate(batches):
    if number == most:
      break
    found = jax.device_get(detect(variables, batch.images))
    boxes, classes, scores, count = runtime(batch.images)
    for name, weights in (('ours', variables), ('ours_pixels', same_pixels)):
      outputs = jax.device_get(forward(weights, batch.images))
      for side, value in zip(codes[name], outputs, strict=True):
        side.append(value)
    for side, tensor in zip(codes['runtime'], (post.inputs[0], logits), strict=True):
      side.append(runtime.real(graph, tensor).reshape(1, len(detector.anchors.boxes), -1))
    if number < 5:
      units.append(layer_errors(graph, layers, runtime))
    k = boxes.shape[1]
    theirs = Detections(boxes, scores, classes.astype(np.int32), np.zeros((1, k), np.int32),
                        np.arange(k)[None] < count[:, None])
    first = Detections(*(value[:, :k] for value in found))
    for name, value in (('ours', found), ('ours_10', first), ('runtime', theirs)):
      rows[name] += coco.to_rows(value, batch.image_id, batch.size, batch.valid, categories)
    if pictures and number < 3:
      names = [c.name for c in categories]
      for name, value in (('ours', first), ('runtime', theirs)):
        shown = value.valid[0] & (value.scores[0] > 0.3)
        save_picture(pathlib.Path(pictures) / f'{number}_{name}.png', draw_boxes(
            batch.images[0], value.boxes[0][shown], value.labels[0][shown], names,
            value.scores[0][shown], min_side=600))
  truth = source.ground_truth()
  ids = {category['id'] for category in truth['categories']}
  scored = {name: coco.score(truth, [row for row in found if row['category_id'] in ids]).metrics
            for name, found in rows.items()}
  units = np.max(units, axis=0)
  worst = int(units.argmax())
  return {
      'file': imported.report.description, 'config': changed, 'images': len(truth['images']),
      'matched': imported.report.matched,
      'scores': {name: {key: metrics[key] for key in ('AP', 'AP50')}
                 for name, metrics in scored.items()},
      'box_codes': differences(codes['ours'][0], codes['runtime'][0]),
      'class_logits': differences(codes['ours'][1], codes['runtime'][1]),
      'box_codes_with_the_pixels_of_the_runtime': differences(
          codes['ours_pixels'][0], codes['runtime'][0]),
      'class_logits_with_the_pixels_of_the_runtime': differences(
          codes['ours_pixels'][1], codes['runtime'][1]),
      'steps_of_8_bits': {'box_codes': graph.tensors[post.inputs[0]].quantization.scale[0],
                          'class_logits': graph.tensors[logits].quantization.scale[0]},
      'layer_by_layer_in_units_of_the_last_place': {
          'largest': float(units.max()), 'median': float(np.median(units)),
          'layer': layers.name(layers.layers[worst]), 'layers': len(units)}}


def compare_classifier(path: str, head: str, folder: pathlib.Path, most: int) -> dict:
  file, graph = read_weights(path), read_tflite(head or path)
  layers = LayerGraph(graph)
  multiplier = fit_config(load_config('ssd_mobilenet_v1_coco_reference'), file)[0].model.backbone
  backbone = MobileNetV1(depth_multiplier=multiplier.depth_multiplier, last_block=13)
  size = file.image_size

  def features(variables, images):
    x = images.astype(jnp.float32) * (2 / 255) - 1
    return jnp.mean(backbone.apply(variables, x, train=False)[32], (1, 2))

  shapes = jax.eval_shape(lambda: backbone.init(
      jax.random.key(0), jnp.zeros((1, size, size, 3)), train=False))
  like = {name: {'backbone': tree} for name, tree in shapes.items()}
  imported = importer.import_backbone(file, like)
  variables = {name: tree['backbone'] for name, tree in imported.variables.items()}
  last = layers.layers[-1]
  kernel, bias = layers.kernel(last)[0, 0], layers.bias(last)
  ours = jax.jit(lambda images: features(variables, images) @ kernel + bias)
  runtimes = [Runtime(path), *([Runtime(head)] if head else [])]
  photographs = sorted(p for p in folder.iterdir() if p.suffix.lower() in ('.jpg', '.jpeg', '.png'))
  same, same_five, count = 0, 0.0, 0
  for photograph in photographs[:most]:
    image = np.asarray(Image.open(photograph).convert('RGB').resize((size, size)))[None]
    values = image
    for runtime in runtimes:
      values = runtime(values.reshape(runtime.input['shape']))[0]
    a, b = np.asarray(ours(image))[0], values.ravel().astype(np.float64)
    best = [np.argsort(-side, kind='stable')[:5] for side in (a, b)]
    # Eight bits tie often: any of the runtime's best classes counts as its first.
    same += int(b[best[0][0]] == b.max())
    fifth = np.sort(b)[-5]
    same_five += np.mean(b[best[0]] >= fifth)
    count += 1
  return {'file': imported.report.description, 'matched': imported.report.matched,
          'photographs': count, 'same_top1': same / count, 'same_top5': same_five / count}


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
  parser.add_argument('what', choices=('detector', 'classifier'))
  parser.add_argument('--file', required=True, help='the .tflite file')
  parser.add_argument('--head', default='', help="a classifier's second file")
  parser.add_argument('--data', type=pathlib.Path, help='folder with COCO annotations and val2017')
  parser.add_argument('--images', type=pathlib.Path, help='folder of photographs')
  parser.add_argument('--most', type=int, default=50, help='number of images')
  parser.add_argument('--pictures', default='', help='folder to draw the first images to')
  args = parser.parse_args()
  result = (compare_detector(args.file, args.data, args.pictures, args.most)
            if args.what == 'detector' else
            compare_classifier(args.file, args.head, args.images, args.most))
  print(json.dumps(result, indent=2))


if __name__ == '__main__':
  main()
