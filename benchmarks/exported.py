"""What the export benchmarks start from: random models of about 850 M parameters in bf16, with an adapter on every linear layer of the default.

The llama has Llama-3.1's vocabulary and six layers. The hybrid has Nemotron-3's vocabulary and the widths of Nemotron 3 Nano, whose rows are
no multiples of 256, in one block of each kind with ten experts.
"""

from __future__ import annotations

import gzip
import json
import shutil
from pathlib import Path
from typing import Any

import torch

from benchmarks.models import CONFIGS
from nemotune.lora import apply_lora, save_adapter
from nemotune.models import load_model, save_model
from nemotune.recipe import Lora

WIDE: dict[str, dict[str, Any]] = {
    "llama": CONFIGS["llama"] | {
        "vocab_size": 128256, "hidden_size": 2048, "num_hidden_layers": 6, "intermediate_size": 7168, "num_attention_heads": 32,
        "bos_token_id": 128000, "eos_token_id": [128001, 128008, 128009], "pad_token_id": None,
    },
    "nemotron_h": CONFIGS["nemotron_h"] | {
        "hybrid_override_pattern": "ME*", "num_hidden_layers": 3, "hidden_size": 2688, "num_attention_heads": 32, "head_dim": 128,
        "mamba_num_heads": 64, "n_groups": 8, "intermediate_size": 1856, "moe_intermediate_size": 1856,
        "moe_shared_expert_intermediate_size": 3712, "n_routed_experts": 10, "num_experts_per_tok": 6,
    },
}  # fmt: skip
TOKENIZERS = {
    "llama": ("llama3_1_tokenizer.RECONSTRUCTED.json.gz", {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"}),
    "nemotron_h": ("nemotron3_tokenizer.RECONSTRUCTED.json.gz", {"bos_token": "<s>", "eos_token": "<|im_end|>", "unk_token": "<unk>"}),
}
LORA = Lora(rank=16, alpha=32)


def write_base_and_adapter(family: str, directory: Path, *, nemotron: Path, small: bool = False) -> tuple[Path, Path]:
    """`directory`/base and `directory`/adapter, made where they are missing; tokenizers are in `nemotron` (data/nemotron)."""
    base, adapter = directory / "base", directory / "adapter"
    if not adapter.is_dir():
        _write_base(family, base, nemotron=nemotron, small=small)
        model = load_model(base, dtype="bfloat16")
        apply_lora(model, LORA)
        torch.manual_seed(0)
        for name, parameter in model.named_parameters():
            if name.endswith("lora_B"):
                torch.nn.init.normal_(parameter, std=0.002)
        save_adapter(model, adapter, LORA, base=str(base))
    return base, adapter


def _write_base(family: str, base: Path, *, nemotron: Path, small: bool) -> None:
    blank = base.with_name("blank")
    blank.mkdir(parents=True, exist_ok=True)
    narrow = {"llama": {"hidden_size": 256, "intermediate_size": 512}, "nemotron_h": {"hidden_size": 96, "moe_intermediate_size": 96}}
    (blank / "config.json").write_text(json.dumps(WIDE[family] | (narrow[family] if small else {})))
    file, special = TOKENIZERS[family]
    (blank / "tokenizer.json").write_bytes(gzip.decompress((nemotron / "tokenizer" / file).read_bytes()))
    (blank / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **special}))
    shutil.copyfile(nemotron / "chat_templates" / "nemotron_3_nano.jinja", blank / "chat_template.jinja")
    save_model(load_model(blank, dtype="bfloat16", random_seed=0), base, overwrite=True)
    shutil.rmtree(blank)
