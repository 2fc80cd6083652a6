"""What stops a run: adapters whose gradient is dead, values that are not finite, a loss that runs away; alone and in the loop."""

from __future__ import annotations

import itertools
import math
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from toy_loop import rows
from toy_split import ToySplit

from nemotune.data.loader import Loader
from nemotune.errors import TrainingError
from nemotune.lora import LoRAExperts, LoRALinear, apply_lora, lora_modules
from nemotune.models import load_model
from nemotune.recipe import Lora
from nemotune.train import health
from nemotune.train.activation import set_activation_checkpointing
from nemotune.train.health import EXPERT_STEPS, Liveness, SpikeGuard, require_finite, unreached_experts
from nemotune.train.step import accumulate
from nemotune.weights import Layout


@pytest.fixture
def adapted(hybrid_dir):
    model = load_model(hybrid_dir, dtype="float32").train()
    return model, apply_lora(model, Lora(rank=4, alpha=8, targets=("attention", "mamba", "mlp", "shared_experts", "experts")))


def micro_batches(*lengths, size=None):
    """One step's documents of these lengths, `size` to a micro batch, else all in one."""
    return Loader(ToySplit(lengths), global_batch_size=len(lengths), micro_batch_size=size or len(lengths), seed=0).step(0)


def watched(adapted, liveness, *, steps, batches=None):
    """So many backwards and checks."""
    model, keys = adapted
    for step in range(steps):
        model.zero_grad()
        accumulate(model, batches or micro_batches(30, 20, 25), keys=keys, seed=0, step=step)
        liveness.check()


def move_b(model):
    with torch.no_grad():
        for _, layer in lora_modules(model):
            layer.lora_B.normal_(0, 0.1, generator=torch.Generator().manual_seed(1))


def first_experts(model):
    return next((name, layer) for name, layer in lora_modules(model) if isinstance(layer, LoRAExperts))


def bypass_out_proj(model):
    """As a fused kernel does that takes the weight of Mamba's out_proj."""
    layer = model.backbone.layers[0].mixer.out_proj
    layer.forward = partial(torch.nn.functional.linear, weight=layer.base.weight)


def bypass_experts(model):
    """The forward finds the frozen layers where the adapted ones are, as with a kernel that takes the weights."""
    experts = model.backbone.layers[1].mixer.experts
    frozen = SimpleNamespace(up_proj=experts.up_proj.base, down_proj=experts.down_proj.base, dispatch=experts.dispatch)
    experts.forward = partial(type(experts).forward, frozen)


# liveness


def test_every_adapter_is_alive_in_our_model(adapted):
    liveness = Liveness(adapted[0])
    watched(adapted, liveness, steps=1)
    move_b(adapted[0])
    watched(adapted, liveness, steps=EXPERT_STEPS)


def test_an_adapter_that_the_forward_bypasses_stops_the_run(adapted):
    bypass_out_proj(adapted[0])
    with pytest.raises(TrainingError, match=r"layers\.0\.mixer\.out_proj\.lora_B"):
        watched(adapted, Liveness(adapted[0]), steps=1)


@pytest.mark.parametrize("kind", [LoRALinear, LoRAExperts])
def test_a_dead_lora_a_stops_the_run_once_b_has_moved(adapted, kind):
    liveness = Liveness(adapted[0])
    victim = next(layer for _, layer in lora_modules(adapted[0]) if type(layer) is kind)
    victim.lora_A.register_hook(torch.zeros_like)
    watched(adapted, liveness, steps=1)
    move_b(adapted[0])
    with pytest.raises(TrainingError, match="lora_A"):
        watched(adapted, liveness, steps=EXPERT_STEPS - 1)


def test_a_dead_magnitude_stops_the_run(hybrid_dir):
    model = load_model(hybrid_dir, dtype="float32").train()
    keys = apply_lora(model, Lora(rank=4, targets=("attention", "mamba"), dora=True))
    watched((model, keys), Liveness(model), steps=1)
    model.backbone.layers[2].mixer.q_proj.lora_magnitude_vector.register_hook(torch.zeros_like)
    with pytest.raises(TrainingError, match=r"1 adapter tensors .*layers\.2\.mixer\.q_proj\.lora_magnitude_vector"):
        watched((model, keys), Liveness(model), steps=1)


def embedded(hybrid_dir):
    model = load_model(hybrid_dir, dtype="float32").train()
    return model, apply_lora(model, Lora(rank=4, targets=("embeddings", "attention")))


def test_of_embeddings_a_is_alive_from_the_first_backward_and_b_once_a_has_moved(hybrid_dir):
    model, keys = embedded(hybrid_dir)
    layer = model.embeddings
    watched((model, keys), Liveness(model), steps=1)
    assert layer.lora_embedding_A.grad.any() and not layer.lora_embedding_B.grad.any()
    with torch.no_grad():
        layer.lora_embedding_A.sub_(layer.lora_embedding_A.grad)
    watched((model, keys), Liveness(model), steps=1)
    assert layer.lora_embedding_B.grad.any()


def test_tokens_that_have_not_moved_yet_give_b_no_gradient_and_that_is_no_error(hybrid_dir):
    model, keys = embedded(hybrid_dir)
    liveness = Liveness(model)
    watched((model, keys), liveness, steps=1)
    unseen = ~model.embeddings.lora_embedding_A.grad.any(0)
    with torch.no_grad():
        model.embeddings.lora_embedding_A.copy_(unseen)
    watched((model, keys), liveness, steps=1)
    assert unseen.any() and not model.embeddings.lora_embedding_B.grad.any()


@pytest.mark.parametrize("dead", ["lora_embedding_A", "lora_embedding_B"])
def test_dead_embeddings_stop_the_run(hybrid_dir, dead):
    model, keys = embedded(hybrid_dir)
    with torch.no_grad():
        model.embeddings.lora_embedding_A.normal_(0, 0.1)
    getattr(model.embeddings, dead).register_hook(torch.zeros_like)
    with pytest.raises(TrainingError, match=rf"1 adapter tensors .*backbone\.embeddings\.{dead};"):
        watched((model, keys), Liveness(model), steps=1)


def test_an_expert_that_receives_gradient_and_passes_none_on_stops_the_run(adapted):
    name, victim = first_experts(adapted[0])
    victim.lora_B.register_hook(lambda gradient: gradient * torch.arange(6.0).clamp(max=1)[:, None, None])  # expert 0 is dead
    with pytest.raises(TrainingError, match=rf"{name}: experts \[0\]"):
        watched(adapted, Liveness(adapted[0]), steps=EXPERT_STEPS)


def test_a_dead_expert_has_its_number_among_those_of_all_processes(adapted):
    name, victim = first_experts(adapted[0])
    _, *sizes = victim.base.weight.shape
    victim.base.part = Layout.whole((18, *sizes)).along(0, [(6, 12)])
    victim.lora_B.register_hook(lambda gradient: gradient * torch.arange(6.0).clamp(max=1)[:, None, None])
    with pytest.raises(TrainingError, match=rf"{name}: experts \[6\]"):
        watched(adapted, Liveness(adapted[0]), steps=EXPERT_STEPS)


def test_an_expert_that_the_base_has_pruned_is_no_error(adapted):
    """Its hidden rows are zero, so that a gradient comes to its down_proj and none can come to B."""
    model, _ = adapted
    experts = model.backbone.layers[1].mixer.experts
    with torch.no_grad():
        experts.up_proj.base.weight[2] = 0
    liveness = Liveness(model)
    watched(adapted, liveness, steps=EXPERT_STEPS)
    received = liveness.received["backbone.layers.1.mixer.experts.down_proj", "lora_B"]
    assert received.any() and not received[2]


def test_experts_that_the_forward_bypasses_stop_the_run(adapted):
    bypass_experts(adapted[0])
    liveness = Liveness(adapted[0])
    watched(adapted, liveness, steps=EXPERT_STEPS - 1)
    with pytest.raises(TrainingError, match=f"no gradient reached this module in {EXPERT_STEPS} steps"):
        watched(adapted, liveness, steps=1)


def test_experts_without_tokens_are_listed_and_are_no_error(adapted):
    with torch.no_grad():
        for name, buffer in adapted[0].named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.zero_()
                buffer[0] = buffer[1] = 99.0
    liveness = Liveness(adapted[0])
    watched(adapted, liveness, steps=EXPERT_STEPS)
    unreached = unreached_experts([liveness.reached()])
    assert set(unreached.values()) == {4} and len(unreached) == 4


def test_an_expert_is_reached_where_any_process_reached_it():
    of_processes = [
        {"a": {0: True, 1: False}},
        {"a": {0: False, 1: False, 2: False}, "b": {4: False}},
        {"b": {4: True, 5: False}, "c": {0: True}},
    ]
    assert unreached_experts(of_processes) == unreached_experts(of_processes[::-1]) == {"a": 2, "b": 1}


@pytest.mark.parametrize("mode", ["none", "full"])
def test_experts_are_watched_over_all_micro_batches_of_a_step(adapted, mode):
    model, _ = adapted
    set_activation_checkpointing(model, mode)
    batches = micro_batches(3, 3, 3, size=1)
    name, victim = first_experts(model)

    def reached(batches):
        liveness = Liveness(model)
        watched(adapted, liveness, steps=1, batches=batches)
        liveness.judge()
        return liveness.received[name, "lora_B"]

    alone = [reached([batch]) for batch in batches]
    assert torch.equal(reached(batches), alone[0] | alone[1] | alone[2])
    early = int((alone[0] & ~alone[2]).nonzero()[0])  # the last micro batch sends it no token
    victim.lora_B.register_hook(lambda gradient: gradient.index_fill(0, torch.tensor([early]), 0.0))
    with pytest.raises(TrainingError, match=rf"{name}: experts \[{early}\]"):
        reached(batches)


def test_a_dead_adapter_stops_the_loop_at_the_first_step(train, tmp_path):
    with pytest.raises(TrainingError, match=r"out_proj\.lora_B"):
        train("train.max_steps=3", "lora.targets=[mamba]", "train.checkpoint_every=1", doctor=bypass_out_proj)
    assert not rows(tmp_path / "run") and not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.parametrize("ending", [("train.max_steps=3",), ("train.max_steps=99", "train.eval_every=1", "train.early_stopping=1")])
def test_experts_are_judged_at_the_end_of_a_run_shorter_than_the_watch(train, tmp_path, ending):
    with pytest.raises(TrainingError, match=r"up_proj: no gradient reached this module in \d steps \(2 in all\)"):
        train(*ending, "train.learning_rate=3", doctor=bypass_experts)
    last = rows(tmp_path / "run")[-1]["step"]
    assert last < EXPERT_STEPS and not (tmp_path / "run" / "checkpoints" / f"step_{last:06}").exists()


# values that are not finite


def test_a_non_finite_gradient_is_named():
    good, bad = (torch.nn.Parameter(torch.ones(2)) for _ in range(2))
    good.grad, bad.grad = torch.ones(2), torch.tensor([1.0, math.inf])
    with pytest.raises(TrainingError, match=r"step 7: .*that of layers\.3\.bad"):
        require_finite(1.0, math.inf, {"layers.1.good": good, "layers.3.bad": bad}, step=7)


def test_a_gradient_that_is_not_finite_stops_the_loop_before_the_update(train, tmp_path):
    before = {}

    def doctor(model):
        before.update({p: p.detach().clone() for p in model.parameters() if p.requires_grad})
        _, victim = next(lora_modules(model))
        victim.lora_A.register_hook(lambda gradient: gradient * math.nan)

    with pytest.raises(TrainingError, match=r"step 1: .*lora_A"):
        train("train.max_steps=3", doctor=doctor)
    assert before and all(torch.equal(p, value) for p, value in before.items()) and not rows(tmp_path / "run")


# spikes


def test_a_spike_warns_and_divergence_stops():
    guard = SpikeGuard()
    assert all(guard.check(2.0, step=i) is None for i in range(32))
    assert "9.00" in guard.check(9.0, step=33)
    assert guard.check(2.0, step=34) is None
    with pytest.raises(TrainingError, match=r"lower train\.learning_rate"):
        for i in range(5):
            guard.check(9.0, step=35 + i)


def louder_from(step):
    """Doctor a model so that from optimiser step `step`, 1 being the first, its logits are wild: the loss jumps and stays high."""
    calls = itertools.count()

    def after_head(module, inputs, output):
        return output * 300 if next(calls) // 2 + 1 >= step else output

    return lambda model: model.lm_head.register_forward_hook(after_head)


def test_divergence_is_written_and_stops_the_loop_at_the_same_step_when_resumed(train, tmp_path, monkeypatch):
    monkeypatch.setattr(health, "SPIKE_WINDOW", 4)
    settings = "train.max_steps=20", "train.checkpoint_every=4"
    with pytest.raises(TrainingError, match="step 10: the loss has been over") as whole:
        train(*settings, doctor=louder_from(6))
    told = rows(tmp_path / "run", "warning")
    assert [row["step"] for row in told] == [6, 7, 8, 9] and "is usual" in told[0]["message"]
    assert max((tmp_path / "run" / "checkpoints").glob("step_*")).name == "step_000008", "between two of the warnings"
    with pytest.raises(TrainingError) as resumed:
        train(*settings, resume=True, doctor=louder_from(1))
    assert str(resumed.value) == str(whole.value) and rows(tmp_path / "run", "warning") == told
