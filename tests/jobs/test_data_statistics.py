"""Tests `ppn data`: images of training, and anchors of each box counted one by one."""

import itertools
import json
import pathlib

import jax
import numpy as np
import pytest
from html_page import XHTML, check_self_contained, parse
from PIL import Image
from tiny import CONFIG_FILE, tiny_config

from ppn_jax.cli.main import main
from ppn_jax.data.loader import train_batches
from ppn_jax.data.source import build_source
from ppn_jax.data.transforms.basic import build_transforms
from ppn_jax.detection import boxes as box_ops
from ppn_jax.jobs import data_statistics
from ppn_jax.run import build_detector, resolve_classes

TESTS = pathlib.Path(__file__).resolve().parents[1]


@pytest.fixture(scope='module')
def found():
  return data_statistics.collect_statistics(tiny_config(), samples=8, num_examples=5)


@pytest.fixture(scope='module')
def config_file(tmp_path_factory):
  path = tmp_path_factory.mktemp('config') / 'tiny_file.py'
  path.write_text(CONFIG_FILE.format(folder=str(TESTS)))
  return path


def batches_of_training(config, count):
  source = build_source({'name': 'synthetic_shapes', 'num_images': 10, 'image_size': 64,
                         'split': 'train'})
  return list(itertools.islice(train_batches(
      source, transforms=build_transforms(config.data.transforms), image_size=64, max_boxes=8,
      batch_size=config.train.batch_size, seed=config.seed, resize=config.data.resize), count))


def test_images_are_those_of_training(found):
  config = tiny_config()
  trained = batches_of_training(config, 2)
  expected = np.concatenate([b.images for b in trained])[:5]
  np.testing.assert_array_equal(np.concatenate([b.images for b in found.examples]), expected)
  boxes = np.concatenate([b.ground_truth.boxes[b.ground_truth.valid] for b in trained])
  np.testing.assert_allclose(found.boxes.height, (boxes[:, 2] - boxes[:, 0]) * 64)
  np.testing.assert_allclose(found.boxes.width, (boxes[:, 3] - boxes[:, 1]) * 64)
  assert found.num_images == 8 and found.total_images == 10 and found.image_size == 64


def test_anchors_of_each_box_one_by_one(found):
  """Anchors are assigned by the rule of the SSD paper, here in plain loops."""
  anchors, boxes = found.anchors, found.boxes
  at = 0
  for number, (truth, valid) in enumerate(
      (t, v) for batch in batches_of_training(tiny_config(), 2)
      for t, v in zip(batch.ground_truth.boxes, batch.ground_truth.valid, strict=True)):
    overlap = box_ops.iou(truth[valid], anchors.boxes)
    owner = {a: int(overlap[:, a].argmax()) for a in range(len(anchors.boxes))
             if overlap[:, a].max() >= 0.5}
    for box in reversed(range(len(overlap))):
      owner[int(overlap[box].argmax())] = box
    for box in range(len(overlap)):
      levels = [int(anchors.level[a]) for a, b in owner.items() if b == box]
      assert boxes.anchors[at].tolist() == np.bincount(levels, minlength=3).tolist()
      assert boxes.best_iou[at] == overlap[box].max() and boxes.image[at] == number
      assert boxes.best_level[at] == anchors.level[overlap[box].argmax()]
      at += 1
  assert at == len(boxes.label) > 8


def test_groups_add_up(found):
  numbers = data_statistics.summarize(found)
  boxes = len(found.boxes.label)
  for key in ('by_class', 'by_side', 'by_level'):
    assert sum(g['boxes'] for g in numbers[key]) == boxes == numbers['all']['boxes']
    unfit = sum(g['boxes'] * g['unfit'] for g in numbers[key] if g['boxes'])
    assert unfit == pytest.approx((found.boxes.best_iou < 0.5).sum())
  positives = sum(g['positives_an_image'] for g in numbers['by_level']) * 8
  assert positives == pytest.approx(numbers['all']['anchors_a_box'] * boxes)
  assert sum(g['anchors'] for g in numbers['by_level']) == len(found.anchors.boxes)
  assert json.loads(json.dumps(numbers, allow_nan=False)) == numbers
  table = data_statistics.format_table(numbers)
  assert f'{boxes:,} boxes' in table and all(c.name in table for c in found.categories)


def test_boxes_without_anchors_if_force_match_is_off(found):
  config = tiny_config().copy_and_resolve_references()
  with config.unlocked():
    config.matching.update(matched_iou=0.9, force_match=False)
  numbers = data_statistics.summarize(data_statistics.collect_statistics(config, samples=8))
  assert numbers['all']['without'] == numbers['all']['unfit'] > 0.9
  assert 'force_match is off' in data_statistics.describe_anchor_fit(numbers)
  assert data_statistics.summarize(found)['all']['without'] < 0.2


@pytest.mark.slow
def test_the_matching_is_that_of_the_detector():
  config = tiny_config()
  detector = build_detector(resolve_classes(config, range(5)))
  numbers = data_statistics.summarize(data_statistics.collect_statistics(config, samples=4))
  batch = batches_of_training(config, 1)[0]
  positive = np.asarray(detector.assign_targets(detector.anchors, batch.ground_truth).positive)
  assert numbers['all']['anchors_a_box'] * numbers['all']['boxes'] == pytest.approx(positive.sum())


def test_changes_are_suggested_if_many_boxes_fit_no_anchor(found):
  numbers = data_statistics.summarize(found)
  advice, message = numbers['changes'][0], data_statistics.describe_anchor_fit(numbers)
  assert numbers['all']['unfit'] > advice['unfit'] > 0
  assert f'--config.{advice["key"]}={advice["value"]} would leave {advice["unfit"]:.1%}' in message
  assert f"Of '{advice['class']}' it is {advice['unfit_of_class_now']:.1%}" in message
  assert message in data_statistics.format_table(numbers)
  assert 'would help much' in data_statistics.describe_anchor_fit(numbers | {'changes': []})
  config = tiny_config().copy_and_resolve_references()
  with config.unlocked():
    block, _, key = advice['key'].rpartition('.')
    config[block][key] = advice['value']
  after = data_statistics.summarize(data_statistics.collect_statistics(config, samples=8))
  assert after['all']['unfit'] == advice['unfit']


def test_no_changes_are_suggested_if_boxes_fit(found):
  boxes = found.boxes._replace(best_iou=np.ones_like(found.boxes.best_iou))
  detector = build_detector(resolve_classes(tiny_config(), range(5)))
  assert data_statistics._suggest_changes(tiny_config(), detector, boxes) == ()
  none = jax.tree.map(lambda x: x[:0], boxes)
  assert data_statistics._suggest_changes(tiny_config(), detector, none) == ()


@pytest.mark.slow
def test_the_command_prints_and_writes(config_file, tmp_path, capsys):
  argv = ['data', f'--config={config_file}', f'--output={tmp_path / "new"}', '--samples=6']
  assert main(argv) == 0
  out = capsys.readouterr().out
  assert 'train, as augmented: 6 of 10 images' in out and 'no anchor fits' in out
  assert out.startswith('data.train: 10 images\n')  # Of drawn images.
  numbers = json.loads((tmp_path / 'new' / 'data.json').read_text())
  assert numbers['images'] == 6
  tree, pictures = parse((tmp_path / 'new' / 'data.html').read_text('utf-8'))
  check_self_contained(tree)
  assert [h.text for h in tree.iter(f'{XHTML}h2')] == ['Images', 'Sizes and shapes', 'Classes',
                                                       'Anchors']
  assert len(pictures) == 6 + 3 and all(np.asarray(p).std() > 5 for p in pictures)


@pytest.mark.slow
def test_evaluation_data_images_without_boxes_and_crowds(tmp_path, capsys):
  truth = {'images': [{'id': i, 'file_name': f'{i}.png', 'width': 64, 'height': 48}
                      for i in range(1, 4)],
           'categories': [{'id': 5, 'name': 'a <b>'}],
           'annotations': [{'id': 1, 'image_id': 2, 'category_id': 5, 'bbox': [8, 8, 32, 24]},
                           {'id': 2, 'image_id': 2, 'category_id': 5, 'bbox': [0, 0, 64, 48],
                            'iscrowd': 1}]}
  for image in truth['images']:
    Image.new('RGB', (64, 48), (9, 99, 200)).save(tmp_path / image['file_name'])

  def look(annotations):
    (tmp_path / 't.json').write_text(json.dumps(truth | {'annotations': annotations}))
    small = ['--config.model.image_size=64', '--config.model.neck.num_levels=3',
             '--config.model.backbone.depth_multiplier=0.25']
    path = TESTS.parent / 'configs' / 'coco_json.py'
    assert main(['data', f'--config={path}', '--split=eval', f'--output={tmp_path / "out"}',
                 f'--config.data.eval.images={tmp_path}', *small,
                 f'--config.data.eval.annotations={tmp_path / "t.json"}']) == 0
    return json.loads((tmp_path / 'out' / 'data.json').read_text())

  numbers = look(truth['annotations'])
  assert (numbers['all']['boxes'], numbers['crowds']) == (1, 1)
  assert numbers['images_without_boxes'] == 2 and numbers['side']['50%'] == pytest.approx(32)
  assert numbers['ratio']['50%'] == pytest.approx(1)  # 32 x 24 of 64 x 48, made square.
  numbers = look([])
  assert numbers['all']['unfit'] is None and 'nothing to learn' in capsys.readouterr().out
  parse((tmp_path / 'out' / 'data.html').read_text('utf-8'))


@pytest.mark.parametrize('argument, message', [
    ('--samples=0', 'samples'), ('--split=test', "invalid choice: 'test'"),
    ('--config.data.train.num_images=0', 'num_images'),
    ('--config.data.train.name=nothing', 'nothing'), ('--output={file}', 'is a file')])
def test_user_errors_are_one_line(config_file, tmp_path, capsys, argument, message):
  (tmp_path / 'file').write_text('mine')
  argument = argument.format(file=tmp_path / 'file')
  assert main(['data', f'--config={config_file}', argument]) == 2
  lines = capsys.readouterr().err.splitlines()
  assert lines[-1].startswith('ppn: error: ') and message in lines[-1] and len(lines) == 1
  assert (tmp_path / 'file').read_text() == 'mine'
