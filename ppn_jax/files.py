"""Writing files so that a kill leaves the old one or the new one, never a piece."""

import os
import pathlib
import tempfile


def write_text(path: pathlib.Path, text: str) -> None:
  """Replaces `path` by `text` in one step; its folder is made if need be."""
  path.parent.mkdir(parents=True, exist_ok=True)
  with tempfile.NamedTemporaryFile('w', dir=path.parent, prefix=f'.{path.name}.', delete=False,
                                   encoding='utf-8') as file:
    try:
      file.write(text)
      file.flush()
      os.fsync(file.fileno())
      os.chmod(file.name, 0o644)
      os.replace(file.name, path)
    except BaseException:
      os.unlink(file.name)
      raise
