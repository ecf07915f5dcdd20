"""Names that images get when they are uploaded to Label Studio, and those that they had before."""

import os
import re
import urllib.parse

CONTRIBUTOR = 'Label Studio'  # Of its files in COCO's format.


def original_names(path: str) -> list[str]:
  """Returns a path in an export, and the same without the prefix of an upload, if it has one.

  The prefix is eight letters and digits and a hyphen. Letters outside ASCII may be percent-encoded,
  then with another eight and two underscores in front.
  """
  plain = re.sub(r'(^|/)([0-9a-f]{8}__)?[0-9a-f]{8}-([^/]+)$', r'\1\3',
                 urllib.parse.unquote(path).replace('\\', '/'))
  return list(dict.fromkeys((path, plain)))


def name_after_upload(path: str) -> str:
  """Returns the name that an uploaded file gets, without its prefix.

  Spaces become underscores; brackets, dashes of other widths and the like are left out.
  """
  return re.sub(r'[^-\w.]', '', os.path.basename(path).strip().replace(' ', '_'))
