"""Instruction sets that a processor reports."""

import pytest

from ppn_jax import processor


@pytest.mark.parametrize('text, expected', [
    ('processor: 0\nflags\t\t: fpu avx512f avx512_bf16 vnni\n', True),
    ('flags\t\t: fpu amx_bf16 amx_tile\n', True), ('flags\t\t: fpu avx2 bf16x\n', False),
    ('Features\t: fp asimd bf16\n', False), ('', False)])
def test_bfloat16(monkeypatch, tmp_path, text, expected):
  (tmp_path / 'cpuinfo').write_text(text)
  monkeypatch.setattr(processor, '_CPU_INFO', tmp_path / 'cpuinfo')
  processor.processor_flags.cache_clear()
  try:
    assert processor.multiplies_bfloat16() is expected
  finally:
    processor.processor_flags.cache_clear()
