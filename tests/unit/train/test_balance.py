"""Experts are kept evenly used: loads are those of the global batch, each real token once, and so is the loss, whatever the cut and the mode."""

from __future__ import annotations

import pytest
import torch
from random_models import make, relative
from rich.console import Console
from toy_loop import HELD_OUT, SPLIT, interrupted_at, rows
from toy_split import ToySplit

from nemotune.data.loader import Batch, Loader
from nemotune.errors import RecipeError
from nemotune.models import load_model, save_model
from nemotune.models.nemotron_h import Router
from nemotune.ops.balance import balance_loss
from nemotune.ops.documents import Documents
from nemotune.recipe import Train, load
from nemotune.train import run
from nemotune.train.activation import set_activation_checkpointing
from nemotune.train.balance import Balance, require_experts
from nemotune.train.experts import ExpertCounter, routers
from nemotune.train.step import accumulate, validation_loss

LENGTHS = [9, 14, 6, 21, 8, 11, 5, 17]
MODES = ["none", "selective", "full"]


def full(directory):
    return load_model(directory, dtype="float32", trainable=True).train()


def global_batch(*, micro=8, packs=None) -> list[Batch]:
    split = ToySplit(LENGTHS, packs=packs)
    return Loader(split, global_batch_size=len(split.packs), micro_batch_size=micro, seed=0).step(0)


def choices(model, batches):
    """How often each expert of each layer is chosen, [layers, experts]."""
    counter = ExpertCounter(model)
    with torch.no_grad(), counter.counting():
        for batch in batches:
            model(batch.tokens_T, batch.cu_seqlens)
    return torch.tensor(list(counter.counts().values()))


def biases(model):
    return torch.stack([router.e_score_correction_bias.clone() for router in routers(model).values()])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("micro", [1, 8])
def test_a_bias_moves_by_the_rate_towards_the_mean_load_of_the_global_batch(hybrid_dir, mode, micro):
    model, batches = full(hybrid_dir), global_batch(micro=micro)
    before, loads = biases(model), choices(model, batches)
    balance = Balance(model, rate=1e-3, coef=1e-2)
    set_activation_checkpointing(model, mode)
    accumulate(model, batches, keys=None, seed=0, step=0, balance=balance)
    assert torch.equal(balance._counts_LE, loads) and int(loads[0].sum()) == sum(LENGTHS) * 2
    measured = balance.step()
    mean = loads.double().mean(1, keepdim=True)
    assert torch.equal(biases(model), before + 1e-3 * (mean - loads).sign().float()) and (loads != mean).any()
    assert measured["expert_max_violation"].item() == pytest.approx((loads / mean).max().item() - 1)
    assert not balance._counts_LE.any(), "the next step counts anew"


def test_loads_of_other_processes_are_summed_before_the_bias_moves(hybrid_dir):
    model, batches = full(hybrid_dir), global_batch(micro=1)
    loads, before = choices(model, batches), biases(model)
    others = choices(model, batches[4:])
    balance = Balance(model, rate=1e-3, coef=0.0, total=lambda seen: seen + others if seen.ndim == 2 else seen)
    accumulate(model, batches[:4], keys=None, seed=0, step=0, balance=balance)
    balance.step()
    assert torch.equal(biases(model), before + 1e-3 * (loads.double().mean(1, keepdim=True) - loads).sign().float())


FILLER = Batch(torch.tensor([1, 1]), torch.tensor([0, 2], dtype=torch.int32), torch.tensor([-100, -100]), torch.tensor([-1]))


def test_filler_documents_count_nowhere(hybrid_dir):
    found = []
    for batches in (global_batch(), [*global_batch(), FILLER]):
        model = full(hybrid_dir)
        balance = Balance(model, rate=1e-3, coef=1.0)
        accumulate(model, batches, keys=None, seed=0, step=0, balance=balance)
        assert int(balance._counts_LE[0].sum()) == sum(LENGTHS) * 2 and balance._tokens == sum(LENGTHS)
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    plain, filled = found
    assert plain.keys() == filled.keys() and all(torch.equal(plain[name], filled[name]) for name in plain)


def test_validation_and_generation_are_not_counted(hybrid_dir):
    model = full(hybrid_dir)
    balance = Balance(model, rate=1e-3, coef=1e-2)
    accumulate(model, global_batch(), keys=None, seed=0, step=0, balance=balance)
    counted = balance._counts_LE.clone()
    validation_loss(model, global_batch(micro=1))
    with torch.enable_grad():
        model(global_batch()[0].tokens_T, global_batch()[0].cu_seqlens)
    assert torch.equal(balance._counts_LE, counted)


def by_definition(scores_TE, lengths, top_k):
    """Equations 17 to 20 of arXiv 2412.19437, document by document, each weighed by its tokens."""
    total = 0.0
    for scores in scores_TE.split(lengths):
        tokens, num_experts = scores.shape
        shares = torch.zeros(num_experts, dtype=scores.dtype)
        for row in scores:
            for expert in row.detach().topk(top_k).indices:
                shares[expert] += num_experts / (top_k * tokens)
        means = (scores / scores.sum(1, keepdim=True)).sum(0) / tokens
        total = total + tokens * (shares * means).sum()
    return total


def test_the_loss_is_the_definition_s():
    lengths = [3, 1, 7]
    scores = torch.rand(11, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    documents = Documents(torch.tensor([0, 3, 4, 11], dtype=torch.int32))
    ours, expected = balance_loss(scores, documents, torch.ones(3), top_k=2), by_definition(scores, lengths, 2)
    assert ours.item() == pytest.approx(expected.item(), rel=1e-12)
    assert torch.allclose(*(torch.autograd.grad(value, scores)[0] for value in (ours, expected)), rtol=1e-10)
    even = torch.eye(6, dtype=torch.float64).repeat(2, 1) + 1e-3
    assert balance_loss(even, Documents(torch.tensor([0, 12], dtype=torch.int32)), torch.ones(1), top_k=1).item() == pytest.approx(12)


def test_one_document_a_row_is_what_megatron_has_for_a_sequence():
    """megatron-core 0.16.1, `switch_load_balancing_loss_func` on `compute_routing_scores_for_aux_loss`, as formulas: rows of one length."""
    scores = torch.rand(2 * 8, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    losses = []
    for row in scores.split(8):
        normal = row / row.sum(1, keepdim=True)
        tokens_per_expert = torch.zeros_like(row).scatter(1, normal.topk(2).indices, 1.0).sum(0)
        losses.append((normal.sum(0) * tokens_per_expert).sum() * 6 * 1e-4 / (2 * 8 * 8))
    ours = 1e-4 * balance_loss(scores, Documents(torch.tensor([0, 8, 16], dtype=torch.int32)), torch.ones(2), top_k=2) / 16
    assert ours.item() == pytest.approx(sum(losses).item() / 2, rel=1e-12)


def gradients(directory, *, coef, mode="none", **cut):
    model = full(directory)
    set_activation_checkpointing(model, mode)
    balance = Balance(model, rate=0.0, coef=coef)
    result = accumulate(model, global_batch(**cut), keys=None, seed=0, step=0, balance=balance)
    return (
        {name: p.grad for name, p in model.named_parameters()},
        result.loss,
        balance.step().get("router_aux_loss", torch.tensor(0.0)).item(),
    )


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("cut", [{"micro": 1}, {"micro": 2, "packs": [[7, 0], [3, 1], [2, 4, 5, 6]]}])
def test_neither_cut_nor_packing_nor_checkpointing_changes_the_loss_or_its_gradient(hybrid_dir, cut, mode):
    """fp32 sums in another order: 1e-5 of each tensor's largest, as for the language loss in test_step.py. With a coefficient of 1 the two
    losses' gradients are alike in size."""
    (one, loss, aux), (other, its_loss, its_aux) = gradients(hybrid_dir, coef=1.0), gradients(hybrid_dir, coef=1.0, mode=mode, **cut)
    plain, without, _ = gradients(hybrid_dir, coef=0.0)
    assert loss == without and its_loss == pytest.approx(loss, rel=1e-6), "the loss that is told is that of the language"
    assert its_aux == pytest.approx(aux, rel=1e-5) and 0.9 < aux < 2
    reached = [name for name in one if one[name] is not None]
    assert all(relative(other[name], one[name]) < 1e-5 for name in reached)
    gate = "backbone.layers.1.mixer.gate.weight"
    assert relative(one[gate], plain[gate]) > 0.1, "the loss of a layer reaches its router"


def test_the_attached_gradient_is_that_of_the_sum_of_both_losses(hybrid_dir):
    model, [batch] = full(hybrid_dir), global_batch()
    documents, seen = Documents(batch.cu_seqlens), []
    for router in routers(model).values():
        router.register_forward_hook(lambda _, x, routing: seen.append(routing.scores_TE))
    hidden = model(batch.tokens_T, documents)
    balance = sum(balance_loss(scores, documents, torch.ones(len(LENGTHS)), top_k=2) for scores in seen)
    (model.loss(hidden, batch.targets_T) / batch.num_supervised + 0.5 * balance / batch.num_tokens).backward()
    ours = gradients(hybrid_dir, coef=0.5)[0]
    for name, p in model.named_parameters():
        if p.grad is not None:
            assert relative(ours[name], p.grad) < 1e-5, name


SETTINGS = (
    "method=pretrain", "data.format=text", "lora.rank=4", "train.max_steps=6", "train.epochs=99", "train.global_batch_size=2", "train.micro_batch_size=1", "train.learning_rate=1e-3",
    "train.schedule=wsd", "train.checkpoint_every=2", "train.eval_every=null", "data.validation=null", "logging.every=1", "logging.trackers=[]",
    "train.router_bias_update_rate=0.01", "train.router_aux_loss_coef=1e-2", "train.activation_checkpointing=full", "export.merged=false",
)  # fmt: skip


def pretrain(directory, run_dir, *settings, doctor=lambda model: None, resume=False):
    model = full(directory)
    doctor(model)
    run(
        model, load("quickstart", (*SETTINGS, *settings)), train=SPLIT, validation=HELD_OUT, run_dir=run_dir, keys=None, resume=resume,
        console=Console(quiet=True),
    )  # fmt: skip
    return model


def test_a_resumed_run_moves_the_biases_as_one_that_was_never_stopped(hybrid_dir, tmp_path):
    whole = pretrain(hybrid_dir, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        pretrain(hybrid_dir, tmp_path / "run", doctor=interrupted_at(4))
    resumed = pretrain(hybrid_dir, tmp_path / "run", resume=True)
    assert all(torch.equal(value, resumed.state_dict()[name]) for name, value in whole.state_dict().items())
    assert rows(tmp_path / "run") == rows(tmp_path / "whole")
    moved = biases(whole) - biases(full(hybrid_dir))
    assert moved.abs().max() > 0.011, "more than one step's worth"
    assert {"router_aux_loss", "expert_max_violation"} <= rows(tmp_path / "run", "train")[-1].keys()

    save_model(whole, tmp_path / "saved")
    assert torch.equal(biases(load_model(tmp_path / "saved", dtype="bfloat16")), biases(whole))


def test_loads_become_more_even(hybrid_dir):
    """The weights stand still, so that only the biases can do it."""
    model, [batch] = full(hybrid_dir), global_batch()
    balance, worst = Balance(model, rate=0.05, coef=0.0), []
    for _ in range(60):
        balance.begin(batch.num_tokens)
        balance.turn_to(documents := Documents(batch.cu_seqlens), batch.document_ids)
        with balance.counting():
            model(batch.tokens_T, documents)
        worst.append(balance.step()["expert_max_violation"].item())
    assert worst[0] > 1 and max(worst[-5:]) < 0.5, worst


@pytest.mark.parametrize("key", ["router_bias_update_rate", "router_aux_loss_coef"])
def test_frozen_routers_and_models_without_experts_are_refused_by_key(tmp_path, key):
    with pytest.raises(RecipeError, match=rf"train.{key}: got 0.001, expected 0 for method: lora \(routers stay frozen\)"):
        load("quickstart", [f"train.{key}=1e-3"])
    make("llama").save_pretrained(tmp_path)
    model = load_model(tmp_path, dtype="float32", trainable=True)
    with pytest.raises(RecipeError, match=rf"train.{key}: got 0.001, expected 0: this llama has no experts"):
        Balance.of(model, Train(**{key: 1e-3}))
    assert Balance.of(model, Train()) is None
    require_experts(model, Train())


def test_nothing_is_hooked_where_nothing_is_asked_for(hybrid_dir):
    model = full(hybrid_dir)
    assert Balance.of(model, Train()) is None
    assert not any(module._forward_hooks for module in model.modules() if isinstance(module, Router))
