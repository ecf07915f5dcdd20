"""Base of sources whose records hold an image file and its boxes in 0 to 1."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from ppn_jax.data.sources.annotations import (
  AnnotatedImages,
  AnnotationTable,
  Images,
  check_boxes,
  fill_in_sizes,
)


class Record(NamedTuple):
  """Contents of a record with N boxes."""
  image: bytes  # The image file.
  boxes: np.ndarray  # f32 [N, 4], [ymin, xmin, ymax, xmax] in 0 to 1.
  labels: np.ndarray  # i64 [N].
  crowd: np.ndarray  # bool [N].
  areas: np.ndarray | None  # f64 [N], in pixels.
  image_id: int | None
  file_name: str
  size: tuple[int, int] | None  # (height, width) in pixels of the original image.


# Stands for a record that cannot be read.
NOTHING = Record(b'', np.zeros((0, 4), np.float32), np.zeros(0, np.int64), np.zeros(0, bool),
                 np.zeros(0), None, '', None)


class RecordImages(AnnotatedImages):
  """Base of sources that take the annotations from the records themselves."""

  def _take(self, read: Sequence[Record], ids: np.ndarray, files: Sequence[str], *,
            on_bad_box: str, duplicates: str, unreadable: Mapping[int, str],
            notes: Sequence[str] = ()) -> None:
    """Takes the annotations of a data set, after sub-classes have set `categories`.

    Args:
      read: N records. All or none of those with boxes have areas.
      ids: i64 [N], unique.
      files: The place of each record, for messages.
      on_bad_box, duplicates: Options of the source.
      unreadable: Record -> reason why it cannot be read.
      notes: Further lines for a report.
    """
    sizes = fill_in_sizes([record.size for record in read], unreadable)
    images = Images(ids, [record.file_name for record in read], files, sizes)
    owners = np.repeat(np.arange(len(read)), [len(record.labels) for record in read])
    corners = np.concatenate([record.boxes for record in read]).astype(np.float64)
    with np.errstate(invalid='ignore', over='ignore'):
      ymin, xmin, ymax, xmax = corners.T
      bboxes = np.stack([xmin, ymin, xmax - xmin, ymax - ymin], axis=-1)
      bboxes *= sizes[owners][:, [1, 0, 1, 0]]
    boxes, findings = check_boxes(
        bboxes, np.zeros(len(bboxes), int), owners, images, on_bad_box=on_bad_box,
        show=lambda i: f'box {corners[i].tolist()} (ymin, xmin, ymax, xmax)')

    def column(field: str) -> np.ndarray:
      return np.concatenate([getattr(record, field) for record in read])[boxes.rows]

    areas = boxes.bboxes[:, 2:].prod(axis=-1)
    if all(record.areas is not None for record in read):
      cut = (boxes.bboxes != bboxes[boxes.rows]).any(axis=-1)
      areas = np.where(cut, np.minimum(column('areas'), areas), column('areas'))
    table = AnnotationTable(images, boxes, column('labels').astype(np.int32), column('crowd'),
                            areas)
    self._set_data(table, findings, duplicates=duplicates, no_boxes='without objects',
                   unreadable=dict(sorted(unreadable.items())), notes=notes)
