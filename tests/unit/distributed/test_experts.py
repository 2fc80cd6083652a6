"""What a process holds of the experts, and the exchange of rows where there is nobody to exchange with."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from nemotune import assets
from nemotune.distributed import World, arrange
from nemotune.distributed.experts import Exchange
from nemotune.models import build_model, read_config
from nemotune.models.nemotron_h import Dispatcher
from nemotune.ops.experts import Routing
from nemotune.recipe.degrees import Degrees

E, K, T = 6, 3, 11


@pytest.fixture(scope="module")
def group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


def routed(tokens=T):
    """Rows, and a random routing of them with a gradient."""
    generator = torch.Generator().manual_seed(0)
    chosen = torch.rand(tokens, E, generator=generator).argsort(-1)[:, :K].sort(-1).values
    x_TD = torch.randn(tokens, 8, generator=generator).requires_grad_()
    return x_TD, Routing(chosen, torch.rand(tokens, K, generator=generator).requires_grad_())


def through(dispatcher, x_TD, routing):
    """Each row times its expert's number, from 1: the sum, and the gradients of rows and weights."""
    sent = dispatcher(routing)
    y_TD = sent.combine(sent.sorted_rows(x_TD) * (sent.experts_M + 1)[:, None])
    weights_TD = torch.linspace(-1, 1, y_TD.numel()).view_as(y_TD)
    return y_TD, *torch.autograd.grad((y_TD * weights_TD).sum(), [x_TD, routing.weights_TK])


def test_rows_that_stay_are_those_of_one_process_to_the_bit(group):
    x_TD, routing = routed()
    for mine, theirs in zip(
        through(Exchange(E, group, slice(0, None, 1)), x_TD, routing), through(Dispatcher(E), x_TD, routing), strict=True
    ):
        assert torch.equal(mine, theirs)
    sent, expected = Exchange(E, group, slice(0, None, 1))(routing), Dispatcher(E)(routing)
    for name in ("tokens_M", "experts_M", "ends_E", "rows_TK"):
        mine, theirs = getattr(sent, name), getattr(expected, name)
        assert torch.equal(mine, theirs) and mine.dtype == theirs.dtype
    assert torch.equal(sent.of_tokens(torch.arange(T)), expected.tokens_M)


@pytest.mark.parametrize("tokens", [T, 2, 1])
def test_tensor_ranks_route_shares_that_add_up_to_the_row(group, tokens):
    x_TD, routing = routed(tokens)
    shares = [through(Exchange(E, group, slice(index, None, 3)), x_TD, routing) for index in range(3)]
    for parts, expected in zip(zip(*shares, strict=True), through(Dispatcher(E), x_TD, routing), strict=True):
        assert torch.equal(sum(parts), expected)
    keys = [Exchange(E, group, slice(index, None, 3))(routing).of_tokens(torch.arange(tokens)) for index in range(3)]
    assert sorted(torch.cat(keys).tolist()) == sorted(Dispatcher(E)(routing).tokens_M.tolist())


def test_each_rank_holds_a_range_of_every_layers_experts():
    """Two pairs among four data ranks; the router and its numbers stay whole."""
    config = read_config(assets.resolve("nemotron-tiny"))
    width, hidden, (layer,) = (
        config.moe_intermediate_size,
        config.hidden_size,
        [i for i, kind in enumerate(config.block_types) if kind == "moe"],
    )
    for rank, held in enumerate([(0, 3), (3, 6), (0, 3), (3, 6)]):
        model = build_model(config)
        arrange(model, World(Degrees(data=4, expert=2), rank=rank))
        mixer = model.blocks[layer].mixer
        shapes = {mixer.experts.up_proj: (3, width, hidden), mixer.experts.down_proj: (3, hidden, width)}
        assert [(p.part.ranges[0], p.num_experts, tuple(p.weight.shape)) for p in shapes] == [
            ((held,), 3, shape) for shape in shapes.values()
        ]
        assert (len(mixer.gate.weight), len(mixer.gate.e_score_correction_bias), mixer.experts.dispatch.num_experts) == (6, 6, 6)
        assert len(model.layouts) == 2
