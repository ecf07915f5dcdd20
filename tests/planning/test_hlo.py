"""Costs read from the text of a compiled program, on snippets in XLA's format."""

import jax
import jax.numpy as jnp
import pytest

from ppn_jax.planning import hlo

TPU = """\
HloModule jit_step, is_scheduled=true, entry_computation_layout={(f32[8,128]{1,0:T(8,128)})->f32[]}

FileNames
1 "step.py"

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[]{:T(128)} parameter(0)
  %b = f32[]{:T(128)} parameter(1)
  ROOT %sum = f32[]{:T(128)} add(%a, %b)
}

%fused (p: bf16[3,5]) -> bf16[3,5] {
  %p = bf16[3,5]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %twice = bf16[3,5]{1,0:T(8,128)(2,1)} add(%p, %p), backend_config={"estimated_cycles":"999"}
}

%body (c: (s32[], f32[8,128])) -> (s32[], f32[8,128]) {
  %c = (s32[]{:T(128)}, f32[8,128]{1,0:T(8,128)S(1)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%c), index=0
  %x = f32[8,128]{1,0:T(8,128)S(1)} get-tuple-element(%c), index=1
  %y = f32[8,128]{1,0:T(8,128)S(1)} negate(%x), backend_config={"estimated_cycles":"7"}
  ROOT %t = (s32[]{:T(128)}, f32[8,128]{1,0:T(8,128)S(1)}) tuple(%i, %y)
}

%condition (c.1: (s32[], f32[8,128])) -> pred[] {
  %c.1 = (s32[]{:T(128)}, f32[8,128]{1,0:T(8,128)S(1)}) parameter(0)
  %i.1 = s32[]{:T(128)S(6)} get-tuple-element(%c.1), index=0
  %ten = s32[]{:T(128)S(6)} constant(10)
  ROOT %less = pred[]{:T(512)S(6)} compare(%i.1, %ten), direction=LT
}

ENTRY %main.1 (w: bf16[3,5], x.1: f32[8,128]) -> f32[8,128] {
  %w = bf16[3,5]{1,0:T(8,128)(2,1)} parameter(0), metadata={op_name="w"}
  %x.1 = f32[8,128]{1,0:T(8,128)} parameter(1)
  %fusion.1 = bf16[3,5]{1,0:T(8,128)(2,1)} fusion(%w), kind=kLoop, calls=%fused, \
backend_config={"window_config":{"estimated_cycles":"100"}}
  %copy-start.1 = (f32[8,128]{1,0:T(8,128)S(1)}, f32[8,128]{1,0:T(8,128)}, u32[]{:S(2)}) \
copy-start(%x.1)
  %copy-done.1 = f32[8,128]{1,0:T(8,128)S(1)} copy-done(%copy-start.1)
  %zero = s32[]{:T(128)} constant(0)
  %start = (s32[]{:T(128)}, f32[8,128]{1,0:T(8,128)S(1)}) tuple(%zero, %copy-done.1)
  %while.1 = (s32[]{:T(128)}, f32[8,128]{1,0:T(8,128)S(1)}) while(%start), \
condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"10"}}
  %z = f32[8,128]{1,0:T(8,128)S(1)} get-tuple-element(%while.1), index=1
  %sort.1 = f32[8,128]{1,0:T(8,128)S(1)} sort(%z), dimensions={1}, to_apply=%add
  %all-reduce.1 = (f32[8,128]{1,0:T(8,128)S(1)}, bf16[3,5]{1,0:T(8,128)(2,1)S(1)}) \
all-reduce(%sort.1, /*index=1*/%fusion.1), channel_id=1, replica_groups={{0,1}}, to_apply=%add
  %ag-start = (bf16[3,5]{1,0:T(8,128)(2,1)}, bf16[12,5]{1,0:T(8,128)(2,1)}) \
all-gather-start(%fusion.1), channel_id=2, dimensions={0}
  %ag-done = bf16[12,5]{1,0:T(8,128)(2,1)} all-gather-done(%ag-start)
  ROOT %out = f32[8,128]{1,0:T(8,128)S(1)} get-tuple-element(%all-reduce.1), index=0
}
"""


def test_cycles_follow_loops_but_not_fusions():
  costs = hlo.costs(hlo.parse(TPU))
  assert costs.cycles == 100 + 10 * 7
  assert (costs.unestimated_sorts, costs.unknown_loops) == (1, 0)


def test_a_loop_of_unknown_length_counts_once():
  text = TPU.replace(', backend_config={"known_trip_count":{"n":"10"}}', '')
  costs = hlo.costs(hlo.parse(text))
  assert (costs.cycles, costs.unknown_loops) == (100 + 7, 1)


def test_hbm_bytes_have_padding_and_leave_out_what_stays_on_the_chip():
  # The fusion reads and writes a tile of 8 x 128 bfloat16 for 3 x 5; the copy reads 8 x 128 float32
  # from HBM, once; all else lies in other memory spaces.
  assert hlo.costs(hlo.parse(TPU)).hbm_bytes == 2 * 8 * 128 * 2 + 8 * 128 * 4


def test_collectives_with_their_bytes():
  assert hlo.costs(hlo.parse(TPU)).collectives == {
      'all-reduce': (1, 8 * 128 * 4 + 3 * 5 * 2), 'all-gather': (1, 12 * 5 * 2)}


def test_what_leaves_a_slice_is_what_megascale_sends():
  transfer = ('is_host_transfer=true, frontend_attributes={_xla_host_transfer_handler_name='
              '"xla_megascale_runtime",_xla_megascale_transfer_type="ALL_REDUCE"}')
  text = f"""\
ENTRY %m (p: f32[2,8,128]) -> f32[2,8,128] {{
  %p = f32[2,8,128]{{2,1,0:T(8,128)}} parameter(0)
  %scatter = f32[1,2,100]{{2,1,0:T(2,128)}} reduce-scatter(%p), replica_groups={{{{0,1,2,3}}}}
  %send = (f32[1,2,100]{{2,1,0:T(2,128)}}, u32[], token[]) send(%scatter, %x), {transfer}
  %sent = token[] send-done(%send), {transfer}
  %recv = (f32[1,2,100]{{2,1,0:T(2,128)}}, u32[], token[]) recv(%x), {transfer}
  %taken = (f32[1,2,100]{{2,1,0:T(2,128)}}, token[]) recv-done(%recv), {transfer}
  %other = (f32[9]{{0:T(128)}}, u32[], token[]) send(%scatter, %x), is_host_transfer=true
  ROOT %r = f32[1,2,100]{{2,1,0:T(2,128)S(1)}} get-tuple-element(%taken), index=0
}}"""
  costs = hlo.costs(hlo.parse(text))
  assert costs.across_slices == (1, 200 * 4)
  assert costs.collectives == {'reduce-scatter': (1, 2 * 8 * 128 * 4)}
  assert costs.hbm_bytes == 2 * (2 * 128 * 4) + 128 * 4  # Two of 100 padded to 128; one of 9.


@pytest.mark.parametrize('shape, nbytes', [
    ('f32[128,100]{0,1:T(8,128)}', 104 * 128 * 4),  # The order makes axis 0 minor.
    ('u8[300,300,3]{1,0,2:T(8,128)(4,1)}', 3 * 304 * 384),
    ('f32[512]{0:T(512)}', 2048), ('f32[500]{0:T(512)}', 2048),
    ('f32[]{:T(128)}', 4), ('pred[7]', 7), ('c64[2]{0}', 16), ('f8e4m3fn[4,4]{1,0}', 16)])
def test_bytes_of_layouts(shape, nbytes):
  text = f'ENTRY %m (p: f32[]) -> f32[] {{\n  %p = {shape} parameter(0)\n  ROOT %r = f32[]S(1) ' \
         'custom-call(%p), custom_call_target="x"\n}'
  text = text.replace('f32[]S(1)', 'f32[]{:T(128)S(1)}')
  assert hlo.costs(hlo.parse(text)).hbm_bytes == nbytes


def test_slices_read_what_they_write():
  text = """\
ENTRY %m (p: f32[64,128]) -> f32[8,128] {
  %p = f32[64,128]{1,0:T(8,128)} parameter(0)
  %s = ((f32[64,128]{1,0:T(8,128)}), f32[8,128]{1,0:T(8,128)S(1)}, s32[]{:S(2)}) slice-start(%p)
  %d = f32[8,128]{1,0:T(8,128)S(1)} slice-done(%s)
  ROOT %t = f32[8,128]{1,0:T(8,128)} slice(%p), slice={[0:8], [0:128]}
}"""
  assert hlo.costs(hlo.parse(text)).hbm_bytes == 3 * 8 * 128 * 4


def test_reads_what_this_compiler_prints():
  compiled = jax.jit(lambda x: jnp.sin(x @ x).sum()).lower(jnp.ones((64, 64))).compile()
  program = hlo.parse(compiled.as_text())
  assert program.computations[program.entry]
  assert hlo.costs(program).hbm_bytes >= 64 * 64 * 4


def test_text_without_an_entry_is_an_error():
  with pytest.raises(ValueError, match='no entry'):
    hlo.parse('HloModule nothing')
