"""How good is the tuned model, and is the difference to its base more than chance?

`run` asks one model, `compare_files` pairs two, `write_report` (report.py) shows it all. Each task is a file of its own with the same shape:
`askable(held_out, renderer)`, what it can ask or a DataError, and `score(candidate, held_out) -> list[Row]`. Nothing here trains, and the prompts are the ones of training (data/template.py).
"""

from __future__ import annotations

from nemotune.evaluate.compare import compare, compare_files, summarize
from nemotune.evaluate.run import TASKS, Summary, asked_line, check_recipe, check_rows, run
from nemotune.evaluate.table import comparison_table, summary_table

__all__ = [
    "TASKS", "Summary", "asked_line", "check_recipe", "check_rows", "compare", "compare_files", "comparison_table", "run", "summarize",
    "summary_table",
]  # fmt: skip
