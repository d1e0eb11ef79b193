"""Text for files: whatever names are in it, UTF-8 holds it."""

from __future__ import annotations

import json
from typing import Any


def valid_text(text: str) -> str:
    """`text` with what UTF-8 does not hold, the bytes of file names in other encodings, written as escapes."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def json_text(content: Any, indent: int | None = None) -> str:
    """`content` as JSON, its letters as they are. `json.loads` gives the names of any bytes back as they were: their
    escapes are JSON's own.
    """
    return valid_text(json.dumps(content, ensure_ascii=False, indent=indent))
