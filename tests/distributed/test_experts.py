"""Experts divided among processes train as those of one do, whoever gets how many tokens."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.distributed as dist
from processes import in_processes
from random_models import make
from toy_split import ToySplit
from toy_steps import LENGTHS, PACKS, Case, assert_same, take_steps, traces, whole

from nemotune.data.loader import Loader
from nemotune.distributed import Gradients, World, arrange, connect, layouts_of, replicas
from nemotune.distributed.world import BATCHES, TOKENS
from nemotune.lora import apply_lora
from nemotune.models import load_model
from nemotune.ops.documents import Documents
from nemotune.recipe import Lora
from nemotune.recipe.degrees import Degrees
from nemotune.train.balance import Balance
from nemotune.train.health import Liveness, unreached_experts
from nemotune.train.step import accumulate

TWO = [Degrees(data=2, expert=2)]
ROW = Documents(torch.tensor([0, 12, 30], dtype=torch.int32), torch.device("cpu"))
FOUR = [Degrees(data=4, expert=2), Degrees(data=4, expert=4)]
BESIDE_TENSOR = Degrees(data=2, tensor=2, expert=2)


def skewed():
    """All tokens choose the first two experts, which lie in one process."""
    model = make("hybrid", n_routed_experts=8)
    for name, tensor in model.state_dict().items():
        if name.endswith("e_score_correction_bias"):
            tensor[:2] += 50
    return model


@pytest.fixture(scope="module")
def cases(tmp_path_factory) -> dict[str, Case]:
    directory = tmp_path_factory.mktemp("models")
    models = {
        "plain": make("hybrid", n_routed_experts=8),
        "latent": make("latent", n_routed_experts=8, hybrid_override_pattern="EM*-E"),
        "skewed": skewed(),
    }
    for name, model in models.items():
        model.save_pretrained(directory / name)
    return {
        "adapters": Case(directory / "plain"),
        "dropout": Case(directory / "plain", dropout=0.3, steps=2),
        "all of it": Case(directory / "plain", method="full"),
        "latent": Case(directory / "latent", dropout=0.3, steps=3),
        "latent, all of it": Case(directory / "latent", method="full", steps=3),
        "skewed": Case(directory / "skewed", dropout=0.3, steps=3),
        "skewed, all of it": Case(directory / "skewed", method="full", steps=3),
        "computed again": Case(directory / "plain", method="full", steps=2, checkpointing="full"),
        "computed again in part": Case(directory / "plain", dropout=0.3, steps=2, checkpointing="selective"),
        "skewed and computed again": Case(directory / "skewed", dropout=0.3, steps=2, checkpointing="full"),
    }


@pytest.fixture(scope="module")
def alone(cases):
    return {name: take_steps(case) for name, case in cases.items()}


def test_two_processes_with_half_of_the_experts_train_as_one(cases, alone):
    found, balanced, in_four_bits, reached = in_processes(2, work_of_two, cases)
    for (name, _), trace in found.items():
        assert_same(trace, alone[name])
    assert_near(balanced, balanced_routers(cases["all of it"].directory, World()))
    assert_near(in_four_bits, adapted_in_four_bits(cases["latent"].directory, World()))
    assert [set(unreached_experts([of_rank]).values()) for of_rank in reached] == [{2}, {4}]  # of four in each
    assert list(unreached_experts(reached).values()) == [6] * 4


def work_of_two(cases):
    world = World(TWO[0], rank=dist.get_rank())
    return (
        traces(cases, TWO),
        balanced_routers(cases["all of it"].directory, world),
        adapted_in_four_bits(cases["latent"].directory, world),
        world.gather(experts_reached(cases["skewed"].directory, world)),
    )


def assert_near(found, expected):
    for mine, theirs in zip(found, expected, strict=True):
        assert (mine - theirs).abs().max() <= 1e-5 * theirs.abs().max()


def balanced_routers(directory, world):
    """The routers' gradients and biases after a step that balances them."""
    model = load_model(directory, dtype="float32", trainable=True, arrange=partial(arrange, world=world)).train()
    connect(model, world, None)
    balance = Balance(model, rate=0.1, coef=1.0, total=lambda summed: world.sum(summed, *TOKENS))
    hand = (world.index(*BATCHES), world.degree(*BATCHES))
    loader = Loader(ToySplit(LENGTHS, packs=PACKS), global_batch_size=4, micro_batch_size=1, seed=0, hand=hand)
    accumulate(model, loader.step(0), keys=None, seed=0, step=0, balance=balance, world=world)
    parameters = dict(model.named_parameters())
    Gradients(parameters, layouts_of(model), replicas=replicas(model), world=world).reduce()
    balance.step()
    gates = [block.mixer.gate for block in model.blocks if block.block_type == "moe"]
    return [gate.weight.grad for gate in gates] + [gate.e_score_correction_bias for gate in gates]


def adapted_in_four_bits(directory, world):
    """The hidden states of a row, and the gradients of the adapters of experts, whole."""
    model = adapted(directory, world, quantization="nf4")
    hidden_TD = model(torch.arange(30) * 7 % 96, ROW)
    hidden_TD.square().sum().backward()
    parts = {name: p.grad / world.size for name, p in model.named_parameters() if p.requires_grad}  # all saw the same row
    return [hidden_TD.detach(), *whole(parts, layouts_of(model), world).values()]


def experts_reached(directory, world):
    """Module by module, which of those that this process holds saw a gradient; it raises where one that did has none."""
    model = adapted(directory, world).train()
    liveness = Liveness(model)
    model(torch.arange(30) * 7 % 96, ROW).square().sum().backward()
    liveness.check()
    liveness.judge()
    return liveness.reached()


def adapted(directory, world, **options):
    model = load_model(directory, dtype="float32", arrange=partial(arrange, world=world), **options)
    connect(model, world, apply_lora(model, Lora(rank=4, targets=("experts",))))
    return model


def test_four_processes_with_experts_in_pairs_and_apart_and_beside_tensor_ranks_train_as_one(cases, alone):
    found, balanced = in_processes(4, work_of_four, cases)
    for (name, _), trace in found.items():
        assert_same(trace, alone[name])
    assert_near(balanced, balanced_routers(cases["all of it"].directory, World()))


def work_of_four(cases):
    apart = {name: cases[name] for name in ("dropout", "latent, all of it", "skewed", "skewed and computed again")}
    beside = {name: cases[name] for name in ("latent", "skewed, all of it")}
    with_tensor = World(BESIDE_TENSOR, rank=dist.get_rank())
    return {**traces(apart, FOUR), **traces(beside, [BESIDE_TENSOR])}, balanced_routers(cases["all of it"].directory, with_tensor)
