"""Row formats, one file each: `convert(row)` turns a raw row into an Example or raises RowError.

A format knows nothing of files, templates or tokens. The schema of its rows stands in its docstring.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from nemotune.data.example import Example
from nemotune.data.formats import chat, fiqa, glaive, medmcqa, squad, text

FORMATS: dict[str, Callable[[dict[str, Any]], Example]] = {
    module.__name__.rpartition(".")[2]: module.convert for module in (chat, fiqa, glaive, medmcqa, squad, text)
}
