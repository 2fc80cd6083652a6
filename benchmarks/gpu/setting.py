"""What the contenders of benchmarks.gpu.train share: Nano-30B's shape, the documents, the settings of one run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch

from benchmarks.roofline import Clock
from nemotune.data.loader import Batch, Loader
from nemotune.data.packing import pack
from nemotune.data.split import Document
from nemotune.models import NemotronHConfig, parse_config
from nemotune.recipe import Lora
from nemotune.train.memory import peak_memory_bytes

NANO_30B: dict[str, Any] = {  # config.json of nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-BF16
    "architectures": ["NemotronHForCausalLM"], "model_type": "nemotron_h", "torch_dtype": "bfloat16", "vocab_size": 131072, "hidden_size": 2688,
    "num_hidden_layers": 52, "hybrid_override_pattern": "MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME",
    "num_attention_heads": 32, "num_key_value_heads": 2, "head_dim": 128, "attention_bias": False, "attention_dropout": 0.0,
    "mamba_num_heads": 64, "mamba_head_dim": 64, "ssm_state_size": 128, "n_groups": 8, "conv_kernel": 4, "chunk_size": 128, "expand": 2,
    "mamba_hidden_act": "silu", "mamba_proj_bias": False, "use_bias": False, "use_conv_bias": True,
    "time_step_min": 0.001, "time_step_max": 0.1, "time_step_floor": 0.0001,
    "n_routed_experts": 128, "num_experts_per_tok": 6, "n_shared_experts": 1, "moe_intermediate_size": 1856, "moe_shared_expert_intermediate_size": 3712,
    "n_group": 1, "topk_group": 1, "norm_topk_prob": True, "routed_scaling_factor": 2.5,
    "intermediate_size": 1856, "mlp_hidden_act": "relu2", "mlp_bias": False, "layer_norm_epsilon": 1e-5, "norm_eps": 1e-5,
    "initializer_range": 0.02, "rescale_prenorm_residual": True, "residual_in_fp32": False, "hidden_dropout": 0.0, "tie_word_embeddings": False,
    "max_position_embeddings": 262144, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
SMALL = NANO_30B | {
    "vocab_size": 512, "hidden_size": 64, "num_hidden_layers": 4, "hybrid_override_pattern": "ME*E", "num_attention_heads": 4, "head_dim": 16,
    "mamba_num_heads": 4, "mamba_head_dim": 32, "ssm_state_size": 16, "n_groups": 2, "chunk_size": 16, "n_routed_experts": 8,
    "num_experts_per_tok": 2, "moe_intermediate_size": 32, "moe_shared_expert_intermediate_size": 64, "intermediate_size": 64,
}  # fmt: skip
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "in_proj", "shared_experts.up_proj", "shared_experts.down_proj"]
EXPERTS = ["experts.up_proj", "experts.down_proj"]
MEDIAN_LENGTH, SPREAD = 500, 0.9  # of the documents' log-normal lengths


@dataclass(frozen=True)
class Setting:
    """One run. `part` is contender-weights-sequence, as native-bf16-4096."""

    part: str
    small: bool
    device: str
    experts: bool
    checkpointing: str
    warmup_steps: int
    steps: int

    @property
    def contender(self) -> str:
        return self.part.split("-")[0]

    @property
    def is_quantized(self) -> bool:
        return self.part.split("-")[1] == "nf4"

    @property
    def sequence(self) -> int:
        """Tokens of a packed row, and of a step."""
        return int(self.part.split("-")[2]) // (64 if self.small else 1)

    @cached_property
    def raw_config(self) -> dict[str, Any]:
        return dict(SMALL if self.small else NANO_30B)

    @cached_property
    def config(self) -> NemotronHConfig:
        config = parse_config(self.raw_config)
        assert isinstance(config, NemotronHConfig)
        return config

    @cached_property
    def loader(self) -> Loader:
        """A packed row a step, the same for every contender."""
        return Loader(Rows(self), global_batch_size=1, micro_batch_size=1, seed=0)  # type: ignore[arg-type]

    @property
    def measured(self) -> list[Batch]:
        """The batches of the steps that are timed."""
        return [batch for i in range(self.steps) for batch in self.loader.step(self.warmup_steps + i)]

    @property
    def lora(self) -> Lora:
        """What every token passes, but Mamba's out_proj, which PEFT refuses; with `experts` the routed ones too."""
        return Lora(rank=16, alpha=32, targets=tuple(LINEAR + (EXPERTS if self.experts else [])))


class Rows:
    """Packed rows of random tokens, as data/split.py gives them. Lengths are log-normal, the second half of each document is supervised."""

    in_order = False

    def __init__(self, setting: Setting):
        random, sequence = np.random.RandomState(0), setting.sequence
        median = MEDIAN_LENGTH // (64 if setting.small else 1)
        wanted = sequence * (setting.warmup_steps + setting.steps + 1)
        lengths: list[int] = []
        while sum(lengths) < wanted:
            lengths.append(int(np.clip(random.lognormal(np.log(median), SPREAD), 2, sequence)))
        self.documents = [
            Document(random.randint(0, setting.raw_config["vocab_size"], length).astype(np.int32), np.arange(length) >= length // 2, row)
            for row, length in enumerate(lengths)
        ]
        self.packs = [np.array(group) for group in pack(lengths, capacity=sequence)[:-1]]  # the last one may be half empty

    def __len__(self) -> int:
        return len(self.documents)

    def __getitem__(self, index: int) -> Document:
        return self.documents[index]


def timed(step: Callable[[int], float], setting: Setting, clock: Clock) -> dict[str, float]:
    """Seconds and peak memory of the measured steps, after those that warm up; the first loss of all and the last. `step` returns its loss."""
    losses = [step(i) for i in range(setting.warmup_steps)]
    if setting.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    started = clock.now()
    losses += [step(setting.warmup_steps + i) for i in range(setting.steps)]
    seconds = clock.now() - started
    return {"seconds": seconds, "device_peak_gb": peak_memory_bytes() / 1e9, "first_loss": losses[0], "last_loss": losses[-1]}
