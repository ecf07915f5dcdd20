"""What to do about images that turn out to be damaged: stop, or go on without a few."""

import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from ppn_jax.data.checks import check_number, check_on_bad_example
from ppn_jax.data.source import Source, spread
from ppn_jax.detection.structures import Example
from ppn_jax.errors import InputError, StoreError, is_outage


class BadExamples:
  """Decides about examples that cannot be read, and remembers each once. Threads may share it.

  Args:
    what: the data set, for messages.
    num_images: of the data set.
    policy: 'raise', or 'skip': another example takes the place of a bad one in training; in
      evaluation its image counts as one in which nothing was found.
    most: share of the images that may be bad before 'skip' stops too, 0 to 1.

  Raises:
    InputError: an option outside its range.
  """

  def __init__(self, what: str, num_images: int, policy: str = 'raise', most: float = 0.01):
    check_on_bad_example(policy)
    check_number('data.max_bad_share', most, 0, 1)
    self._what, self._num_images, self._policy, self._most = what, num_images, policy, most
    self._reasons: dict[str, None] = {}  # A set that keeps its order.
    self._told = 0
    self._lock = threading.Lock()

  def note(self, error: InputError) -> None:
    """Takes note of an example that could not be read.

    Raises:
      InputError: `error` itself if the policy is 'raise'; or too many are bad, with the first.
      StoreError: the disk cannot be read now, which says nothing of the example.
    """
    # A missing permission concerns a file; memory runs out over damaged images too.
    if is_outage(error) and not isinstance(error.__cause__, (PermissionError, MemoryError)):
      raise StoreError(str(error)) from error
    if self._policy == 'raise':
      raise error
    with self._lock:
      self._reasons.setdefault(str(error))
      count = len(self._reasons)
    if count > self._most * self._num_images:
      first = next(iter(self._reasons))
      raise InputError(
          f'{self._what}: {count} of {self._num_images:,} examples cannot be read, which is more '
          f'than data.max_bad_share={self._most} allows; the first: {first}') from error

  def note_known(self, source: Source) -> None:
    """Takes note of the images that a source has found to be unreadable when it was made.

    Raises:
      InputError: see `note`.
    """
    contents = getattr(source, 'contents', None)
    for _, reason in contents.unreadable if contents is not None else ():
      self.note(InputError(reason))

  def news(self) -> list[str]:
    """The reasons, each naming its file, that this has not returned before."""
    with self._lock:
      reasons = list(self._reasons)[self._told:]
      self._told += len(reasons)
    return reasons


def spread_examples(source: Source, count: int, note: Callable[[InputError], None]
                    ) -> Iterator[tuple[int, Example]]:
  """Yields examples evenly apart; where one cannot be read, the next one that has not come yet.

  Args:
    source: the data set.
    count: how many, at most.
    note: is told of each that cannot be read, and may raise.

  Yields:
    (index, example), fewer than `count` if the source has no more that can be read.
  """
  taken = set(spread(len(source), count))
  for start in sorted(taken):
    index = start
    while index is not None:
      try:
        example = source[index]
        yield index, example._replace(image=np.asarray(example.image))
        break
      except InputError as e:
        note(e)
      index = next((i % len(source) for i in range(index + 1, index + len(source))
                    if i % len(source) not in taken), None)
      taken.add(index)


class WithSubstitutes:
  """A source in which the next example stands for one that cannot be read, where `bad` lets it.

  Args:
    source: of the images.
    bad: decides.
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
        self._bad.note(e)
      index = (index + 1) % len(self)
    raise InputError(f'none of the {len(self):,} images can be read')

  def ground_truth(self) -> dict[str, Any]:
    """The source's."""
    return self._source.ground_truth()
