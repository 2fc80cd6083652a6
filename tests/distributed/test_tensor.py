"""Ranks that share every mixer, the embeddings and the head train as one process does, and meet once each way in a region."""

from __future__ import annotations

from contextlib import contextmanager
from functools import partial
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from processes import in_processes
from random_models import make
from toy_split import ToySplit
from toy_steps import LENGTHS, PACKS, Case, assert_same, take_steps, traces, whole

from nemotune.data.loader import Loader
from nemotune.distributed import Gradients, World, arrange, connect, layouts_of, replicas
from nemotune.distributed.regions import regions
from nemotune.distributed.world import BATCHES, TOKENS
from nemotune.models import load_model
from nemotune.ops.documents import Documents
from nemotune.recipe.degrees import Degrees
from nemotune.train.balance import Balance
from nemotune.train.step import accumulate

EVERYTHING = ("attention", "mamba", "mlp", "shared_experts", "experts", "latent", "head", "out_proj")


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("models")
    for variant in ("hybrid", "four_ways", "llama", "llama_tied"):
        make(variant).save_pretrained(directory / variant)
    return directory


def two_ways(models: Path) -> dict[str, Case]:
    return {
        "computed again": Case(models / "llama", checkpointing="selective", steps=2),
        "latent with dropout": Case(models / "four_ways", targets=EVERYTHING, dropout=0.3, steps=3),
        "llama": Case(models / "llama", targets=("attention", "mlp", "head")),
        "tied": Case(models / "llama_tied", method="full"),
    }


def four_ways(models: Path) -> dict[str, Case]:
    return {
        "latent with dropout": Case(models / "four_ways", targets=EVERYTHING, dropout=0.3, steps=2),
        "latent, all of it": Case(models / "four_ways", method="full", steps=2),
        "llama with dropout": Case(models / "llama", dropout=0.3, steps=2),
        "tied": Case(models / "llama_tied", method="full", steps=2),
    }


def test_two_ranks_that_share_a_model_train_as_one(models):
    for (name, _), trace in in_processes(2, traces, two_ways(models), [Degrees(tensor=2)]).items():
        assert_same(trace, take_steps(two_ways(models)[name]))


def test_four_ranks_that_share_a_model_train_as_one(models):
    """One all-reduce each way in a region; a loss of the router counts once; all ranks come to the same bits."""
    found, (meetings, loss_in_training, loss_in_validation), aux, hidden = in_processes(4, four_ranks, models)
    alone = {name: take_steps(case) for name, case in four_ways(models).items()}
    assert {name for name, _ in found} == alone.keys()
    for (name, _), trace in found.items():
        assert_same(trace, alone[name])
    tokens, supervised, width = 12, 9, 32
    assert len(meetings) == 2 * 3 + 5  # llama's and the hybrid's mixers
    assert all(sizes == ([tokens * width], [tokens * width]) for sizes in meetings.values()), meetings
    assert loss_in_training == [supervised, 2 * supervised, supervised * width]  # maximum, sums, gradient of what the head sees
    assert loss_in_validation == [supervised, 2 * supervised]
    for name, gradient in gradients_of_balance(models, World()).items():
        assert (aux[name] - gradient).abs().max() <= 1e-5 * gradient.abs().max(), name
    assert all(torch.equal(of_rank, hidden[0]) for of_rank in hidden)


def four_ranks(models: Path):
    found = traces(four_ways(models), [Degrees(tensor=4)])
    return found, *what_is_said(models)


def what_is_said(models: Path):
    world = World(Degrees(tensor=4), rank=dist.get_rank())
    torch.manual_seed(0)  # the same row everywhere
    documents, x_TD = Documents(torch.tensor([0, 5, 12], dtype=torch.int32)), torch.randn(12, 32, requires_grad=True)
    targets_T = torch.arange(12).masked_fill(torch.arange(12) < 3, -100)
    meetings, hidden_TD = {}, None
    for variant in ("llama", "four_ways"):
        model = parallel(models / variant, world)
        for name, region in regions(model).items():
            if name == "lm_head":
                continue
            more = (documents, model.rope(documents.positions_T))[: 2 if variant == "llama" else 1]
            more = () if not hasattr(region, "core") and not hasattr(region, "scan") else more
            with all_reduced() as forward:
                y_TD = region(x_TD, *more)
            with all_reduced() as backward:
                y_TD.sum().backward()
            meetings[f"{variant}.{name}"] = forward, backward
        hidden_TD = model(torch.arange(12), documents).detach()
    with all_reduced() as in_training:
        model.loss(x_TD, targets_T).backward()
    with all_reduced() as in_validation, torch.no_grad():
        model.loss(x_TD, targets_T)
    return (meetings, in_training, in_validation), gradients_of_balance(models, world), world.gather(hidden_TD)


def parallel(directory: Path, world: World):
    model = load_model(directory, dtype="float32", trainable=True, arrange=partial(arrange, world=world))
    connect(model, world, None)
    return model


def gradients_of_balance(models: Path, world: World) -> dict[str, torch.Tensor]:
    """Of a loss that the routers' balance rules; whole."""
    model = parallel(models / "four_ways", world)
    balance = Balance(model, rate=0.0, coef=100.0, total=lambda summed: world.sum(summed, *TOKENS))
    loader = Loader(
        ToySplit(LENGTHS, packs=PACKS),
        global_batch_size=4,
        micro_batch_size=1,
        seed=0,
        hand=(world.index(*BATCHES), world.degree(*BATCHES)),
    )
    accumulate(model.train(), loader.step(0), keys=None, seed=0, step=0, balance=balance, world=world)
    parameters, layouts = dict(model.named_parameters()), layouts_of(model)
    Gradients(parameters, layouts, replicas=replicas(model), world=world).reduce()
    return whole({name: p.grad for name, p in parameters.items() if p.grad is not None}, layouts, world)


@contextmanager
def all_reduced():
    """The sizes of what is all-reduced meanwhile."""
    sizes, all_reduce = [], dist.all_reduce

    def counting(values, *args, **kwargs):
        sizes.append(values.numel())
        return all_reduce(values, *args, **kwargs)

    with patch.object(dist, "all_reduce", counting):
        yield sizes
