"""Draws text on pictures in fonts that have its letters.

DejaVu Sans, which comes with matplotlib, has Latin, Greek, Cyrillic and some other letters. Those
that it lacks, above all Chinese ones, are drawn in a font of the system, if one has them.
"""

import contextlib
import functools
import importlib.util
import logging
import os
import pathlib
import re
import shutil
import subprocess
import unicodedata
from collections.abc import Iterator

from PIL import ImageDraw, ImageFont

_log = logging.getLogger(__name__)

_DEJAVU = 'DejaVuSans.ttf'
# Patterns of lower-case names of font files with Chinese, Japanese and Korean letters, best first.
_WITH_CJK = (
    r'notosanscjk.*regular', r'sourcehansans.*regular', r'noto-?sans-?(sc|tc|hk|jp|kr).*',
    r'pingfang', r'hiragino sans gb.*', r'hiragino.*w3', r'applesdgothicneo', r'msyh', r'yugothm',
    r'meiryo', r'malgun', r'wqy-.*', r'droidsansfallback.*', r'nanumgothic', r'takao.*gothic',
    r'ipa.*g', r'vl-gothic-regular', r'arial ?unicode.*', r'stheiti.*', r'simsun', r'simhei',
    r'uming', r'unifont.*')
_SUFFIXES = ('.ttf', '.ttc', '.otf', '.otc')
_MAX_QUERIES = 8  # Of fontconfig in one process, for letters that no other font has.
_PROBE_SIZE = 24  # Pixels, of letters drawn to find out whether a font has them.


class Font:
  """Type of one size that falls back to other fonts for letters that the base font lacks.

  Args:
    size: in pixels.

  Attributes:
    ascent, descent: above and below the base line, in pixels.
  """

  def __init__(self, size: int):
    self._size = size
    self.ascent, self.descent = _open(_base(), size).getmetrics()

  def length(self, text: str) -> float:
    """Returns the width of a line of text in pixels."""
    return sum(font.getlength(part) for font, part in self._runs(text))

  def draw(self, draw: ImageDraw.ImageDraw, left: float, base: float, text: str,
           fill: tuple[int, int, int]) -> None:
    """Draws a line of text from `left` on, with its baseline at `base`, in pixels."""
    for font, part in self._runs(text):
      draw.text((left, base), part, font=font, fill=fill, anchor='ls')
      left += font.getlength(part)

  def _runs(self, text: str) -> Iterator[tuple[ImageFont.FreeTypeFont, str]]:
    """Yields (font, part) for the longest parts of the text that use one font."""
    # macOS stores accents separately from their letters; fonts have the combined letters.
    text = unicodedata.normalize('NFC', text)
    file, part = None, ''
    for letter in text:
      if unicodedata.category(letter) in ('Cc', 'Zl', 'Zp'):  # A label has a single line.
        letter = ' '
      found = file if file and (letter == ' ' or _has(file, letter)) else _file_with(letter)
      if found != file and part:
        yield _open(file, self._size), part
        part = ''
      file, part = found, part + letter
    if part:
      yield _open(file, self._size), part


@functools.lru_cache(maxsize=4096)
def _file_with(letter: str) -> str:
  """Returns the first font that has a letter, else the base font, which draws a box for it."""
  if letter == ' ' or unicodedata.category(letter) in ('Cf', 'Mn', 'Me') or _has(_base(), letter):
    return _base()
  for file in system_fonts():
    if _has(file, letter):
      return file
  for file in _ask_fontconfig(letter):
    if _has(file, letter):
      return file
  _warn_missing(letter)
  return _base()


@functools.cache
def _base() -> str:
  """Returns DejaVu Sans of matplotlib or the system; '' for Pillow's own font, which has ASCII."""
  spec = importlib.util.find_spec('matplotlib')  # Importing it would be slow.
  if spec is not None and spec.origin:
    file = pathlib.Path(spec.origin).parent / 'mpl-data' / 'fonts' / 'ttf' / _DEJAVU
    if file.is_file():
      return str(file)
  return next((file for file in _font_files() if os.path.basename(file) == _DEJAVU), '')


@functools.cache
def system_fonts() -> tuple[str, ...]:
  """Returns the system's fonts with Chinese, Japanese or Korean letters, the best first."""
  ranked = []
  for file in _font_files():
    stem = os.path.splitext(os.path.basename(file))[0].lower()
    rank = next((i for i, name in enumerate(_WITH_CJK) if re.fullmatch(name, stem)), None)
    if rank is not None:
      ranked.append((rank, file))
  return tuple(file for _, file in sorted(ranked))


@functools.cache
def _font_files() -> tuple[str, ...]:
  """Returns the font files in the usual folders of Linux, macOS and Windows."""
  home, windows = os.path.expanduser('~'), os.environ.get('WINDIR', '')
  shared = os.environ.get('XDG_DATA_DIRS') or '/usr/local/share:/usr/share'
  folders = [*(os.path.join(folder, 'fonts') for folder in shared.split(':')),
             f'{home}/.local/share/fonts', f'{home}/.fonts', '/System/Library/Fonts',
             '/Library/Fonts', f'{home}/Library/Fonts', *([f'{windows}/Fonts'] if windows else [])]
  return tuple(sorted(os.path.join(inside, name) for folder in dict.fromkeys(folders)
                      for inside, _, names in os.walk(folder) for name in names
                      if name.lower().endswith(_SUFFIXES)))


_asked: list[str] = []


def _ask_fontconfig(letter: str) -> list[str]:
  """Returns the font files that have a letter according to fontconfig, if it is installed."""
  if len(_asked) >= _MAX_QUERIES or not shutil.which('fc-list'):
    return []
  _asked.append(letter)
  with contextlib.suppress(OSError, subprocess.SubprocessError):
    found = subprocess.run(['fc-list', f':charset={ord(letter):x}', '--format=%{file}\n'],
                           capture_output=True, text=True, timeout=10, check=True)
    return sorted(set(found.stdout.splitlines()))
  return []


@functools.lru_cache(maxsize=65536)
def _has(file: str, letter: str) -> bool:
  """Returns whether a font draws a letter differently from a character that no font has."""
  try:
    return _drawn(file, letter) not in (_drawn(file, '\U0010ffff'), None)
  except (OSError, ValueError):  # The font is damaged or not scalable.
    return False


@functools.lru_cache(maxsize=65536)
def _drawn(file: str, letter: str) -> bytes | None:
  mask = _open(file, _PROBE_SIZE).getmask(letter)
  return bytes(mask) + repr(mask.size).encode() if min(mask.size) else None


@functools.lru_cache(maxsize=64)
def _open(file: str, size: int) -> ImageFont.FreeTypeFont:
  return ImageFont.truetype(file, size) if file else ImageFont.load_default(size)


_missing: set[str] = set()


def _warn_missing(letter: str) -> None:
  """Warns once per process, naming the first letter that cannot be drawn."""
  if not _missing:
    _log.warning('no font on this machine has the letter %s, so pictures show boxes instead of '
                 'such letters; for Chinese, Japanese and Korean install, for example, the package '
                 'fonts-noto-cjk', letter)
  _missing.add(letter)
