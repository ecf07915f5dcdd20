"""What the processor of this machine reports about itself."""

import functools
import pathlib
import platform

_CPU_INFO = pathlib.Path('/proc/cpuinfo')
# Instructions that multiply bfloat16 numbers and add up in float32: Intel since Cooper Lake and
# Sapphire Rapids, AMD since Zen 4.
_BFLOAT16_FLAGS = frozenset(('avx512_bf16', 'amx_bf16'))


@functools.cache
def processor_flags() -> str:
  """Returns the instruction sets of the processor, as Linux lists them, or else its name."""
  try:
    lines = _CPU_INFO.read_text().splitlines()
  except OSError:
    lines = []
  flags = next((s for s in lines if s.startswith(('flags', 'Features'))), '')
  return flags or platform.processor()


def multiplies_bfloat16() -> bool:
  """Returns whether the processor has matrix instructions for bfloat16."""
  return not _BFLOAT16_FLAGS.isdisjoint(processor_flags().split())
