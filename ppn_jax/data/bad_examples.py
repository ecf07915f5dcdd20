"""Policy for images that cannot be read: stop, or continue without a few."""

import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from ppn_jax.data.checks import MAX_BAD_SHARE, check_number, check_on_bad_example
from ppn_jax.data.source import Source, evenly_spaced, known_unreadable
from ppn_jax.detection.structures import Example
from ppn_jax.errors import InputError, StoreError, is_outage


class BadExamples:
  """Decides whether to continue after an unreadable example, and records each once. Thread-safe.

  Args:
    what: Name of the data set, for messages.
    num_images: Number of images of the data set.
    policy: 'raise', or 'skip': in training another example takes the place of a bad one, in
      evaluation its image counts as one without detections.
    most: Largest share of the images that 'skip' accepts, 0 to 1. Unless it is 0, one always may be
      skipped, so that a small data set can have a damaged image.

  Raises:
    InputError: If an option is outside its range.
  """

  def __init__(self, what: str, num_images: int, policy: str = 'raise',
               most: float = MAX_BAD_SHARE):
    check_on_bad_example(policy)
    check_number('data.max_bad_share', most, 0, 1)
    self._what, self._num_images, self._policy, self._most = what, num_images, policy, most
    self._reasons: dict[str, None] = {}  # A set that keeps its order.
    self._reported = 0
    self._lock = threading.Lock()

  @property
  def skips(self) -> bool:
    """Whether other examples may take the place of bad ones."""
    return self._policy == 'skip'

  def record(self, error: InputError) -> None:
    """Records an example that could not be read.

    Raises:
      InputError: `error` itself if the policy is 'raise'; otherwise if too many are bad, with the
        first reason.
      StoreError: If the disk cannot be read at the moment, for which the example is not to blame.
    """
    # A missing permission concerns one file, and a damaged image can use up the memory.
    if is_outage(error) and not isinstance(error.__cause__, (PermissionError, MemoryError)):
      raise StoreError(str(error)) from error
    if self._policy == 'raise':
      raise error
    with self._lock:
      self._reasons.setdefault(str(error))
      count = len(self._reasons)
    if count > max(self._most * self._num_images, self._most > 0):
      first = next(iter(self._reasons))
      raise InputError(
          f'{self._what}: {count} of {self._num_images:,} examples cannot be read, which is more '
          f'than data.max_bad_share={self._most} allows; the first: {first}') from error

  def record_known(self, source: Source) -> None:
    """Records the images that a source found to be unreadable when it was built.

    Raises:
      InputError: As `record`.
    """
    for _, reason in known_unreadable(source):
      self.record(InputError(reason))

  def new_reasons(self) -> list[str]:
    """Returns the reasons since the last call; each names its file."""
    with self._lock:
      reasons = list(self._reasons)[self._reported:]
      self._reported += len(reasons)
    return reasons


def evenly_spaced_examples(source: Source, count: int, record: Callable[[InputError], None]
                           ) -> Iterator[tuple[int, Example]]:
  """Yields evenly spaced examples; one that cannot be read is replaced by the next unused one.

  Args:
    source: The data set.
    count: The largest number of examples.
    record: Called with the error for each example that cannot be read; may raise.

  Yields:
    (index, example), fewer than `count` if no more can be read.
  """
  taken = set(evenly_spaced(len(source), count))
  for start in sorted(taken):
    index = start
    while index is not None:
      try:
        example = source[index]
        yield index, example._replace(image=np.asarray(example.image))
        break
      except InputError as e:
        record(e)
      index = next((i % len(source) for i in range(index + 1, index + len(source))
                    if i % len(source) not in taken), None)
      taken.add(index)


class WithSubstitutes:
  """Source in which the next example replaces one that cannot be read, if `bad` accepts it.

  Args:
    source: The source of the images.
    bad: Decides and records.
  """

  def __init__(self, source: Source, bad: BadExamples):
    self._source, self._bad = source, bad
    self.categories, self.max_boxes = source.categories, source.max_boxes

  def __len__(self) -> int:
    return len(self._source)

  def __getitem__(self, index: int) -> Example:
    for _ in range(len(self)):
      try:
        example = self._source[index]
        return example._replace(image=np.asarray(example.image))
      except InputError as e:
        self._bad.record(e)
      index = (index + 1) % len(self)
    raise InputError(f'none of the {len(self):,} images can be read')

  def ground_truth(self) -> dict[str, Any]:
    """Returns the ground truth of the source."""
    return self._source.ground_truth()
