"""`nemotune run`: a recipe from its first row to its report. The order of the stages is in `workflow/stages.py`."""

from __future__ import annotations

from nemotune.cli.options import training_verb

app = training_verb("run", "Do it all: data, plan, train, eval, export, report.")
