"""Operations are those that PyTorch counts in what was computed, product by product, and for Nano-30B those of a pencil."""

from __future__ import annotations

import sys

import pytest
import torch
from random_models import make
from torch.utils.flop_counter import FlopCounterMode
from toy_loop import SPLIT

from nemotune.data.loader import Loader
from nemotune.lora import apply_lora
from nemotune.lora.targets import adaptable_modules
from nemotune.models import build_model, load_model, parse_config
from nemotune.models.nemotron_h import Scan
from nemotune.recipe import Lora
from nemotune.train import run
from nemotune.train.flops import Flops, num_pairs, peak_tflops
from nemotune.train.metrics import read_metrics

T, TARGETS = 50, 7


def grouped(x, weight, *args, out_val=None, **kwargs):
    """aten._grouped_mm, which PyTorch's counter does not know: [O, M] x [M, I] for the gradient of weights."""
    assert len(x) == len(weight) == 2
    return 2 * x[0] * x[1] * weight[1]


def counted(function) -> dict[str, int]:
    """The operations of each operator that `function` runs."""
    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten._grouped_mm: grouped}) as counter:
        function()
    return {str(operator).removeprefix("aten."): count for operator, count in counter.get_flop_counts()["Global"].items()}


def products(model) -> int:
    """The products with weights of a forward and backward over T tokens with TARGETS supervised ones: recurrence and attention, which
    multiply activations, are left out. (On the CPU the counter knows attention's operator no more than we do its blocks.)"""

    def step():
        hidden_TD = model(torch.arange(T), torch.tensor([0, 13, T], dtype=torch.int32))
        model.logits(hidden_TD[:TARGETS]).sum().backward()

    found = counted(step)
    return sum(found.get(operator, 0) for operator in ("mm", "addmm", "_grouped_mm"))


def expected(model) -> int:
    c, scans = model.config, sum(isinstance(module, Scan) for module in model.modules())
    recurrence = 12 * scans * c.mamba_num_heads * c.mamba_head_dim * c.ssm_state_size if scans else 0
    flops = Flops.of(model)
    return (flops.per_token - recurrence) * T + flops.per_target * TARGETS


@pytest.mark.parametrize("variant", ["hybrid", "latent", "unnormalised_router", "llama_biased", "llama_tied"])
def test_full_training_needs_the_products_that_were_counted(tmp_path, variant):
    make(variant).save_pretrained(tmp_path)
    model = load_model(tmp_path, dtype="float32", trainable=True).train()
    assert expected(model) == products(model)


@pytest.mark.parametrize("variant, quantization", [("latent", "none"), ("hybrid", "nf4"), ("llama", "none")])
def test_frozen_weights_need_no_gradient_and_adapters_their_own(tmp_path, variant, quantization):
    """With the embeddings adapted gradients pass every block."""
    make(variant).save_pretrained(tmp_path)
    model = load_model(tmp_path, dtype="float32", quantization=quantization)
    everything = Lora(rank=4, targets=tuple(set(adaptable_modules(model).values())))
    apply_lora(model, everything)
    if quantization == "none":
        assert expected(model.train()) == products(model)
    plain = load_model(tmp_path, dtype="float32")
    apply_lora(plain, everything)
    assert Flops.of(model) == Flops.of(plain)


def test_below_the_first_adapter_a_gradient_is_counted_that_is_not_computed(hybrid_dir):
    """The first block's in_proj needs none of its input: so much the convention is over."""
    model = load_model(hybrid_dir, dtype="float32")
    apply_lora(model, Lora(rank=4, targets=("mamba",)))
    first = model.blocks[0].mixer.in_proj
    assert expected(model.train()) - products(model) == 2 * T * first.in_features * (first.out_features + 4)


def test_a_recurrence_that_is_spelled_out_needs_the_operations_of_ours():
    N, P, S, steps = 6, 24, 16, 5
    inputs = [torch.randn(steps, N, *size, requires_grad=True) for size in ((P, 1), (1, S), (S, 1))]

    def recurrence():
        state, outputs = torch.zeros(N, P, S), []
        for x, B, C in zip(*inputs, strict=True):
            state = 0.9 * state + torch.bmm(x, B)
            outputs.append(torch.bmm(state, C))
        torch.stack(outputs).sum().backward()

    assert counted(recurrence) == {"bmm": 12 * N * P * S * steps}


def test_attention_needs_the_pairs_that_its_mask_leaves(tmp_path):
    make("llama").save_pretrained(tmp_path)
    model = load_model(tmp_path, dtype="float32")
    heads, head_dim, layers, length = 4, 16, 3, 11
    q, k, v = (torch.randn(heads, length, head_dim, requires_grad=True) for _ in range(3))
    square = counted(lambda: torch.bmm(torch.bmm(q, k.mT).tril(), v).sum().backward())["bmm"] * layers
    assert square == Flops.of(model).per_pair * length**2, "of all pairs"
    [batch] = Loader(SPLIT, global_batch_size=6, micro_batch_size=6, seed=0).step(0)
    lengths = batch.cu_seqlens.diff().tolist()
    assert num_pairs(batch) == sum(1 for length in lengths for query in range(length) for key in range(length) if key <= query)


NANO_30B = {
    "model_type": "nemotron_h", "vocab_size": 131072, "hidden_size": 2688, "num_attention_heads": 32, "num_key_value_heads": 2, "head_dim": 128,
    "hybrid_override_pattern": "MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME", "mamba_num_heads": 64, "mamba_head_dim": 64,
    "ssm_state_size": 128, "n_groups": 8, "n_routed_experts": 128, "num_experts_per_tok": 6, "moe_intermediate_size": 1856,
    "moe_shared_expert_intermediate_size": 3712,
}  # fmt: skip


def test_nano_30b_by_hand():
    mamba = 2688 * (4096 + 4096 + 2 * 8 * 128 + 64) + 4096 * 2688 + 2 * 4096 * 128  # in_proj, out_proj, recurrence
    attention = 2 * 2688 * 4096 + 2 * 2688 * 256  # q and o, k and v
    experts = 2688 * 128 + 6 * 2 * 2688 * 1856 + 2 * 2688 * 3712  # router, six of them, the shared one
    assert (mamba, attention, experts) == (39_755_776, 23_396_352, 80_166_912)
    model = build_model(parse_config(NANO_30B)).requires_grad_(True)
    flops = Flops.of(model)
    assert flops.per_token == 6 * (23 * mamba + 6 * attention + 23 * experts) == 17_391_599_616
    assert (flops.per_target, flops.per_pair) == (6 * 2688 * 131072, 12 * 6 * 32 * 128)

    apply_lora(model, Lora(rank=32, targets=("attention", "mamba")))
    adapters = 23 * 32 * (2688 + 10304 + 4096 + 2688) + 6 * 32 * (2 * (2688 + 4096) + 2 * (2688 + 256))
    frozen = 4 * (23 * (mamba - 2 * 4096 * 128) + 6 * attention + 23 * experts)
    assert Flops.of(model).per_token == frozen + 12 * 23 * 4096 * 128 + 6 * adapters
    assert Flops.of(model).per_target == 4 * 2688 * 131072


@pytest.mark.parametrize(
    "name, peak",
    [
        ("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H100 PCIe", 756), ("NVIDIA H200", 989), ("NVIDIA A100-SXM4-80GB", 312), ("NVIDIA L40S", 362),
        ("NVIDIA L4", 121), ("NVIDIA GB200", 2500), ("NVIDIA B200", 2250), ("NVIDIA GH200 480GB", 989), ("NVIDIA RTX A3000", None), ("Tesla T4", None),
    ],
)  # fmt: skip
def test_a_gpus_peak_is_known_by_its_name(monkeypatch, name, peak):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    cuda = torch.device("cuda")
    assert peak_tflops(cuda, torch.bfloat16) == peak
    assert peak_tflops(cuda, torch.float32) is None and peak_tflops(torch.device("cpu"), torch.bfloat16) is None


def test_metrics_tell_the_step_s_share_of_the_peak(train, tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[f"{run.__module__.rpartition('.')[0]}.loop"], "peak_tflops", lambda device, dtype: 2.0)
    model, _ = train("train.max_steps=3")
    loader = Loader(SPLIT, global_batch_size=2, micro_batch_size=1, seed=42)
    for number, row in enumerate(read_metrics(tmp_path / "run")):
        flops = Flops.of(model).of_batches(loader.step(number))
        assert row["model_tflops"] == pytest.approx(flops / row["seconds"] / 1e12) and row["mfu"] == row["model_tflops"] / 2
