"""An adapter as a LoRA checkpoint of Megatron-Bridge; how it lies there is `export/megatron/lora_files.py`'s, which this only calls."""

from __future__ import annotations

from dataclasses import replace

from nemotune.export.adapters.opened import Opened
from nemotune.export.megatron.lora_files import plan_lora
from nemotune.export.stream import Plan
from nemotune.export.tuned import open_tuned


def plan_for_megatron(opened: Opened) -> Plan[int]:
    """The checkpoint; the base's weights have to be there, by their headers. Raises UnsupportedError for what it cannot hold, by name."""
    plan = plan_lora(open_tuned(opened.base_dir, opened.directory, read=opened.read))
    return replace(plan, verify=lambda directory: 2 * plan.verify(directory).tensors)
