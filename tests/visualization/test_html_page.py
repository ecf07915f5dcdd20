"""Tests that pages are complete, escaped and independent of anything outside them."""

import numpy as np
from html_page import XHTML, check_self_contained, parse

from ppn_jax.visualization import html_page

NASTY = '<script>alert("1")</script> & \'q\' $x$ {{ 7 * 6 }} 犬'


def pixels(kind, seed=0):
  if kind == 'plot':
    return np.full((30, 40, 3), 200, np.uint8)
  return np.random.default_rng(seed).integers(0, 256, (300, 400, 3), np.uint8)


def test_all_content_is_on_the_page():
  html = html_page.render(NASTY, NASTY, [
      html_page.Section(
          NASTY, NASTY,
          [html_page.Table((NASTY, 'b'), [(NASTY, '2'), ('c', '3')], NASTY,
                           html_page.class_swatches([0, 1]))],
          [html_page.Group([html_page.picture(pixels('photo'), NASTY, NASTY, width=120)], NASTY),
           html_page.plot(pixels('plot'), 'a plot')])])
  tree, pictures = parse(html)
  check_self_contained(tree)
  assert [(p.format, p.size) for p in pictures] == [('JPEG', (240, 180)), ('PNG', (40, 30))]
  np.testing.assert_array_equal(np.asarray(pictures[1]), pixels('plot'))
  texts = [text.strip() for text in tree.itertext()]
  assert texts.count(NASTY) == 11  # Title twice, each of the others once, the heading also in nav.
  images = list(tree.iter(f'{XHTML}img'))
  assert [i.get('alt') for i in images] == [NASTY, 'a plot']
  assert [i.get('width') for i in images] == ['120', '40']
  swatches = [e.get('style') for e in tree.iter(f'{XHTML}span')]
  assert swatches == ['background: #e69f00', 'background: #56b4e9']
  ids = {e.get('id') for e in tree.iter() if e.get('id')}
  assert {a.get('href')[1:] for a in tree.iter(f'{XHTML}a')} == ids == {'s1'}


def test_a_page_without_sections_is_valid():
  tree, pictures = parse(html_page.render('t', '', []))
  assert not pictures and next(tree.iter(f'{XHTML}title')).text == 't'
