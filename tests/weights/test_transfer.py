"""Transfer of another model's weights: by path and shape, class columns by name."""

import numpy as np
import pytest
from flax.traverse_util import unflatten_dict

from ppn_jax.detection.structures import Category
from ppn_jax.errors import InputError
from ppn_jax.weights.transfer import PretrainedWeights, transfer_weights

ANCHORS, DEPTH = 3, 2
STEM = ('params', 'backbone', 'conv2d_0', 'kernel')
MEAN = ('batch_stats', 'backbone', 'conv2d_0', 'norm', 'mean')


def classes(*names):
  return tuple(Category(7 * i, name) for i, name in enumerate(names))


def network(num_columns, *, stem=(3, 3, 3, 8), levels=2, anchors=ANCHORS, start=0.0):
  """Returns variables of a stem and a head; no two values are equal."""
  shapes = {STEM: stem, MEAN: (8,),
            ('params', 'head', 'tower_kernel'): (1, 1, 8, DEPTH),
            ('params', 'head', 'box_kernel'): (1, 1, DEPTH, anchors * 4),
            ('params', 'head', 'box_bias'): (anchors * 4,),
            ('params', 'head', 'class_kernel'): (1, 1, DEPTH, anchors * num_columns),
            ('params', 'head', 'class_bias'): (anchors * num_columns,),
            **{('params', 'head', f'norm_{i}', 'scale'): (DEPTH,) for i in range(levels)}}
  values = {}
  for path, shape in shapes.items():
    values[path] = (start + np.arange(np.prod(shape))).reshape(shape).astype(np.float32)
    start += values[path].size
  return values


def transferred(theirs, their_classes, ours, our_classes, **options):
  weights = PretrainedWeights('runs/a', 'a run', theirs, classes(*their_classes))
  return transfer_weights(weights, unflatten_dict(ours), classes(*our_classes), **options)


def filled(found, ours):
  """Returns our values by path, with the transferred ones in place."""
  result = {path: value.copy() for path, value in ours.items()}
  for path in ours:
    tree = found.variables
    for key in path:
      tree = tree.get(key, {}) if isinstance(tree, dict) else {}
    if isinstance(tree, np.ndarray):
      result[path] = tree
  for path, (indices, values) in found.partial.items():
    result[path][..., indices] = values
  return result


@pytest.mark.parametrize('background_there', [0, 1])
@pytest.mark.parametrize('background_here', [0, 1])
@pytest.mark.parametrize('there, here', [
    (('red',), ('red', 'blue')), (('red', 'blue'), ('blue', 'red')), (('red', 'blue'), ('blue',)),
    (('red', 'blue'), ('red', 'blue')), (('a', 'b', 'c'), ('d', 'c', 'e', 'a'))])
def test_class_columns_follow_their_names(there, here, background_there, background_here):
  theirs = network(len(there) + background_there)
  ours = network(len(here) + background_here, start=1e4)
  result = filled(transferred(theirs, there, ours, here), ours)
  names = {'there': ['*'] * background_there + list(there),
           'here': ['*'] * background_here + list(here)}
  for leaf in ('class_kernel', 'class_bias'):
    path = ('params', 'head', leaf)
    for anchor in range(ANCHORS):
      for column, name in enumerate(names['here']):
        entry = anchor * len(names['here']) + column
        if name in names['there']:
          source = anchor * len(names['there']) + names['there'].index(name)
          np.testing.assert_array_equal(result[path][..., entry], theirs[path][..., source])
        else:
          np.testing.assert_array_equal(result[path][..., entry], ours[path][..., entry])
  for path in ours:
    if not path[-1].startswith('class'):
      np.testing.assert_array_equal(result[path], theirs[path])


def test_class_columns_of_other_names():
  theirs, ours = network(3), network(2, start=1e4)
  found = transferred(theirs, ('couch', 'dining table', 'x'), ours, ('diningtable', 'sofa'),
                      class_names=('sofa=couch',))
  result = filled(found, ours)['params', 'head', 'class_bias'].reshape(ANCHORS, 2)
  expected = theirs['params', 'head', 'class_bias'].reshape(ANCHORS, 3)
  np.testing.assert_array_equal(result, expected[:, [1, 0]])
  assert ('2 of 2 by name (diningtable=dining table, sofa=couch); unused: x'
          in str(found.report))


def test_no_class_in_common_leaves_all_columns_fresh():
  ours = network(2, start=1e4)
  found = transferred(network(2), ('cat', 'dog'), ours, ('red', 'blue'))
  np.testing.assert_array_equal(filled(found, ours)['params', 'head', 'class_bias'],
                                ours['params', 'head', 'class_bias'])
  assert '0 of 2 by name; random: red, blue; unused: cat, dog' in str(found.report)


def test_another_number_of_anchors_leaves_the_predictors_fresh():
  found = transferred(network(1, anchors=2), ('red',), network(1), ('red',))
  assert not found.partial and 'all random, since the heads differ' in str(found.report)
  assert 'box_kernel is [1, 1, 2, 8] there and [1, 1, 2, 12] here' in str(found.report)


def test_report_accounts_for_everything_in_five_lines():
  ours = network(2, levels=4, start=1e4)
  theirs = network(3, levels=1)
  theirs['params', 'neck', 'extra_0', 'kernel'] = np.zeros((1, 1, 4, 4), np.float32)
  theirs['params', 'neck', 'extra_0', 'bias'] = np.zeros(4, np.float32)
  report = transferred(theirs, ('red', 'green', 'x'), ours, ('blue', 'red')).report
  assert str(report).splitlines() == [
      'runs/a: a run', '  used: 8 of 11 variables, 2 of them in part',
      '  class columns: 1 of 2 by name (red); random: blue; unused: green, x',
      '  random: head/norm_1, head/norm_2, head/norm_3', '  unused: neck']
  assert report.lines() == tuple(line.strip() for line in str(report).splitlines())


def test_long_lists_are_cut_on_the_screen_only():
  report = transferred(network(1), ('red',), network(1, levels=20), ('red',)).report
  assert 'head/norm_7 and 12 more' in str(report) and 'norm_19' not in str(report)
  assert 'head/norm_19' in report.lines()[-1] and 'more' not in report.lines()[-1]


def test_backbone_alone():
  found = transferred(network(1), ('red',), network(1), ('red',), part='backbone')
  assert set(found.variables['params']) == {'backbone'} and not found.partial
  assert 'used: 2 of 9' in str(found.report) and 'random: head' in str(found.report)


def test_nothing_fits():
  other = {path: value for path, value in network(1, stem=(3, 3, 3, 4)).items()
           if path[1] == 'backbone'}
  with pytest.raises(InputError, match=r'nothing in runs/a .* backbone/conv2d_0/kernel is '
                     r'\[3, 3, 3, 4\] there and \[3, 3, 3, 8\] here'):
    transferred(other, ('red',), network(1), ('red',))


def test_values_that_are_not_finite():
  theirs = network(1)
  theirs[STEM][0, 0, 0, 0] = np.nan
  with pytest.raises(InputError, match='backbone/conv2d_0/kernel has values that are not finite'):
    transferred(theirs, ('red',), network(1), ('red',))


def test_unnamed_classes_transfer_only_the_background():
  weights = PretrainedWeights('x.ckpt', 'a detector', network(3), (), 'no names')
  ours = network(2, start=1e4)
  found = transfer_weights(weights, unflatten_dict(ours), classes('red'))
  result = filled(found, ours)['params', 'head', 'class_bias'].reshape(ANCHORS, 2)
  np.testing.assert_array_equal(
      result[:, 0], weights.values['params', 'head', 'class_bias'].reshape(ANCHORS, 3)[:, 0])
  np.testing.assert_array_equal(result[:, 1],
                                ours['params', 'head', 'class_bias'].reshape(ANCHORS, 2)[:, 1])
  assert '0 of 1 by name; the background; random: red; no names' in str(found.report)


@pytest.mark.parametrize('names, same_classes', [(('red', 'blue'), True), (('blue', 'red'), False)])
def test_a_head_without_box_columns_needs_the_same_classes(names, same_classes):
  theirs, ours = network(2), network(2, start=1e4)
  for values in (theirs, ours):
    del values['params', 'head', 'box_bias']
  found = transferred(theirs, ('red', 'blue'), ours, names)
  same = filled(found, ours)['params', 'head', 'class_bias'] == theirs[
      'params', 'head', 'class_bias']
  assert same.all() == same_classes
