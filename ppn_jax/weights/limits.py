"""How much memory the arrays of a file of weights may take.

A few bytes can promise any shape, and fill it with one repeated value, with what was never written,
or with a compressed run of zeros. Trained weights are none of these: they take about as much memory
as the file has bytes. So arrays are added up for the whole file before the first is filled.
"""

import math

from ppn_jax.errors import InputError

# Bytes of arrays for a byte of the file: whole numbers take 8 where a protocol buffer has 1.
_FACTOR = 8
# Bytes that any file may take, however small: graphs hold constants of one repeated value.
_FREE = 2**24
_MOST_AXES = 32  # NumPy's, before version 2.


class Limit:
  """Adds up what is asked of one file.

  Args:
    where: the file, for messages.
    file_size: its size in bytes.
  """

  def __init__(self, where: str, file_size: int):
    self._where, self._file_size = where, file_size
    self._left = _FREE + _FACTOR * file_size

  def claim(self, name: str, shape: tuple[int, ...], itemsize: int) -> None:
    """Counts an array that is to be filled.

    Args:
      name: of the array, for the message.
      shape: as declared; an axis of length 0 counts as 1, since the others must be possible too.
      itemsize: bytes of an element.

    Raises:
      InputError: It has too many axes, or with those before it more bytes than the file may take.
    """
    self._left -= math.prod(max(side, 1) for side in shape) * itemsize
    if len(shape) > _MOST_AXES or self._left < 0:
      declared = str(list(shape)) if len(shape) < 10 else f'with {len(shape)} axes'
      raise InputError(f'{self._where}: damaged: {name} is declared as an array {declared} of '
                       f'{itemsize} bytes an element, which a file of {self._file_size:,} bytes '
                       'cannot hold')
