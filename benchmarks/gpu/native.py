"""One contender of benchmarks.gpu.train: nemotune's own step functions on a random model, drawn on the device tensor by tensor."""

from __future__ import annotations

import sys
from collections.abc import Callable
from itertools import chain, pairwise

import torch
from torch import nn

from benchmarks.gpu.setting import Setting, timed
from benchmarks.roofline import Clock
from nemotune.distributed.gradients import gradient_norm
from nemotune.lora import apply_lora
from nemotune.models import CausalLM, build_model
from nemotune.models.initialize import draw
from nemotune.models.quantize import quantize_modules
from nemotune.recipe import Train
from nemotune.train.activation import set_activation_checkpointing
from nemotune.train.optim import make_optimizer
from nemotune.train.step import accumulate, update


def measure(setting: Setting, clock: Clock, *, profile: bool = False) -> dict[str, float]:
    """`timed`, the bytes of the weights, and the seconds of a step's forward, backward and optimiser alone."""
    run = Run(setting)
    figures = timed(run.step, setting, clock) | {"weights_gb": held_bytes(run.model) / 1e9}
    figures |= run.breakdown(clock, setting.warmup_steps)
    if profile:
        print_kernels(lambda: run.step(setting.warmup_steps), setting.device)
    return figures


class Run:
    """A model with adapters, an optimiser and batches."""

    def __init__(self, setting: Setting):
        self.model = random_model(setting)
        self.keys = apply_lora(self.model, setting.lora)
        self.loader = setting.loader
        self.parameters = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        self.optimizer = make_optimizer(self.parameters, Train())
        set_activation_checkpointing(self.model, setting.checkpointing)
        self.model.train()

    def step(self, index: int) -> float:
        """A step as train/run.py takes it; returns the loss."""
        result = accumulate(self.model, self.loader.step(index), keys=self.keys, seed=0, step=index)
        self.update()
        return result.loss

    def update(self) -> None:
        norm = gradient_norm(self.parameters.values())
        update(self.parameters.values(), self.optimizer, learning_rate=1e-4, grad_norm=norm, max_grad_norm=1.0)

    def breakdown(self, clock: Clock, index: int) -> dict[str, float]:
        """Seconds of the parts of one step, waited for after each. The head's gradient is taken in the forward."""
        (batch,) = self.loader.step(index)
        batch = batch.to(self.model.device)
        times = [clock.now()]
        loss = self.model.loss(self.model(batch.tokens_T, batch.cu_seqlens), batch.targets_T) / batch.num_supervised
        times.append(clock.now())
        loss.backward()
        times.append(clock.now())
        self.update()
        times.append(clock.now())
        forward, backward, optimizer = (end - start for start, end in pairwise(times))
        return {"forward_seconds": forward, "backward_seconds": backward, "optimizer_seconds": optimizer}


@torch.no_grad()
def random_model(setting: Setting) -> CausalLM:
    """Nemotron-H with weights drawn as for pretraining: in bf16, or quantised to NF4 as each matrix is drawn."""
    model = build_model(setting.config)
    model.compute_dtype = torch.bfloat16
    wanted = model.state_dict()
    quantized = quantize_modules(model, device=setting.device) if setting.is_quantized else {}
    for name, meta in wanted.items():
        with torch.device(setting.device):
            values = draw(name, meta.shape, model, seed=0)
        if name in quantized:
            for index in range(len(values)) if values.ndim == 3 else [None]:
                quantized[name].fill(values if index is None else values[index], index)
        else:
            dtype = torch.float32 if model.stays_fp32(name) else torch.bfloat16
            model.load_state_dict({name: values.to(dtype)}, strict=False, assign=True)
    return model.requires_grad_(False)


def held_bytes(model: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in chain(model.parameters(), model.buffers()))


def print_kernels(step: Callable[[], object], device: str) -> None:
    """The twenty kernels (on a CPU: operations) that take most of a step."""
    with torch.profiler.profile() as found:
        step()
    order = "self_device_time_total" if device == "cuda" else "self_cpu_time_total"
    print(found.key_averages().table(sort_by=order, row_limit=20), file=sys.stderr)
