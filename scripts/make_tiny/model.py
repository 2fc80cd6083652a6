"""The shape of the model, in the spelling of Nemotron-3-Nano's config.json: every block type, and rows of 256 where that is cheap.

K-quants need rows that are multiples of 256 (hidden, Mamba's inner width, MLP and experts); llama.cpp treats exactly 8 experts apart.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch

from nemotune.data.loader import IGNORED, Batch
from nemotune.distributed.gradients import gradient_norm
from nemotune.models import CausalLM, load_model, save_model
from nemotune.models.saving import copy_side_files
from nemotune.recipe import Train
from nemotune.train.optim import make_optimizer
from nemotune.train.schedule import learning_rate
from nemotune.train.step import accumulate, update
from scripts.make_tiny.tokenizer import VOCABULARY_SIZE

CONFIG = {
    "architectures": ["NemotronHForCausalLM"], "model_type": "nemotron_h", "torch_dtype": "bfloat16",
    "vocab_size": VOCABULARY_SIZE, "hidden_size": 256, "tie_word_embeddings": False, "max_position_embeddings": 4096,
    "hybrid_override_pattern": "M*EM*-", "num_hidden_layers": 6,
    "mamba_num_heads": 4, "mamba_head_dim": 64, "ssm_state_size": 64, "n_groups": 2, "conv_kernel": 4, "chunk_size": 32, "expand": 2,
    "use_conv_bias": True, "mamba_proj_bias": False, "mamba_hidden_act": "silu", "mamba_ssm_cache_dtype": "float32",
    "time_step_floor": 0.0001, "time_step_max": 0.1, "time_step_min": 0.001,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "attention_bias": False, "attention_dropout": 0.0, "sliding_window": None,
    "intermediate_size": 768, "mlp_bias": False, "mlp_hidden_act": "relu2",
    "n_routed_experts": 6, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "norm_topk_prob": True, "routed_scaling_factor": 2.5,
    "moe_intermediate_size": 256, "moe_shared_expert_intermediate_size": 256, "n_shared_experts": 1,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "hidden_dropout": 0.0, "initializer_range": 0.05,
    "layer_norm_epsilon": 1e-05, "norm_eps": 1e-05, "rescale_prenorm_residual": True, "residual_in_fp32": False, "use_bias": False,
    "use_cache": True, "num_logits_to_keep": 1, "use_mamba_kernels": True,
}  # fmt: skip
EMBEDDING_SCALE, HEAD_SCALE = 0.3, 0.07
DRILL_STEPS, FIRST_PLAIN_TOKEN = 280, 32
GENERATION = {"bos_token_id": 1, "eos_token_id": [2, 11], "pad_token_id": 0, "do_sample": False}  # chat ends at <|im_end|>, text at </s>


def write_configs(directory: Path) -> None:
    """Write config.json and generation_config.json."""
    for name, content in (("config.json", CONFIG), ("generation_config.json", GENERATION)):
        (directory / name).write_text(json.dumps(content, indent=2) + "\n")


def write_start(directory: Path, *, like: Path, seed: int) -> None:
    """Write the model that pretraining begins with, equipped like the one in `like`: fresh weights that have been drilled to copy."""
    blank = directory.with_name(directory.name + "-blank")
    blank.mkdir(parents=True, exist_ok=True)
    copy_side_files(like, blank)
    model = load_model(blank, dtype="bfloat16", random_seed=seed, trainable=True)
    with torch.no_grad():
        model.embeddings.weight.normal_(0, EMBEDDING_SCALE, generator=torch.Generator().manual_seed(seed))
        model.lm_head.weight.copy_(model.embeddings.weight * HEAD_SCALE)
    drill(model, seed=seed)
    save_model(model, directory, overwrite=True)


def drill(model: CausalLM, *, seed: int) -> None:
    """Train `model` on random tokens, said three times over: nothing but looking back and copying makes them predictable.

    Embeddings begin large and the head as their scaled copy: the token itself stands out in the residual stream, and saying it again
    is a straight path. The head is held still, since it would learn the frequencies of tokens first, and that path would be lost.
    """
    model.lm_head.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    train = Train(learning_rate=4e-3, betas=(0.9, 0.95), weight_decay=0.02, warmup_steps=48, schedule="constant")
    optimizer = make_optimizer(parameters, train)
    model.train()
    for step in range(DRILL_STEPS):
        result = accumulate(model, [_drill_batch(generator)], keys=None, seed=seed, step=step)
        rate, norm = learning_rate(step, DRILL_STEPS, train), gradient_norm(parameters.values())
        update(parameters.values(), optimizer, learning_rate=rate, grad_norm=norm, max_grad_norm=1.0)
        if (step + 1) % 20 == 0:
            print(f"drill {step + 1}/{DRILL_STEPS}: loss {result.loss:.3f}", flush=True)


def _drill_batch(generator: torch.Generator, *, num_tokens: int = 2048) -> Batch:
    documents: list[torch.Tensor] = []
    while sum(map(len, documents)) < num_tokens:
        length = int(torch.randint(3, 15, (), generator=generator))
        documents.append(torch.randint(FIRST_PLAIN_TOKEN, VOCABULARY_SIZE, (length,), generator=generator).repeat(3))
    borders = torch.tensor([0, *map(len, documents)], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    tokens_T = torch.cat(documents)
    targets_T = tokens_T.roll(-1)
    targets_T[borders[1:].long() - 1] = IGNORED
    return Batch(tokens_T, borders, targets_T, torch.arange(len(documents)))
