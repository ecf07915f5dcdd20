"""The profile of a step attributes all of its time, once."""

import pathlib
import sys

import pytest

sys.path.append(str(pathlib.Path(__file__).resolve().parents[2] / 'benchmarks'))
import step_profile


def test_inner_operations_count_for_themselves():
  events = [(0, 10, 'loop'), (2, 4, 'a'), (4, 5, 'b'), (12, 13, 'c')]
  assert step_profile.innermost(events) == [
      (0, 2, 'loop'), (2, 4, 'a'), (4, 5, 'b'), (5, 10, 'loop'), (12, 13, 'c')]


def test_operations_of_the_same_moment_share_it():
  spans = [(1, 5, 'a'), (3, 7, 'b'), (3, 5, 'a'), (8, 9, 'c')]
  times = step_profile.shared_times(spans, 0, 10)
  assert times == pytest.approx({
      'a': 2 + 2 * 2 / 3, 'b': 2 / 3 + 2, 'c': 1, step_profile.BETWEEN: 1 + 1 + 1})
  assert sum(times.values()) == pytest.approx(10)


def test_kinds_come_from_the_paths_of_operations():
  program = '\n'.join([
      '  %fusion.1 = f32[2]{0} fusion(%a), kind=kLoop, metadata={op_name="jit(f)/jvp(Network)/'
      'conv2d_1/depthwise/norm/reduce_sum" stack_frame_id=3}',
      '  ROOT %dot.2 = f32[2]{0} dot(%a, %b), metadata={op_name="jit(f)/transpose(jvp(Network))/'
      'head/cond/branch_0_fun/transpose"}',
      '  %copy.3 = f32[2]{0} copy(%a)',
      '  %add.4 = f32[2]{0} add(%a, %b), metadata={op_name="jit(f)/add"}'])
  paths = step_profile.operation_paths(program)
  kinds = [step_profile.kind_of(name, paths) for name in ('fusion.1', 'dot.2', 'copy.3', 'add.4')]
  assert kinds == ['batch norm and ReLU6', 'matrix products, their patches and casts',
                   step_profile.UNNAMED, 'optimizer and averages']
  assert step_profile.kind_of('top.1', {'top.1': 'jit(detect)/vmap()/top_k'}) == (
      'decoding and suppression')
  assert step_profile.kind_of(step_profile.BETWEEN, paths) == step_profile.BETWEEN
