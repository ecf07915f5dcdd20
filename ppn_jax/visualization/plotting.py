"""Common style of plots, and colours that have the same meaning in all of them."""

import contextlib
import warnings
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from ppn_jax.visualization import fonts
from ppn_jax.visualization.drawing import class_colour

if TYPE_CHECKING:
  from matplotlib.axes import Axes
  from matplotlib.figure import Figure

MUTED, STRONG = '#8a8a8a', '#505050'
SIZE_COLOURS = ('#d55e00', '#0072b2', '#009e73')  # Small, medium, large.
_DPI = 110
_STYLE = {
    'font.size': 9, 'axes.titlesize': 10,
    'axes.titleweight': 'bold', 'axes.titlelocation': 'left', 'axes.spines.top': False,
    'axes.spines.right': False, 'axes.edgecolor': '#555555', 'axes.grid': True,
    'axes.axisbelow': True, 'grid.color': '#e6e6e6', 'grid.linewidth': 0.8,
    'legend.frameon': False, 'legend.fontsize': 8, 'xtick.color': '#333333',
    'ytick.color': '#333333'}


class Plot:
  """Figure and, later, its pixels; see `plot`.

  Attributes:
    figure: to draw on.
    pixels: u8 [H, W, 3], set when the `with` block has ended.
  """

  def __init__(self, figure: 'Figure'):
    self.figure = figure
    self.pixels: np.ndarray | None = None


@contextlib.contextmanager
def plot(width: float, height: float) -> Iterator[Plot]:
  """Opens a figure of this size in inches in the common style, and renders it at the end.

  It needs no display, and matplotlib's settings are those of the caller again afterwards.
  """
  from matplotlib import rc_context
  from matplotlib.backends.backend_agg import FigureCanvasAgg
  from matplotlib.figure import Figure
  with _font_families() as families, rc_context({**_STYLE, 'font.family': families}):
    made = Plot(Figure(figsize=(width, height), dpi=_DPI, layout='constrained'))
    canvas = FigureCanvasAgg(made.figure)
    yield made
    with warnings.catch_warnings():
      warnings.filterwarnings('ignore', 'Glyph')  # Names in scripts that the font lacks.
      canvas.draw()
    made.pixels = np.asarray(canvas.buffer_rgba())[..., :3].copy()


@contextlib.contextmanager
def _font_families() -> Iterator[list[str]]:
  """Yields DejaVu Sans and, for letters that it lacks, the font of the system that drawings use.

  Matplotlib knows the latter only within the block.
  """
  from matplotlib import font_manager
  families, known = ['DejaVu Sans'], font_manager.fontManager.ttflist
  before = list(known)
  for file in fonts.system_fonts()[:1]:
    with contextlib.suppress(Exception):  # A font that matplotlib cannot read.
      font_manager.fontManager.addfont(file)
      families.append(known[-1].name)
  try:
    yield families
  finally:
    known[:] = before


def class_rgb(label: int) -> tuple[float, ...]:
  """Returns `drawing.class_colour` as matplotlib expects it, 0 to 1."""
  return tuple(channel / 255 for channel in class_colour(label))


def level_colours(count: int) -> list[tuple[float, ...]]:
  """Returns the RGBA of each level, dark for the finest to light for the coarsest."""
  from matplotlib import colormaps
  return [tuple(c) for c in colormaps['viridis'](np.linspace(0, 0.9, max(count, 2)))[:count]]


def name_rows(axes: 'Axes', names: Sequence[str], limit: int = 16) -> None:
  """Labels the rows of a horizontal chart, the first on top."""
  axes.set_yticks(range(len(names)), [short(name, limit) for name in names])
  axes.set_ylim(len(names) - 0.4, -0.6)
  axes.grid(axis='y', visible=False)


def show_message(axes: 'Axes', text: str) -> None:
  """Shows a sentence in place of axes that have no data."""
  axes.text(0.02, 0.9, plain(text), va='top', color=MUTED, transform=axes.transAxes)
  axes.set_axis_off()


def draw_message(text: str) -> np.ndarray:
  """Draws a sentence in place of a picture, u8 [H, W, 3]."""
  with plot(6, 0.6) as made:
    show_message(made.figure.subplots(), text)
  return made.pixels


def short(name: str, limit: int = 16) -> str:
  """Shortens a name to `limit` characters, and escapes it with `plain`."""
  return plain(name if len(name) <= limit else f'{name[:limit - 1]}…')


def plain(text: str) -> str:
  """Escapes dollar signs, so that matplotlib does not take text for a formula."""
  return text.replace('$', r'\$')
