"""Errors in data of every format are rejected, corrected or reported, never ignored."""

import json

import numpy as np
import pytest
from PIL import Image

from ppn_jax.data.bad_examples import BadExamples
from ppn_jax.data.loader import eval_batches, required_boxes, train_batches
from ppn_jax.data.report import check_learnable, report
from ppn_jax.data.source import build_source
from ppn_jax.detection.structures import Category
from ppn_jax.errors import InputError
from ppn_jax.metrics import coco as scoring

HEIGHT, WIDTH = 96, 128
BOX = (30, 20, 40, 30)  # x, y, width, height.


def picture(path):
  path.parent.mkdir(parents=True, exist_ok=True)
  Image.new('RGB', (WIDTH, HEIGHT), (90, 90, 90)).save(path)


def coco(folder, boxes, name='red'):
  """Writes a COCO data set from one list of boxes per image; returns the block that reads it."""
  for i in range(len(boxes)):
    picture(folder / f'i/{i}.jpg')
  (folder / 'a.json').write_text(json.dumps(truth(boxes, name)))
  return dict(name='coco_json', images=str(folder / 'i'), annotations=str(folder / 'a.json'))


def truth(boxes, name='red'):
  owners = [i for i, of_image in enumerate(boxes) for _ in of_image]
  return {'images': [dict(id=i, file_name=f'{i}.jpg', height=HEIGHT, width=WIDTH)
                     for i in range(len(boxes))],
          'categories': [dict(id=1, name=name)],
          'annotations': [dict(id=k, image_id=owners[k], category_id=1, bbox=list(box))
                          for k, box in enumerate(b for of_image in boxes for b in of_image)]}


def voc(folder, boxes, name='red'):
  for sub in ('Annotations', 'ImageSets/Main'):
    (folder / sub).mkdir(parents=True)
  for i, of_image in enumerate(boxes):
    picture(folder / f'JPEGImages/{i}.jpg')
    objects = ''.join(
        f'<object><name>{name}</name><bndbox><xmin>{x}</xmin><ymin>{y}</ymin><xmax>{x + w}'
        f'</xmax><ymax>{y + h}</ymax></bndbox></object>' for x, y, w, h in of_image)
    (folder / f'Annotations/{i}.xml').write_text(
        f'<annotation><size><width>{WIDTH}</width><height>{HEIGHT}</height></size>{objects}'
        '</annotation>')
  (folder / 'ImageSets/Main/train.txt').write_text(''.join(f'{i}\n' for i in range(len(boxes))))
  return dict(name='pascal_voc', folder=str(folder))


def yolo(folder, boxes, name='red'):
  (folder / 'labels/t').mkdir(parents=True)
  for i, of_image in enumerate(boxes):
    picture(folder / f'images/t/{i}.jpg')
    (folder / f'labels/t/{i}.txt').write_text(''.join(
        f'0 {(x + w / 2) / WIDTH} {(y + h / 2) / HEIGHT} {w / WIDTH} {h / HEIGHT}\n'
        for x, y, w, h in of_image))
  (folder / 'data.yaml').write_text(f'train: images/t\nnames: [{name}]\n')
  return dict(name='yolo_txt', data=str(folder / 'data.yaml'))


def tfds(folder, boxes, name='red'):
  pytest.importorskip('tensorflow_datasets')
  from ppn_jax.data.prepare import Options, prepare
  block = coco(folder, [[BOX]] * len(boxes), name)
  made = prepare({'train': build_source(block)}, folder, Options('toy', threads=1),
                 progress=lambda *step: None)
  (made / 'instances_train.json').write_text(json.dumps(truth(boxes, name)))
  return dict(name='tfds', data_dir=str(made))


FILES = {'coco': 'i/{}.jpg', 'voc': 'JPEGImages/{}.jpg', 'yolo': 'images/t/{}.jpg'}
FORMATS = pytest.mark.parametrize('make', [coco, voc, yolo, tfds])
OF_FILES = pytest.mark.parametrize('make', [coco, voc, yolo])


def lose(path):
  """Removes an image; for YOLO, whose folder defines the set, leaves a broken link."""
  path.unlink()
  if path.parent.name == 't':
    path.symlink_to('nowhere.jpg')


def told(source, **options):
  return '\n'.join(report(source, 'data.train', **{'image_size': 64, **options}).lines)


def perfect(source):
  """Returns the AP of a detector that finds the visible part of each object once."""
  rows, seen = [], set()
  for a in source.ground_truth()['annotations']:
    if not a['iscrowd'] and (key := (a['image_id'], *np.round(a['bbox'], 3))) not in seen:
      seen.add(key)
      x, y, w, h = a['bbox']
      x0, y0, x1, y1 = max(x, 0), max(y, 0), min(x + w, WIDTH), min(y + h, HEIGHT)
      rows.append({k: a[k] for k in ('image_id', 'category_id')} | {
          'bbox': [x0, y0, x1 - x0, y1 - y0], 'score': 0.9})
  return round(scoring.score(source.ground_truth(), rows).metrics['AP'], 9)


@FORMATS
def test_every_run_says_what_it_learns_from(make, tmp_path):
  source = build_source(make(tmp_path, [[BOX], []]))
  lines = report(source, 'data.train', image_size=64).lines
  assert lines[0].startswith('data.train: 2 images, 1 with') and max(map(len, lines)) <= 80
  text = ' '.join(line.strip() for line in lines)
  assert '1 box, 1 class (red 1), median side 20 px at 64 px' in text
  assert told(source, image_size=0).startswith('data.train: 2 images, 1 with')
  assert 'class' not in told(source, image_size=0)
  check_learnable(report(source, 'data.train', image_size=64))


@pytest.mark.parametrize('make, words', [
    (coco, 'no box in 2 images (2 without annotations)'),
    (yolo, 'no box in 2 images (2 with an empty label file)'),
    (tfds, 'no box in 2 images (2 without objects)')])
def test_no_box_at_all_is_an_error_of_training_alone(make, words, tmp_path):
  source = build_source(make(tmp_path, [[], []]))
  with pytest.raises(InputError) as caught:
    check_learnable(report(source, 'data.train', image_size=64))
  assert str(caught.value) == f'data.train: nothing to learn from: {words}'
  check_learnable(report(source, 'data.eval'))


def test_crowds_alone_are_nothing_to_learn_from_unless_they_count(tmp_path):
  block = coco(tmp_path, [[BOX], [BOX]])
  content = truth([[BOX], [BOX]])
  for a in content['annotations']:
    a['iscrowd'] = 1
  (tmp_path / 'a.json').write_text(json.dumps(content))
  source = build_source(block)
  assert '2 images, 2 with crowds only, 0 boxes, 2 crowds' in told(source)
  with pytest.raises(InputError, match='all 2 boxes are crowds or difficult'):
    check_learnable(report(source, 'data.train', image_size=64))
  check_learnable(report(source, 'data.train', image_size=64, ignore_crowd=False))


def test_images_without_a_label_file_are_counted(tmp_path):
  block = yolo(tmp_path, [[BOX]] * 10)
  for i in range(1, 10):
    (tmp_path / f'labels/t/{i}.txt').unlink()
  assert told(build_source(block)).startswith(
      'data.train: 10 images, 9 without a label file, 1 box')


@FORMATS
def test_boxes_over_the_edge_are_cut_and_counted(make, tmp_path):
  over = (100, 20, 40, 30)
  block = make(tmp_path, [[BOX, over], [over]])
  source = build_source(block)
  np.testing.assert_allclose(source[0].boxes[1], [20 / 96, 100 / 128, 50 / 96, 1], atol=1e-6)
  assert source.ground_truth()['annotations'][1] | {'id': 0} == pytest.approx({
      'id': 0, 'image_id': source[0].image_id, 'category_id': source.categories[0].id,
      'bbox': pytest.approx([100, 20, 28, 30], abs=1e-4), 'area': pytest.approx(840, abs=.01),
      'iscrowd': 0})
  assert perfect(source) == 1
  assert '2 boxes cut at the edge of the image, such as: ' in told(source)
  assert source.contents.clipped.count == 2
  with pytest.raises(InputError, match=r"2 bad boxes in all.*on_bad_box='clip'"):
    build_source(block | {'on_bad_box': 'raise'})


@FORMATS
def test_boxes_mostly_outside_stay_refused_and_can_be_left_out(make, tmp_path):
  block = make(tmp_path, [[BOX, (100, 20, 40, 30)], [(120, 20, 40, 30)]])
  with pytest.raises(InputError, match=r'outside the image, by more than half of its area \(1 bad'
                                       r".*on_bad_box='drop' \(--config.data.eval.on_bad_box=drop"):
    build_source(block, key='data.eval')
  source = build_source(block | {'on_bad_box': 'drop'})
  assert source.max_boxes == 2 and len(source[1].boxes) == 0
  text = told(source)
  for part in ('1 with all their boxes left out', '1 bad box dropped (1 outside the image)',
               '1 box cut at the edge of the image'):
    assert part in text


@FORMATS
def test_a_box_that_is_there_twice_counts_once(make, tmp_path):
  other = (60, 40, 20, 20)
  block = make(tmp_path, [[BOX, BOX, other, BOX], [other]])
  source = build_source(block)
  assert len(source[0].boxes) == 2 and source.max_boxes == 2 and perfect(source) == 1
  assert len(source.ground_truth()['annotations']) == 3
  assert "2 boxes repeated and counted once, such as: 'red' at [30, 20, 40, 30]" in told(source)
  kept = build_source(block | {'duplicates': 'keep'})
  assert len(kept[0].boxes) == 4 and perfect(kept) < 1
  with pytest.raises(InputError, match="duplicates is 'x', legal: 'merge', 'keep'"):
    build_source(block | {'duplicates': 'x'})


def test_a_crowd_is_no_repetition_of_an_object(tmp_path):
  block, content = coco(tmp_path, [[BOX, BOX]]), truth([[BOX, BOX]])
  content['annotations'][0]['iscrowd'] = 1
  (tmp_path / 'a.json').write_text(json.dumps(content))
  source = build_source(block)
  assert sorted(source[0].crowd) == [False, True] and perfect(source) == 1


@pytest.mark.parametrize('make', [coco, voc])
def test_shares_in_place_of_pixels_are_refused(make, tmp_path):
  shares = (.23, .2, .31, .31)
  with pytest.raises(InputError, match=r'all 2 boxes have numbers between 0 and 1, such as .*look '
                                       r'like shares .*, here 128 and 96'):
    build_source(make(tmp_path / 'all', [[shares], [shares]]))


@pytest.mark.parametrize('make', [coco, voc])
def test_some_shares_among_pixels_are_noted(make, tmp_path):
  shares = (.23, .2, .31, .31)
  text = told(build_source(make(tmp_path, [[shares, BOX], [shares]])))
  assert '2 of 3 boxes are smaller than a pixel or written as shares of the image, such as' in text


def test_corners_in_place_of_sizes_are_recognised(tmp_path):
  fitting, far = (10, 20, 90, 60), (70, 50, 128, 96)
  with pytest.raises(InputError, match=r'outside the image.*all boxes fit .* if they are corners'):
    build_source(coco(tmp_path / 'a', [[fitting], [far]]))
  cut = build_source(coco(tmp_path / 'b', [[fitting], [(20, 10, 120, 80)]]))
  assert 'a.json: all boxes fit into their images if they are corners, xmin, ymin' in told(cut)
  assert 'corners' not in told(build_source(coco(tmp_path / 'c', [[BOX], [fitting]])))


@pytest.mark.parametrize('make', [coco, yolo])
def test_boxes_below_a_pixel(make, tmp_path):
  some = build_source(make(tmp_path / 'some', [[BOX], [(50, 50, .3, .4)]]))
  assert '1 of 2 boxes are smaller than a pixel or written as shares' in told(some)
  every = build_source(make(tmp_path / 'all', [[(50, 50, .3, .4)], [(9, 9, .5, .4)]]))
  with pytest.raises(InputError, match=r'every box is smaller than a pixel of its image.* 0\.5 px'):
    check_learnable(report(every, 'data.train', image_size=64))


def test_pixels_in_place_of_shares_get_advice(tmp_path):
  block = yolo(tmp_path, [[BOX]])
  (tmp_path / 'labels/t/0.txt').write_text('0 50 40 30 20\n')
  with pytest.raises(InputError, match='most boxes have numbers above 1, but must be shares'):
    build_source(block)


def test_classes_without_a_box_are_named(tmp_path):
  block = yolo(tmp_path, [[BOX]])
  (tmp_path / 'data.yaml').write_text('train: images/t\nnames: [red, blue, green]\n')
  source = build_source(block)
  assert "no box of 2 classes, which cannot be learned: 'blue', 'green'" in told(source)
  assert 'cannot be learned' not in told(source, image_size=0)


@pytest.mark.parametrize('spoil', [lambda path: path.write_bytes(b'junk'),
                                   lambda path: path.write_bytes(b''), lose])
@OF_FILES
def test_skip_means_skip(make, spoil, tmp_path):
  block = make(tmp_path, [[BOX]] * 10)
  spoil(tmp_path / FILES[make.__name__].format(3))
  if make is yolo:  # The others need no header if the annotations state a size.
    with pytest.raises(InputError, match=r'3\.jpg: .*\(--config\.data\.on_bad_example=skip\)'):
      build_source(block)
  source = build_source(block, on_bad_example='skip')
  assert len(source) == 10 and len(source[2].boxes) == 1
  for _ in range(2):
    with pytest.raises(InputError, match=r'3\.jpg|JPEGImages/3'):
      source[3]
  bad = BadExamples('data.train', 10, 'skip', 0.1)
  options = dict(image_size=32, max_boxes=8, batch_size=5, threads=1, bad=bad)
  batches = train_batches(source, transforms=(), seed=0, **options)
  ids = [i for _ in range(2) for i in next(batches).image_id.tolist()]
  gone = source.ground_truth()['images'][3]['id']
  assert gone not in ids
  valid = np.concatenate([b.valid for b in eval_batches(source, **options)])
  assert valid.tolist() == [i != 3 for i in range(10)]
  assert len(bad.new_reasons()) == 1  # Named once, by whichever thread.
  # Its objects count as not detected.
  assert len(source.ground_truth()['annotations']) == 10


@OF_FILES
def test_too_many_missing_images_are_an_error_before_the_first_step(make, tmp_path):
  block = make(tmp_path, [[BOX]] * 4)
  for i in (1, 2):
    lose(tmp_path / FILES[make.__name__].format(i))
  with pytest.raises(InputError):
    build_source(block)
  source = build_source(block, on_bad_example='skip')
  assert '2 images cannot be read and skipped, such as: ' in told(source)
  with pytest.raises(InputError, match='2 of 4 examples cannot be read'):
    BadExamples('data.train', 4, 'skip', 0.3).record_known(source)
  with pytest.raises(InputError, match="on_bad_example='skp'; did you mean 'skip'"):
    build_source(block, on_bad_example='skp')


@OF_FILES
def test_no_image_at_all_is_an_error(make, tmp_path):
  block = make(tmp_path, [[BOX]] * 2)
  for i in range(2):
    (tmp_path / FILES[make.__name__].format(i)).write_bytes(b'junk')
  bad = BadExamples('data.train', 2, 'skip', 1.0)
  with pytest.raises(InputError, match='none of the 2 images can be read'):
    source = build_source(block, on_bad_example='skip')
    next(train_batches(source, transforms=(), seed=0, image_size=32, batch_size=2, threads=1,
                       max_boxes=required_boxes(source), bad=bad))


@OF_FILES
def test_hidden_and_stray_files_stop_nothing(make, tmp_path):
  block = make(tmp_path, [[BOX]] * 2)
  image = tmp_path / FILES[make.__name__].format('x')
  for name in ('._0.jpg', '.DS_Store', 'd.heic', 'notes.md'):
    (image.parent / name).write_bytes(b'\0\5\26\7')
  (image.parent / '.ipynb_checkpoints').mkdir()
  (image.parent / '.ipynb_checkpoints' / '0-checkpoint.jpg').write_bytes(b'\0')
  if make is voc:
    for name in ('._0', 'stray'):
      (tmp_path / f'Annotations/{name}.xml').write_bytes(b'\0\5\26\7')
    whole = build_source(block | {'split': ''})
    assert len(whole) == 2 and '1 xml files without an image are ignored' in told(whole)
  source = build_source(block)
  assert len(source) == 2 and source[1].image.shape == (HEIGHT, WIDTH, 3)
  if make is not coco:  # Its folder may contain other sets.
    assert '2 files not looked at: .heic, .md' in told(source)


@OF_FILES
def test_links_are_followed(make, tmp_path):
  block = make(tmp_path, [[BOX]] * 2)
  folder = (tmp_path / FILES[make.__name__].format(0)).parent
  folder.rename(tmp_path / 'store')
  folder.symlink_to(tmp_path / 'store')
  (tmp_path / 'store' / 'loop').symlink_to(tmp_path)
  source = build_source(block)
  assert len(source) == 2 and len(source[1].boxes) == 1


def test_linked_folders_within_a_folder(tmp_path):
  block = yolo(tmp_path, [[BOX]] * 3)
  (tmp_path / 'images/t').rename(tmp_path / 'store')
  (tmp_path / 'labels/t').rename(tmp_path / 'rows')
  (tmp_path / 'images/t').mkdir()
  (tmp_path / 'labels/t').mkdir()
  (tmp_path / 'images/t/more').symlink_to('../../store')
  (tmp_path / 'labels/t/more').symlink_to('../../rows')
  picture(tmp_path / 'images/t/own/9.jpg')
  (tmp_path / 'images/t/again').symlink_to('own')  # It has the labels of the folder itself.
  (tmp_path / 'labels/t/own').mkdir()
  (tmp_path / 'labels/t/own/9.txt').write_text('0 .5 .5 .1 .1\n')
  (tmp_path / 'store/round').symlink_to('..')
  source = build_source(block)
  assert len(source) == 4 and told(source).startswith('data.train: 4 images, 4 boxes')


@pytest.mark.parametrize('line', ['{0}/images/t/{1}.jpg', './../images/t/{1}.jpg',
                                  '../images/t/{1}.jpg', '..\\images\\t\\{1}.jpg'])
def test_lists_lead_anywhere(line, tmp_path):
  yolo(tmp_path, [[BOX]] * 2)
  (tmp_path / 'cfg').mkdir()
  (tmp_path / 'cfg/t.txt').write_text(
      ''.join(line.format(tmp_path, i) + '\n' for i in (0, '._0', 1)) + 'd.heic\n')
  (tmp_path / 'cfg/data.yaml').write_text('train: t.txt\nnames: [red]\n')
  block = dict(name='yolo_txt', data=str(tmp_path / 'cfg/data.yaml'))
  source = build_source(block)
  assert len(source) == 2 and len(source[1].boxes) == 1
  assert '1 file not looked at: .heic' in told(source)


def test_lists_that_start_at_the_data_set_s_folder(tmp_path):
  block = yolo(tmp_path, [[BOX]] * 2)
  (tmp_path / 'lists').mkdir()
  (tmp_path / 'lists/t.txt').write_text('images/t/0.jpg\n./images/t/1.jpg\n')
  (tmp_path / 'data.yaml').write_text('train: lists/t.txt\nnames: [red]\n')
  assert len(build_source(block)) == 2


@pytest.mark.parametrize('yaml, message', [
    ('nc: 5\nnames: [red, blue]', 'nc is 5, but names has 2: red, blue; correct one of them'),
    ('nc: many\nnames: [red]', "nc is 'many', but names has 1"),
    ('nc: 2\nnames: [red, red]', "names has 'red' for class 0 and for class 1; legal: different"),
    ('nc: 2\nnames: {0: red, 4: blue}', ''), ('nc: 5\nnames: {0: red, 4: blue}', ''),
    ('nc: 1\nnames: [red]', '')])
def test_counts_and_names_of_classes(yaml, message, tmp_path):
  block = yolo(tmp_path, [[BOX]])
  (tmp_path / 'data.yaml').write_text(f'train: images/t\n{yaml}\n')
  if not message:
    assert len(build_source(block)) == 1
    return
  with pytest.raises(InputError, match=message):
    build_source(block)


class Own:
  """Source from outside the package with the required members only."""

  def __init__(self, source, truth):
    self.categories, self.max_boxes, self._source, self._truth = (
        source.categories, source.max_boxes, source, truth)

  def __len__(self):
    return len(self._source)

  def ground_truth(self):
    return self._truth


def test_a_source_without_contents_is_reported_on_by_its_ground_truth(tmp_path):
  source = build_source(coco(tmp_path, [[BOX], [], [BOX, (1, 1, 5, 5)]]))
  truth = source.ground_truth()
  assert told(Own(source, truth)).startswith('data.train: 3 images, 1 without boxes, 3 boxes')
  with pytest.raises(InputError, match='nothing to learn from: no box in 3 images'):
    check_learnable(report(Own(source, truth | {'annotations': []}), 'x', image_size=64))
  with pytest.raises(InputError, match=r'Own.ground_truth.* is no COCO instances dict: KeyErr'):
    report(Own(source, {'images': []}), 'x')
  with pytest.raises(InputError, match='lists 2 images, but the source has 3'):
    report(Own(source, truth | {'images': truth['images'][:2], 'annotations': []}), 'x')
  twice = Own(source, truth | {'annotations': truth['annotations'] * 2})
  assert '3 boxes repeated, such as [30.0, 20.0, 40.0, 30.0] (x, y' in told(twice)


def test_images_drawn_on_demand_are_not_laid_out_for_a_report():
  source = build_source({'name': 'synthetic_shapes', 'num_images': 10**6})
  assert told(source) == 'data.train: 1,000,000 images'
  other = build_source({'name': 'synthetic_shapes', 'num_images': 10**6},
                       categories=(*source.categories, Category(9, 'own')))
  assert told(other) == 'data.train: 1,000,000 images'


def test_a_part_of_the_contents(tmp_path):
  contents = build_source(yolo(tmp_path, [[BOX], [], [BOX, (1, 1, 5, 5)]])).contents
  part = contents.select([2, 0])
  assert part.owners.tolist() == [0, 0, 1] and len(part.sides) == 3 and len(part.no_boxes) == 2
