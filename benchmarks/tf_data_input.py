"""Implements the host input pipeline with tf.data; input.py runs it in a separate environment.

  python tf_data_input.py JPEG_FOLDER ANNOTATIONS BATCH SIDE CORES SECONDS

Reads COCO's JSON, decodes, crops as SSD does, flips, resizes with antialiasing and batches uint8
[B, S, S, 3] with padded boxes. Prints images per second.
"""

import json
import sys
import time

import numpy as np
import tensorflow as tf

COVERAGES = [0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 1.0]


def examples(folder: str, annotations: str) -> tuple[list[str], list[list]]:
  with open(annotations) as f:
    content = json.load(f)
  sizes = {image['id']: image for image in content['images']}
  boxes = {key: [] for key in sizes}
  for a in content['annotations']:
    image = sizes[a['image_id']]
    x, y, w, h = a['bbox']
    boxes[a['image_id']].append([y / image['height'], x / image['width'],
                                 (y + h) / image['height'], (x + w) / image['width']])
  return ([f'{folder}/{image["file_name"]}' for image in sizes.values()],
          [np.clip(np.float32(boxes[key]).reshape(-1, 4), 0, 1) for key in sizes])


def crop(image_bytes: tf.Tensor, boxes: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
  """Returns a random crop, decoded without the pixels outside of it, and its boxes."""
  shape = tf.image.extract_jpeg_shape(image_bytes)
  coverage = tf.gather(COVERAGES, tf.random.uniform([], 0, len(COVERAGES), tf.int32))

  def whole():
    return tf.image.decode_jpeg(image_bytes, channels=3, dct_method='INTEGER_FAST'), boxes

  def part():
    begin, size, frame = tf.image.sample_distorted_bounding_box(
        shape, boxes[None], min_object_covered=coverage, aspect_ratio_range=(0.5, 2.0),
        area_range=(0.1, 1.0), max_attempts=100, use_image_if_no_bounding_boxes=True)
    window = tf.concat([begin[:2], size[:2]], 0)
    image = tf.image.decode_and_crop_jpeg(image_bytes, window, channels=3,
                                          dct_method='INTEGER_FAST')
    frame = frame[0, 0]
    origin, sides = tf.tile(frame[:2], [2]), tf.tile(frame[2:] - frame[:2], [2])
    moved = (boxes - origin) / sides
    inside = tf.clip_by_value(moved, 0.0, 1.0)
    area = lambda b: (b[:, 2] - b[:, 0]) * (b[:, 3] - b[:, 1])
    share = tf.math.divide_no_nan(area(inside), area(moved))
    return image, tf.boolean_mask(inside, (share > 0) & (share >= coverage))

  return tf.cond(tf.random.uniform([]) < 0.15, whole, part)


def flip(image: tf.Tensor, boxes: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
  y0, x0, y1, x1 = tf.unstack(boxes, axis=1)
  return tf.cond(tf.random.uniform([]) < 0.5,
                 lambda: (tf.image.flip_left_right(image), tf.stack([y0, 1 - x1, y1, 1 - x0], 1)),
                 lambda: (image, boxes))


def main(folder: str, annotations: str, batch: int, side: int, cores: int,
         seconds: float) -> float:
  names, boxes = examples(folder, annotations)
  ragged = tf.ragged.constant([b.tolist() for b in boxes], ragged_rank=1, inner_shape=(4,))
  most = max(map(len, boxes))

  def load(name, ground_truth):
    image, ground_truth = crop(tf.io.read_file(name), ground_truth)
    # Flipped after resizing, as in ppn_jax.
    image = tf.image.resize(image, (side, side), antialias=True)
    image, ground_truth = flip(tf.cast(tf.round(image), tf.uint8), ground_truth)
    return image, tf.pad(ground_truth, [[0, most - tf.shape(ground_truth)[0]], [0, 0]])

  options = tf.data.Options()
  options.threading.private_threadpool_size = cores
  options.deterministic = True
  data = tf.data.Dataset.from_tensor_slices((names, ragged)).map(
      lambda name, boxes: (name, boxes.to_tensor() if isinstance(boxes, tf.RaggedTensor)
                           else boxes))
  data = (data.shuffle(len(names), seed=0).repeat().map(load, num_parallel_calls=cores)
          .batch(batch, drop_remainder=True).prefetch(2).with_options(options))
  batches = iter(data)
  for _ in range(2):
    next(batches)
  count, started = 0, time.perf_counter()
  while time.perf_counter() - started < seconds:
    count += len(next(batches)[0])
  return count / (time.perf_counter() - started)


if __name__ == '__main__':
  folder, annotations, *numbers = sys.argv[1:]
  batch, side, cores = map(int, numbers[:3])
  print(main(folder, annotations, batch, side, cores, float(numbers[3])))
