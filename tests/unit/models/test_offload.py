"""Experts that lie on the host compute what experts on the device compute, and at most two blocks of them are there at a time."""

from __future__ import annotations

import pytest
import torch
from random_models import NEMOTRON, make
from rich.console import Console
from transformers import NemotronHConfig

from nemotune.engines import native
from nemotune.errors import UnsupportedError
from nemotune.lora import apply_lora, lora_modules
from nemotune.models import build_model, load_model, read_config, save_model
from nemotune.models.offload import BUFFERS, Lender, expert_blocks
from nemotune.models.quantize import NF4GroupedLinear, NF4Linear, quantize_modules
from nemotune.recipe import Lora, load
from nemotune.train.activation import set_activation_checkpointing
from nemotune.workflow import stages

TOKENS, BORDERS = torch.arange(31), torch.tensor([0, 20, 31], dtype=torch.int32)
MODES = ["none", "selective", "full"]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """Four blocks of experts."""
    path = tmp_path_factory.mktemp("model")
    NemotronHConfig(
        **{**NEMOTRON, "hybrid_override_pattern": "EM*EE-E", "num_hidden_layers": 7, "moe_intermediate_size": 32}
    ).save_pretrained(path)
    save_model(load_model(path, dtype="float32", random_seed=0), path / "weights")
    return path / "weights"


def a_model(directory, *, offload, quantization="none", mode="none", targets=("attention", "mamba", "experts")):
    model = load_model(directory, dtype="bfloat16", quantization=quantization, offload=offload).train()
    apply_lora(model, Lora(rank=4, alpha=8, targets=targets))
    for _, layer in lora_modules(model):
        torch.nn.init.normal_(layer.lora_B, std=0.1, generator=torch.Generator().manual_seed(1))
    set_activation_checkpointing(model, mode)
    return model


def lender_of(model) -> Lender:
    return expert_blocks(model)[0][0].lent.lender


def step(model):
    loss = model.loss(model(TOKENS, BORDERS), TOKENS)
    loss.backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    return [loss.detach(), *gradients]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_loss_and_gradients_are_the_same_bits(directory, quantization, mode):
    settings = {"quantization": quantization, "mode": mode}
    plain, offloaded = (a_model(directory, offload=offload, **settings) for offload in ("none", "experts"))
    for _ in range(2):
        found, expected = step(offloaded), step(plain)
        assert len(found) > 20 and all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("mode", MODES)
def test_blocks_are_fetched_ahead_in_the_order_of_their_use(directory, mode, monkeypatch):
    """Forwards 0 1 2 3; backwards 3 and 2 are still there, then 1 0; the next pass finds 0 and 1."""
    model, copied = a_model(directory, offload="experts", mode=mode), []
    real = Lender._copy
    monkeypatch.setattr(Lender, "_copy", lambda self, block, buffer: copied.append((self.in_use, block)) or real(self, block, buffer))
    step(model)
    # each but the first is fetched while the one before it is in use
    assert copied == [(-1, 0), (0, 1), (1, 2), (2, 3), (2, 1), (1, 0)]
    copied.clear()
    step(model)
    assert copied == [(1, 2), (2, 3), (2, 1), (1, 0)]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_no_graph_holds_experts_and_two_blocks_of_them_are_on_the_device(directory, quantization, mode):
    """What the backward is given shares no memory with the buffers, nor with the host; and all that is lent are the buffers."""
    model = a_model(directory, offload="experts", quantization=quantization, mode=mode)
    lender, saved, lent = lender_of(model), set(), set()
    assert len(lender.buffers) == BUFFERS == 2 and len(lender.host) == 4
    ours = {t.untyped_storage().data_ptr() for tensors in [*(b.tensors for b in lender.buffers), *lender.host] for t in tensors}
    real = lender.lend
    lender.lend = lambda block: [lent.add(t.untyped_storage().data_ptr()) or t for t in real(block)]
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.add(t.untyped_storage().data_ptr()) or t, lambda t: t):
        loss = model.loss(model(TOKENS, BORDERS), TOKENS)
    loss.backward()
    assert saved and not saved & ours
    assert lent == {t.untyped_storage().data_ptr() for buffer in lender.buffers for t in buffer.tensors}


def test_experts_are_read_to_the_host_and_never_to_the_device(directory):
    """Meta stands for the device: there the experts have only their buffers, and adapters lie beside what they compute with."""
    model = load_model(directory, offload="experts", device="meta")
    experts = {parameter for modules in expert_blocks(model) for module in modules for parameter in module.parameters()}
    assert experts and all(parameter.device.type == "cpu" for parameter in experts)
    assert {t.device.type for t in {*model.parameters(), *model.buffers()} - experts} == {"meta"}
    apply_lora(model, Lora(targets=("experts",)))
    assert {p.device.type for _, layer in lora_modules(model) for p in (layer.lora_A, layer.lora_B)} == {"meta"}


def test_experts_are_quantised_to_the_host(directory):
    model = build_model(read_config(directory))
    quantize_modules(model, device="meta", experts_device="cpu")
    kinds = {type(module): module.nf4_codes.device.type for module in model.modules() if isinstance(module, NF4Linear | NF4GroupedLinear)}
    assert kinds == {NF4Linear: "meta", NF4GroupedLinear: "cpu"}


@pytest.mark.parametrize("variant", ["llama", "one_group"])
def test_a_model_without_experts_refuses(tmp_path, variant):
    make(variant).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="^model.offload: got 'experts', expected none: this .* has no experts"):
        load_model(tmp_path, offload="experts")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("verb", [stages.run, stages.train])
def test_a_machine_without_a_gpu_refuses_by_key_before_any_row_is_read(directory, tmp_path, verb):
    recipe = load("quickstart", [f"model.path={directory}", "model.offload=experts"])
    with pytest.raises(UnsupportedError, match=r"^model\.offload: got 'experts'.* no GPU"):
        verb(recipe, run_dir=tmp_path / "run", resume=False, overwrite=False, dry_run=False, console=Console(quiet=True))
    assert not (tmp_path / "run").exists()
    with pytest.raises(UnsupportedError, match=r"^model\.offload: "):
        native.load_base(recipe)
    with pytest.raises(
        UnsupportedError, match=r"^train\.activation_checkpointing: got 'offload'.* use train\.activation_checkpointing=full"
    ):
        native.load_base(load("quickstart", ["train.activation_checkpointing=offload"]))
