"""Hooks of mkdocs: links to files outside docs/, and the list of the public API.

Pages are also read on GitHub, where a link such as `../configs/quickstart.py` works as it is. On
the site it becomes a link to the repository if `repo_url` is set in mkdocs.yml, else plain text.
"""

import inspect
import pathlib
import re
import sys

ROOT = pathlib.Path(__file__).resolve().parents[1]
API_MARKER = '<!-- The public API is inserted here. -->'
_OUTSIDE = re.compile(r'(?<!!)\[([^\]]+)\]\(\.\./([^)\s]+)\)')


def on_page_markdown(markdown, *, page, config, files):
  """Returns the Markdown of a page as the site needs it."""
  del files
  if API_MARKER in markdown:
    markdown = markdown.replace(API_MARKER, public_api())

  def replaced(link):
    text, path = link.groups()
    return f'[{text}]({config.repo_url.rstrip("/")}/blob/main/{path})' if config.repo_url else text

  return _OUTSIDE.sub(replaced, markdown)


def public_api() -> str:
  """Returns a mkdocstrings block for each public function and class of `ppn_jax`."""
  if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))
  import ppn_jax
  public = (getattr(ppn_jax, name) for name in ppn_jax.__all__)
  return '\n\n'.join(f'::: {entry.__module__}.{entry.__qualname__}' for entry in public
                     if inspect.isroutine(entry) or inspect.isclass(entry))
