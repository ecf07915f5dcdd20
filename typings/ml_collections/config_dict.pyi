from typing import Any

from ml_collections import ConfigDict as ConfigDict

def placeholder(field_type: type, required: bool = False) -> Any: ...

class FieldReference:
  def __init__(self, default: Any, field_type: type | None = None) -> None: ...
