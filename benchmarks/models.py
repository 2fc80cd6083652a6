"""Random models of about 184 M parameters with Nemotron-3's vocabulary: large enough to measure, small enough for two cores."""

from __future__ import annotations

import gzip
import json
import shutil
from pathlib import Path
from typing import Any

from nemotune.models import load_model, save_model

_SHARED = {
    "vocab_size": 131072, "hidden_size": 512, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 64, "tie_word_embeddings": False,
    "max_position_embeddings": 8192, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "torch_dtype": "bfloat16", "initializer_range": 0.02,
}  # fmt: skip
CONFIGS: dict[str, dict[str, Any]] = {
    "nemotron_h": _SHARED | {
        "architectures": ["NemotronHForCausalLM"], "model_type": "nemotron_h", "hybrid_override_pattern": "MEM*EMEM*E", "num_hidden_layers": 10,
        "mamba_num_heads": 16, "mamba_head_dim": 64, "ssm_state_size": 128, "n_groups": 2, "conv_kernel": 4, "chunk_size": 128, "expand": 2,
        "use_conv_bias": True, "mamba_proj_bias": False, "mamba_hidden_act": "silu", "time_step_min": 0.001, "time_step_max": 0.1,
        "time_step_floor": 0.0001, "intermediate_size": 1024, "mlp_hidden_act": "relu2", "mlp_bias": False, "attention_bias": False, "use_bias": False,
        "n_routed_experts": 32, "num_experts_per_tok": 4, "n_group": 1, "topk_group": 1, "norm_topk_prob": True, "routed_scaling_factor": 2.5,
        "moe_intermediate_size": 256, "moe_shared_expert_intermediate_size": 512, "n_shared_experts": 1, "layer_norm_epsilon": 1e-5, "norm_eps": 1e-5,
    },
    "llama": _SHARED | {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_hidden_layers": 12, "intermediate_size": 1536, "hidden_act": "silu",
        "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "attention_bias": False, "mlp_bias": False,
    },
}  # fmt: skip


def write_model(family: str, directory: Path, *, nemotron: Path) -> None:
    """Write a random model of `family` with the tokenizer and template that `nemotron` (data/nemotron) holds."""
    blank = directory.with_name(directory.name + "-blank")
    blank.mkdir(parents=True, exist_ok=True)
    (blank / "config.json").write_text(json.dumps(CONFIGS[family]))
    (blank / "tokenizer.json").write_bytes(
        gzip.decompress((nemotron / "tokenizer" / "nemotron3_tokenizer.RECONSTRUCTED.json.gz").read_bytes())
    )
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "<|im_end|>",
        "pad_token": "<unk>",
        "unk_token": "<unk>",
    }
    (blank / "tokenizer_config.json").write_text(json.dumps(settings))
    shutil.copyfile(nemotron / "chat_templates" / "nemotron_3_nano.jinja", blank / "chat_template.jinja")
    save_model(load_model(blank, dtype="bfloat16", random_seed=0), directory, overwrite=True)
    shutil.rmtree(blank)
