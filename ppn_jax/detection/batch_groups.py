"""Groups of images within a batch, over which batch statistics or the loss can be computed.

The reference trains on replicas that see only their own images (docs/reference.md 9). A group is a
fixed number of neighbouring images, on whatever devices they are, so a run means the same on any
number of devices. Where no group crosses the border of a device, nothing is exchanged.
"""

from ppn_jax.errors import InputError


def check_group_size(name: str, group_size: int, num_images: int = 0) -> None:
  """Checks that batches of `num_images` can be split into groups of `group_size`.

  Args:
    name: the option's name, for the message.
    group_size: images in a group; 0 makes the whole batch one group.
    num_images: images in a batch; 0 if it is not known yet.

  Raises:
    InputError: If `group_size` is not a whole number, or does not divide `num_images`.
  """
  if not isinstance(group_size, int) or isinstance(group_size, bool) or group_size < 0:
    raise InputError(f'{name}={group_size!r} is not a whole number of images, or 0 for all')
  if group_size and num_images % group_size:
    raise InputError(f'{name}={group_size} does not divide the {num_images} images that a '
                     'gradient is computed of at a time; use a divisor, or 0 for all')


def num_groups(name: str, group_size: int, num_images: int) -> int:
  """Returns the number of groups in a batch of `num_images`.

  Fewer images than `group_size`, as when shapes are traced, form one group.

  Args:
    name, group_size, num_images: see `check_group_size`, which this calls.
  """
  if not group_size or num_images < group_size:
    return 1
  check_group_size(name, group_size, num_images)
  return num_images // group_size
