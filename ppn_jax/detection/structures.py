"""Arrays that cross module borders, each with its shape and meaning.

Dimension letters, the same everywhere:

  B images of a batch               C classes, background not counted
  G boxes of an image, padded       K detections of an image
  A anchors of an image             S side of the network's input in pixels
  L pyramid levels                  [S, S] are its height and width where they differ

One box convention: `[ymin, xmin, ymax, xmax]`, float32, 0 to 1 of the image. Every padded axis has
a `valid` array beside it; entries that are not valid are zero and must be ignored. Fields are NumPy
arrays on the host and JAX arrays on the device.
"""

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
  import jax

  Array = np.ndarray | jax.Array
else:
  Array = Any  # Input workers import this module and must stay free of JAX.


class Category(NamedTuple):
  """Class of a data set. Label k is the k-th category in order of `id`."""
  id: int  # The data set's own id, which may start anywhere and have gaps; COCO rows carry it.
  name: str


class Example(NamedTuple):
  """Image with its ground truth, on the host."""
  image: Array  # u8 [H, W, 3], RGB; a `LazyImage` inside the loader.
  boxes: Array  # f32 [N, 4], relative to `image` as it is now; a transform changes both.
  labels: Array  # i32 [N], 0 .. C-1.
  crowd: Array  # bool [N], a group of objects, or an object too difficult to require.
  image_id: int
  size: tuple[int, int]  # (height, width) of the original image in pixels.


def unlabelled_example(image: np.ndarray) -> Example:
  """Returns an Example of an image u8 [H, W, 3] without boxes."""
  return Example(image, np.zeros((0, 4), np.float32), np.zeros(0, np.int32), np.zeros(0, bool), 0,
                 image.shape[:2])


class GroundTruth(NamedTuple):
  """Annotated boxes of a batch, padded to G per image."""
  boxes: Array  # f32 [B, G, 4].
  labels: Array  # i32 [B, G].
  crowd: Array  # bool [B, G].
  valid: Array  # bool [B, G].


class Batch(NamedTuple):
  """Input of one step."""
  images: Array  # u8 [B, S, S, 3].
  ground_truth: GroundTruth
  image_id: Array  # i64 on the host, [B].
  size: Array  # i32 [B, 2], (height, width) of the original images in pixels.
  valid: Array  # bool [B]; False pads the last evaluation batch.


class Anchors(NamedTuple):
  """Default boxes of a detector: constants, NumPy."""
  boxes: Array  # f32 [A, 4], not clipped to the image.
  level: Array  # i32 [A], the pyramid level that predicts this anchor, 0 the finest.


class Outputs(NamedTuple):
  """Predictions of the network for every anchor."""
  box_codes: Array  # f32 [B, A, 4], (ty, tx, th, tw) of `boxes.encode`.
  class_logits: Array  # f32 [B, A, C], or [B, A, 1 + C] with background first (`ClassLogitsSpec`).


class Targets(NamedTuple):
  """Desired predictions for every anchor."""
  box_codes: Array  # f32 [B, A, 4], zero where not positive.
  labels: Array  # i32 [B, A], zero where not positive.
  positive: Array  # bool [B, A].
  ignored: Array  # bool [B, A], neither positive nor negative: no loss.


class Detections(NamedTuple):
  """Detected objects of each image, best score first."""
  boxes: Array  # f32 [B, K, 4], clipped to the image.
  scores: Array  # f32 [B, K], 0 to 1.
  labels: Array  # i32 [B, K].
  level: Array  # i32 [B, K], the pyramid level whose anchor predicted the box.
  valid: Array  # bool [B, K].
