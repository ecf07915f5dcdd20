"""Tests `ppn evaluate --report` with a strict parser, and in a browser if there is one."""

import json
import re
import shutil
import subprocess

import numpy as np
import pytest
from html_page import XHTML, check_self_contained, parse
from PIL import Image
from time_limits import HANG_SECONDS
from tiny import untrained_run

from ppn_jax.cli.main import main
from ppn_jax.data.source import build_source
from ppn_jax.detection.structures import Category, Example
from ppn_jax.metrics import coco
from ppn_jax.visualization.gallery import Gallery
from ppn_jax.visualization.report import evaluation_page

BROWSER = next(filter(None, map(shutil.which, (
    'chromium', 'chromium-browser', 'google-chrome', 'chrome'))), None)
HEADINGS = ['Metrics', 'Training', 'Precision and recall', 'By class and size', 'Thresholds',
            'Confusion of classes', 'Errors by image', 'Mistakes by kind', 'Worst images',
            'Best images', 'Reliability of scores']


@pytest.fixture(scope='module')
def report(tmp_path_factory):
  categories = build_source({'name': 'synthetic_shapes', 'num_images': 1}).categories
  run = untrained_run(tmp_path_factory.mktemp('run'), categories=categories)
  lines = [{'step': 2, 'train/loss': 2.0, 'train/learning_rate': 0.1, 'train/gradient_norm': None},
           {'step': 4, 'train/loss': 1.0, 'eval/AP': 0.25}, {'step': 9, 'train/loss': 1e9}]
  (run / 'metrics.jsonl').write_text(''.join(json.dumps(line) + '\n' for line in lines))
  output = run.parent / 'out'
  assert main(['evaluate', f'--workdir={run}', '--report', f'--output={output}']) == 0
  return output / 'report.html'


def headings(tree, level='h2'):
  return [h.text for h in tree.iter(f'{XHTML}{level}')]


def test_the_page_is_complete_and_self_contained(report):
  tree, pictures = parse(report.read_text('utf-8'))
  check_self_contained(tree)
  assert headings(tree) == HEADINGS
  # Six plots, and comparisons of the six images, best first and worst first.
  assert len(pictures) >= 6 + 12 and all(np.asarray(p).std() > 5 for p in pictures)
  cells = [[''.join(td.itertext()) for td in tr.iter(f'{XHTML}td')]
           for tr in tree.iter(f'{XHTML}tr')]
  scores = json.loads((report.parent / 'scores.json').read_text())
  shown = {row[0]: row[1] for row in cells if row}
  assert shown['AP50'] == f'{scores["figures"]["AP50"]:.3f}' and 'triangle' in shown


class Dots:
  """Six images with a box each, of classes whose names contain markup."""
  categories = (Category(7, '<b>bold</b>'), Category(9, 'a "quote" & $x_1$'))
  max_boxes = 1

  def __len__(self):
    return 6

  def __getitem__(self, index):
    image = np.full((60, 80, 3), 40 * index, np.uint8)
    return Example(image, np.float32([[0.25, 0.25, 0.75, 0.75]]), np.int32([index % 2]),
                   np.zeros(1, bool), 100 + index, (60, 80))

  def ground_truth(self):
    return {'images': [{'id': 100 + i, 'height': 60, 'width': 80, 'file_name': f'<{i}>.png'}
                       for i in range(6)],
            'categories': [c._asdict() for c in self.categories],
            'annotations': [{'id': i + 1, 'image_id': 100 + i, 'category_id': 7 + 2 * (i % 2),
                             'bbox': [20, 15, 40, 30], 'area': 1200, 'iscrowd': 0}
                            for i in range(6)]}


def page_of(rows, metrics=()):
  source = Dots()
  truth = source.ground_truth()
  gallery = Gallery(source, truth, rows, source.categories)
  return evaluation_page('a <run>', gallery, coco.score(truth, rows), metrics, num_levels=2)


def test_no_detections_and_names_with_markup():
  tree, pictures = parse(page_of([]))
  assert headings(tree) == ['Metrics', *HEADINGS[2:4], *HEADINGS[7:]]
  assert headings(tree, 'h3') == [
      'Missed: no detection matches it or, but for its class or place, would match it']
  texts = list(tree.itertext())
  assert '<b>bold</b>' in texts and 'a <run>' in texts and len(pictures) > 6


@pytest.mark.slow
def test_mistakes_are_under_their_kind():
  row = lambda image, category, score, *bbox: {
      'image_id': image, 'category_id': category, 'score': score, 'bbox': list(bbox), 'level': 0}
  tree, _ = parse(page_of([
      row(100, 7, 0.9, 20, 15, 40, 30), row(100, 7, 0.8, 20, 15, 40, 29),
      row(101, 7, 0.7, 20, 15, 40, 30), row(102, 7, 0.6, 0, 0, 5, 5),
      row(103, 9, 0.2, 0, 0, 80, 60)]))
  kinds = [h.split(':')[0] for h in headings(tree, 'h3')]
  assert kinds == ['Missed', 'Duplicate', 'Wrong class', 'Background']
  captions = [''.join(c.itertext()) for c in tree.iter(f'{XHTML}figcaption')]
  assert '<b>bold</b> 0.70, IoU 1.00 with a "quote" & $x_1$; <1>.png' in captions
  assert '<0>.png: quality 0.67, 1 true, 2 found' in captions  # 2 * 0.9 / (1.7 + 1).


@pytest.mark.skipif(BROWSER is None, reason='no Chromium or Chrome on the PATH')
def test_a_browser_shows_it(report, tmp_path):
  probe = tmp_path / 'probe.html'
  # The page forbids scripts; without that rule, a script can report what the browser shows.
  html = re.sub('<meta http-equiv="Content-Security-Policy"[^>]*>', '', report.read_text('utf-8'))
  probe.write_text(html.replace('</body>', '''<script>addEventListener('load', () => {
    const images = [...document.images];
    document.body.dataset.found = [images.length, images.filter(i => i.naturalWidth > 0).length,
      document.documentElement.scrollWidth <= innerWidth,
      performance.getEntriesByType('resource').filter(e => !e.name.startsWith('data:')).length];
  });</script></body>'''), 'utf-8')

  def browse(*arguments):
    return subprocess.run(
        [BROWSER, '--headless', '--no-sandbox', '--disable-gpu', '--window-size=1368,2000',
         f'--user-data-dir={tmp_path / "profile"}', *arguments], capture_output=True, text=True,
        timeout=HANG_SECONDS, check=True)

  dom = browse('--dump-dom', probe.as_uri()).stdout
  images, decoded, fits, fetched = re.search('data-found="([^"]*)"', dom)[1].split(',')
  assert images == decoded and int(images) > 15 and fits == 'true' and fetched == '0'
  browse(f'--screenshot={tmp_path / "shot.png"}', report.as_uri())
  shot = np.asarray(Image.open(tmp_path / 'shot.png').convert('RGB'))
  assert shot.shape[1] == 1368 and len(np.unique(shot.reshape(-1, 3), axis=0)) > 500
