"""The benchmark of QLoRA's memory measures whole steps of a small model in each mode."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[3]))

from benchmarks import qlora_memory


def test_each_mode_has_a_row_of_planned_and_found(tmp_path):
    qlora_memory.write_weights(tmp_path / "model", layers="ME*", small=True)
    found = qlora_memory.measure(tmp_path / "model", "full", sequence=1024, small=True)
    assert found["planned_held_gb"] < found["planned_step_gb"] and found["step_gb"] > 0
    assert qlora_memory.show(dict.fromkeys(qlora_memory.MODES, found | {"held_gb": 1.0})).count("\n") == 4


def test_a_plan_that_is_too_low_is_shown_as_such():
    figures = {"planned_held_gb": 2.0, "held_gb": 2.0, "planned_step_gb": 3.0, "step_gb": 4.0}
    assert qlora_memory.show({"full": figures}).endswith("| full | 2.00 | 2.00 | +0% | 3.00 | 4.00 | -25% |")
