"""SSD's default boxes (SSD, section 2.2, "Choosing scales and aspect ratios for default boxes")."""

import itertools
from collections.abc import Sequence

import numpy as np

from ppn_jax.detection.frame import ImageSize, sides_of
from ppn_jax.detection.structures import Anchors
from ppn_jax.errors import InputError


def ssd_anchors(grid_sizes: Sequence[tuple[int, int]], image_size: ImageSize = 1, *,
                min_scale: float = 0.15, max_scale: float = 0.95,
                aspect_ratios: Sequence[float] = (1.0, 2.0, 0.5, 3.0, 0.3333),
                reduce_lowest_level: bool = False) -> Anchors:
  """Places default boxes on every cell of every pyramid level.

  Level i of L has scale s_i = min + (max - min) i / (L - 1), and s_L = 1. A cell carries one
  box of scale s_i for each aspect ratio (width over height) and a square one of scale
  sqrt(s_i s_{i+1}). A box of scale s and ratio r is s sqrt(r) wide and s / sqrt(r) high, in units
  of the input's shorter side, so that ratios are those of pixels. Boxes are centred on the cells of
  the actual grid, whatever the nominal stride.

  Args:
    grid_sizes: (rows, columns) of each level, finest first.
    image_size: of the network's input; only its aspect ratio counts.
    min_scale, max_scale: side of the square box of the first and last level, 0 to 1 of the shorter
      side of the network's input.
    aspect_ratios: width over height, in the order in which the box head emits them.
    reduce_lowest_level: whether the finest level has three boxes only, as in vanilla SSD: a square
      one of scale 0.1, and ratios 2 and 1/2 of scale s_0.

  Returns:
    Anchors in order of level, row, column and shape; not clipped to the image. The float32
    arithmetic follows the reference's order, so they equal its anchors in every bit.

  Raises:
    InputError: If not 0 < min_scale <= max_scale <= 1, a ratio is not positive, or there is no
      level.
  """
  shapes = _shapes_by_level(len(grid_sizes), min_scale, max_scale, aspect_ratios,
                            reduce_lowest_level)
  sides = np.float32(sides_of(image_size))
  levels = [_tile(grid, scales, ratios, sides.min() / sides)
            for grid, (scales, ratios) in zip(grid_sizes, shapes, strict=True)]
  level = np.repeat(np.arange(len(levels), dtype=np.int32), [len(b) for b in levels])
  return Anchors(np.concatenate(levels), level)


def anchors_per_cell(anchors: Anchors, grid_sizes: Sequence[tuple[int, int]]) -> tuple[int, ...]:
  """Counts the anchors of a cell of each level, finest first."""
  count = np.bincount(anchors.level, minlength=len(grid_sizes))
  return tuple(int(n) // (rows * columns)
               for n, (rows, columns) in zip(count, grid_sizes, strict=True))


def _shapes_by_level(num_levels, min_scale, max_scale, aspect_ratios, reduce_lowest_level):
  """Returns (scales, ratios) of the boxes on one cell of each level, as float32 arrays."""
  if num_levels < 1:
    raise InputError('anchors need at least one pyramid level, but there is none')
  if not 0 < min_scale <= max_scale <= 1:
    raise InputError(f'anchors: min_scale={min_scale} and max_scale={max_scale} must satisfy '
                     '0 < min_scale <= max_scale <= 1')
  if not aspect_ratios or not all(isinstance(r, (int, float)) and r > 0 for r in aspect_ratios):
    raise InputError(f'anchors: aspect_ratios={tuple(aspect_ratios)} must be positive numbers')
  # The reference's options pass through protobuf's float32, then Python computes in float64.
  low, high = float(np.float32(min_scale)), float(np.float32(max_scale))
  ratios = [float(np.float32(r)) for r in aspect_ratios]
  scales = [low + (high - low) * i / max(num_levels - 1, 1) for i in range(num_levels)] + [1.0]
  shapes = []
  for i, (scale, coarser) in enumerate(itertools.pairwise(scales)):
    if i == 0 and reduce_lowest_level:
      level = ([0.1, scale, scale], [1.0, 2.0, 0.5])
    else:
      level = ([scale] * len(ratios) + [np.sqrt(scale * coarser)], [*ratios, 1.0])
    shapes.append(tuple(np.asarray(values, np.float32) for values in level))
  return shapes


def _tile(grid: tuple[int, int], scales: np.ndarray, ratios: np.ndarray, unit: np.ndarray
          ) -> np.ndarray:
  """Returns the boxes of one grid, float32 [rows * columns * shapes, 4].

  Scales are in units of the shorter side, which is the share `unit` [2] of the height and width.
  """
  root = np.sqrt(ratios)
  height, width = scales / root * unit[0], scales * root * unit[1]
  centers = []
  for cells in grid:
    step = np.float32(1 / cells)
    centers.append(np.arange(cells, dtype=np.float32) * step + np.float32(0.5 / cells))
  y, x = centers[0][:, None, None], centers[1][None, :, None]
  corners = (y - height / 2, x - width / 2, y + height / 2, x + width / 2)
  shape = (*grid, len(scales))
  return np.stack([np.broadcast_to(c, shape) for c in corners], axis=-1).reshape(-1, 4)
