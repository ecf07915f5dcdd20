"""Groups of images within a batch: batch statistics or the loss can be computed within groups.

The reference trains on replicas that see only their own images (docs/reference.md 9). A group is a
fixed number of neighbouring images, on whatever devices they are, so a run means the same on any
number of devices. Where no group crosses the border of a device, nothing is exchanged.
"""

from ppn_jax.errors import InputError


def check_group_size(name: str, group_size: int, num_images: int = 0) -> None:
  """Raises InputError unless batches of `num_images` fall into groups of `group_size`.

  Args:
    name: of the option, for the message.
    group_size: images in a group; 0 makes the batch one.
    num_images: in a batch; 0 if it is not known yet.
  """
  if not isinstance(group_size, int) or isinstance(group_size, bool) or group_size < 0:
    raise InputError(f'{name}={group_size!r} is not a whole number of images, or 0 for all')
  if group_size and num_images % group_size:
    raise InputError(f'{name}={group_size} does not divide the {num_images} images that a '
                     'gradient is computed of at a time; take a divisor, or 0 for all')


def num_groups(name: str, group_size: int, num_images: int) -> int:
  """How many groups a batch falls into.

  Fewer images than a group, which tracing for shapes has, are one.

  Args:
    name, group_size, num_images: see `check_group_size`, which this calls.
  """
  if not group_size or num_images < group_size:
    return 1
  check_group_size(name, group_size, num_images)
  return num_images // group_size
