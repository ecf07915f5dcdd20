"""Tests that letters are drawn in a font that has them, with a warning if there is none."""

import functools

import matplotlib
import numpy as np
import pytest
from matplotlib import font_manager
from PIL import Image, ImageDraw

from ppn_jax.visualization import fonts, plotting
from ppn_jax.visualization.fonts import Font

SQUARE = '汽'  # A full square in the system's font of these tests.


@pytest.fixture
def system(tmp_path, monkeypatch):
  """Makes a system without fonts; returns the folder for its fonts."""
  unknown()  # Drawn before, so that its warning is not seen by the test.
  monkeypatch.setenv('XDG_DATA_DIRS', str(tmp_path))
  monkeypatch.setenv('HOME', str(tmp_path / 'home'))
  monkeypatch.setattr(fonts.shutil, 'which', lambda program: None)
  monkeypatch.setattr(fonts, '_missing', set())
  caches = [f for f in vars(fonts).values() if hasattr(f, 'cache_clear')]
  for cache in caches:
    cache.cache_clear()
  (tmp_path / 'fonts' / 'deep').mkdir(parents=True)
  yield tmp_path / 'fonts' / 'deep'
  for cache in caches:
    cache.cache_clear()


def write_font(path, letters):
  """Writes a font in which each of the letters is a square as high as the type."""
  builder_lib = pytest.importorskip('fontTools.fontBuilder')
  pen_lib = pytest.importorskip('fontTools.pens.ttGlyphPen')
  pen = pen_lib.TTGlyphPen(None)
  for at, point in enumerate([(0, 0), (0, 1000), (1000, 1000), (1000, 0)]):
    (pen.lineTo if at else pen.moveTo)(point)
  pen.closePath()
  builder = builder_lib.FontBuilder(1000, isTTF=True)
  builder.setupGlyphOrder(['.notdef', 'square'])
  builder.setupCharacterMap({ord(letter): 'square' for letter in letters})
  builder.setupGlyf({'.notdef': pen_lib.TTGlyphPen(None).glyph(), 'square': pen.glyph()})
  builder.setupHorizontalMetrics({'.notdef': (500, 0), 'square': (1000, 0)})
  builder.setupHorizontalHeader(ascent=1000, descent=0)
  builder.setupOS2()
  builder.setupPost()
  builder.setupNameTable({'familyName': 'Squares', 'styleName': 'Regular'})
  builder.save(path)


def drawn(text, size=20):
  """Returns the pixels that a text covers, bool [H, W]."""
  picture = Image.new('L', (400, 40))
  font = Font(size)
  font.draw(ImageDraw.Draw(picture), 2, 30, text, 255)
  return np.asarray(picture) > 127


@functools.cache
def unknown():
  return drawn('\U0010ffff')


@pytest.mark.parametrize('text', ['é', 'ß', 'ñ', 'ø', 'ł', 'ğ', 'Ω', 'ή', 'Ж', 'ї', '½', '€'])
def test_latin_greek_and_cyrillic_are_letters(system, text, caplog):
  assert drawn(text).any() and (drawn(text) != unknown()).any()
  assert not caplog.records


def test_separate_accents_are_combined_with_their_letter(system):
  np.testing.assert_array_equal(drawn('cafe\u0301'), drawn('caf\u00e9'))


def test_chinese_is_drawn_in_the_system_s_font(system, caplog):
  write_font(system / 'NotoSansCJK-Regular.ttf', SQUARE + '车')
  found = drawn(f'a{SQUARE}车b')
  assert found[10:30].all(axis=0).sum() == 40  # Two squares of 20 pixels.
  assert not caplog.records
  assert Font(20).length(f'a{SQUARE}b') == pytest.approx(Font(20).length('ab') + 20)


def test_missing_letters_are_reported_once(system, caplog):
  (system / 'NotoSansCJK-Regular.ttf').write_bytes(b'damaged')
  for _ in range(2):
    np.testing.assert_array_equal(drawn(SQUARE), unknown())
    drawn('犬\n猫')
  record, = caplog.records
  assert f'has the letter {SQUARE}' in record.message and 'fonts-noto-cjk' in record.message


def test_fontconfig_is_asked_for_other_scripts(system, monkeypatch, caplog):
  write_font(system.parent.parent / 'thai.ttf', 'ก')
  monkeypatch.setattr(fonts.shutil, 'which', lambda program: '/bin/fc-list')
  asked = []

  def run(command, **_):
    asked.append(command[1])
    return type('Done', (), {'stdout': f'{system.parent.parent / "thai.ttf"}\n'})

  monkeypatch.setattr(fonts.subprocess, 'run', run)
  monkeypatch.setattr(fonts, '_asked', [])
  assert drawn('กก')[10:30].all(axis=0).sum() == 40
  assert asked == [':charset=e01'] and not caplog.records


def test_plots_use_the_system_s_font_and_restore_matplotlib(system):
  write_font(system / 'NotoSansCJK-Regular.ttf', SQUARE)
  known = list(font_manager.fontManager.ttflist)
  families = list(matplotlib.rcParams['font.family'])
  with plotting.plot(2, 1) as made:
    made.figure.text(0.1, 0.2, SQUARE, fontsize=40, color='black')
  assert (made.pixels == 0).all(axis=-1).sum() > 1000  # A full square, not the outline of a box.
  assert font_manager.fontManager.ttflist == known
  assert matplotlib.rcParams['font.family'] == families
