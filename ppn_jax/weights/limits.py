"""Limits the memory that the arrays in a file of weights may take.

A few bytes can declare an array of any shape and fill it with one repeated value, with values that
were never written, or with a compressed run of zeros. Trained weights take about as much memory as
the file has bytes. The sizes of all arrays are therefore added up before the first is read.
"""

import math

from ppn_jax.errors import InputError

# Bytes of arrays allowed for each byte of the file: a protocol buffer stores small integers in 1
# byte, an array in up to 8.
_FACTOR = 8
# Bytes allowed for any file, however small, because graphs contain constants of one repeated value.
_FREE = 2**24
_MOST_AXES = 32  # NumPy's, before version 2.


class Limit:
  """Memory limit for the arrays of one file.

  Args:
    where: the file, for messages.
    file_size: its size in bytes.
  """

  def __init__(self, where: str, file_size: int):
    self._where, self._file_size = where, file_size
    self._left = _FREE + _FACTOR * file_size

  def claim(self, name: str, shape: tuple[int, ...], itemsize: int) -> None:
    """Counts an array that is about to be read.

    Args:
      name: name of the array, for the message.
      shape: declared shape. An axis of length 0 counts as 1, since the other axes must be possible
        too.
      itemsize: bytes per element.

    Raises:
      InputError: If it has too many axes, or exceeds the limit together with the arrays before it.
    """
    self._left -= math.prod(max(side, 1) for side in shape) * itemsize
    if len(shape) > _MOST_AXES or self._left < 0:
      declared = str(list(shape)) if len(shape) < 10 else f'with {len(shape)} axes'
      raise InputError(f'{self._where}: damaged: {name} is declared as an array {declared} of '
                       f'{itemsize} bytes per element, which a file of {self._file_size:,} bytes '
                       'cannot hold')
