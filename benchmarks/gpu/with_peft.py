"""The other contender of benchmarks.gpu.train: transformers with PEFT, its torch fallbacks in place of kernels that are not installed.

Its convolution and scan know no borders, so documents are padded: sorted by length, as many to a batch as the step's row would hold.
Gradient checkpointing is transformers' own, all or nothing.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, NemotronHConfig
from transformers.loss.loss_utils import ForCausalLMLoss

from benchmarks.gpu.native import held_bytes
from benchmarks.gpu.setting import EXPERTS, LINEAR, Setting, timed
from benchmarks.roofline import Clock
from nemotune.data.loader import IGNORED, Batch


def measure(setting: Setting, clock: Clock) -> dict[str, float]:
    """`timed`, the bytes of the weights, and the share of what was computed that is padding."""
    model = random_model(setting)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, weight_decay=0.0, fused=True)

    def step(index: int) -> float:
        (batch,) = setting.loader.step(index)
        supervised, batches = batch.num_supervised, padded_batches(batch.to(setting.device), setting.sequence)
        loss = sum(_backward(model, *padded, supervised) for padded in batches)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss

    figures = timed(step, setting, clock) | {"weights_gb": held_bytes(model) / 1e9}
    masks = [mask for batch in setting.measured for _, mask, _ in padded_batches(batch, setting.sequence)]
    return figures | {"padding": 1 - sum(int(mask.sum()) for mask in masks) / sum(mask.numel() for mask in masks)}


def random_model(setting: Setting) -> torch.nn.Module:
    """transformers' model, drawn by itself on the device, with the adapters of the setting in fp32."""
    config = NemotronHConfig(**{key: value for key, value in setting.raw_config.items() if key not in ("model_type", "torch_dtype")})
    with torch.device(setting.device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        if setting.checkpointing != "none":
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        lora = setting.lora
        adapters = LoraConfig(
            r=lora.rank, lora_alpha=lora.alpha, lora_dropout=0.0, target_modules=LINEAR,
            target_parameters=EXPERTS if setting.experts else None, task_type="CAUSAL_LM",
        )  # fmt: skip
        return get_peft_model(model, adapters).train()


def padded_batches(batch: Batch, limit: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Tokens, mask and targets [documents, longest] of at most `limit` places."""
    lengths = batch.cu_seqlens.diff().tolist()
    documents = sorted(zip(batch.tokens_T.split(lengths), batch.targets_T.split(lengths), strict=True), key=lambda pair: -len(pair[0]))
    while documents:
        count = max(1, limit // len(documents[0][0]))
        group, documents = documents[:count], documents[count:]
        tokens, targets = zip(*group, strict=True)
        mask = pad_sequence([torch.ones_like(row) for row in tokens], batch_first=True)
        yield pad_sequence(tokens, batch_first=True), mask, pad_sequence(targets, batch_first=True, padding_value=IGNORED)


def _backward(model: torch.nn.Module, tokens: Tensor, mask: Tensor, targets: Tensor, supervised: int) -> float:
    logits = model(input_ids=tokens, attention_mask=mask, use_cache=False).logits
    loss = ForCausalLMLoss(logits, None, logits.shape[-1], shift_labels=targets, num_items_in_batch=supervised)
    loss.backward()
    return loss.item()
