"""Describes the machine that a benchmark runs on, for the JSON that it prints."""

import os
import platform
import subprocess

import jax


def describe() -> dict[str, str | int | float | None]:
  """Returns processor, accelerator and versions, but nothing that identifies the machine."""
  device = jax.devices()[0]
  return {
      'backend': jax.default_backend(),
      'device': device.device_kind,
      'devices': jax.device_count(),
      'cpu': _cpu_model(),
      'cpu_cores': len(os.sched_getaffinity(0)),
      'load_average': _load(),
      'python': platform.python_version(),
      'jax': jax.__version__,
      'commit': _commit(),
  }


def _cpu_model() -> str:
  try:
    with open('/proc/cpuinfo', encoding='utf-8') as file:
      return next(line.split(':', 1)[1].strip() for line in file if line.startswith('model name'))
  except (OSError, StopIteration):
    return platform.processor()


def _load() -> float | None:
  """Returns the load average of the last minute, which includes the benchmark itself."""
  try:
    return round(os.getloadavg()[0], 1)
  except (OSError, AttributeError):
    return None


def _commit() -> str:
  try:
    return subprocess.run(['git', 'describe', '--always', '--dirty'], check=True, text=True,
                          capture_output=True).stdout.strip()
  except (OSError, subprocess.CalledProcessError):
    return 'unknown'
