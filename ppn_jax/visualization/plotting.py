"""The house style of plots, and the colours that mean the same in all of them."""

import contextlib
import functools
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
  """A figure on its way to pixels; see `plot`.

  Attributes:
    figure: to draw on.
    pixels: u8 [H, W, 3], there once the `with` block has ended.
  """

  def __init__(self, figure: 'Figure'):
    self.figure = figure
    self.pixels: np.ndarray | None = None


@contextlib.contextmanager
def plot(width: float, height: float) -> Iterator[Plot]:
  """A figure of so many inches in the house style, rendered when the block ends.

  It needs no display and leaves the caller's own matplotlib as it was.
  """
  from matplotlib import rc_context
  from matplotlib.backends.backend_agg import FigureCanvasAgg
  from matplotlib.figure import Figure
  with rc_context({**_STYLE, 'font.family': _families()}):
    made = Plot(Figure(figsize=(width, height), dpi=_DPI, layout='constrained'))
    canvas = FigureCanvasAgg(made.figure)
    yield made
    with warnings.catch_warnings():
      warnings.filterwarnings('ignore', 'Glyph')  # Names in scripts that the font lacks.
      canvas.draw()
    made.pixels = np.asarray(canvas.buffer_rgba())[..., :3].copy()


@functools.cache
def _families() -> list[str]:
  """Returns DejaVu Sans, and for letters that it lacks the system's font that drawings take."""
  from matplotlib import font_manager
  families = ['DejaVu Sans']
  for file in fonts.system_fonts()[:1]:
    with contextlib.suppress(Exception):  # A font that matplotlib cannot read.
      font_manager.fontManager.addfont(file)
      families.append(font_manager.FontProperties(fname=file).get_name())
  return families


def class_rgb(label: int) -> tuple[float, ...]:
  """`drawing.class_colour` as matplotlib takes it, 0 to 1."""
  return tuple(channel / 255 for channel in class_colour(label))


def level_colours(count: int) -> list[tuple[float, ...]]:
  """RGBA of each level, from fine (dark) to coarse (light): an order that any eye sees."""
  from matplotlib import colormaps
  return [tuple(c) for c in colormaps['viridis'](np.linspace(0, 0.9, max(count, 2)))[:count]]


def name_rows(axes: 'Axes', names: Sequence[str], limit: int = 16) -> None:
  """Names the rows of a horizontal chart, the first on top."""
  axes.set_yticks(range(len(names)), [short(name, limit) for name in names])
  axes.set_ylim(len(names) - 0.4, -0.6)
  axes.grid(axis='y', visible=False)


def say_instead(axes: 'Axes', text: str) -> None:
  """Fills axes that have nothing to show with a sentence."""
  axes.text(0.02, 0.9, plain(text), va='top', color=MUTED, transform=axes.transAxes)
  axes.set_axis_off()


def sentence(text: str) -> np.ndarray:
  """A picture that says why there is none, u8 [H, W, 3]."""
  with plot(6, 0.6) as made:
    say_instead(made.figure.subplots(), text)
  return made.pixels


def short(name: str, limit: int = 16) -> str:
  """A class's name that leaves room for the plot."""
  return plain(name if len(name) <= limit else f'{name[:limit - 1]}…')


def plain(text: str) -> str:
  """Text that is not taken for a formula."""
  return text.replace('$', r'\$')
