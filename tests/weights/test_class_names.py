"""Classes of pretrained weights are found by name, also if it is written in another way."""

import pytest

from ppn_jax.errors import InputError
from ppn_jax.weights.class_names import match_class_names


@pytest.mark.parametrize('names, theirs, given, expected', [
    (['a', 'b'], ['b', 'c'], (), {'b': 'b'}),
    (['diningtable', 'potted_plant', 'TV'], ['potted plant', 'Dining-Table', 'tv'], (),
     {'diningtable': 'Dining-Table', 'potted_plant': 'potted plant', 'TV': 'tv'}),
    (['Cat', 'cat'], ['cat'], (), {'cat': 'cat'}),  # An equal name is the better one.
    (['CAT', 'Cat'], ['cat'], (), {}),  # Either could be meant.
    (['cat'], ['CAT', 'Cat'], (), {}),
    (['sofa', 'tv'], ['couch', 'tv'], ('sofa=couch',), {'sofa': 'couch', 'tv': 'tv'}),
    (['sofa', 'couch'], ['couch'], ('sofa = couch', 'couch='), {'sofa': 'couch'}),
    (['a=b'], ['c'], ('a=b=c',), {'a=b': 'c'}),
    (['a', 'b'], [], (), {})])
def test_matched(names, theirs, given, expected):
  assert match_class_names(names, theirs, given, origin='x') == expected


@pytest.mark.parametrize('given, message', [
    (('sofa',), r"'sofa' must be 'NAME=THEIRS'"), (('=couch',), "must be 'NAME=THEIRS'"),
    ((3,), 'must be'), (('sofas=couch',), "the data has no class 'sofas'; did you mean 'sofa'"),
    (('sofa=couches',), "x.tflite has no class 'couches'; did you mean 'couch'"),
    (('sofa=couch', 'sofa='), "gives 'sofa' twice")])
def test_wrong_entries(given, message):
  with pytest.raises(InputError, match=message):
    match_class_names(['sofa'], ['couch'], given, origin='x.tflite')


def test_weights_without_names():
  with pytest.raises(InputError, match='have no names'):
    match_class_names(['sofa'], [], ('sofa=couch',), origin='x.tflite')
