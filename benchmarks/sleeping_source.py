"""Source of benchmarks/workers.py, in a module of its own, which worker processes can import."""

import time

import numpy as np

from ppn_jax.detection.structures import Category, Example


class Sleeping:
  """Source whose images take a constant time and no processor."""
  categories, max_boxes = (Category(1, 'thing'),), 8

  def __init__(self, image_size: int, seconds: float):
    self.image = np.full((image_size, image_size, 3), 128, np.uint8)
    self.seconds = seconds
    self.boxes = np.tile(np.float32([0.1, 0.2, 0.5, 0.6]), (8, 1))

  def __len__(self) -> int:
    return 100_000

  def __getitem__(self, index: int) -> Example:
    time.sleep(self.seconds)
    return Example(self.image, self.boxes, np.zeros(8, np.int32), np.zeros(8, bool), index,
                   self.image.shape[:2])
