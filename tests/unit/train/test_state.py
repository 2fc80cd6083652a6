"""A state saved in parts is read in any other parts: each block is written once, and lies at its place in the whole tensor."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from nemotune.errors import CheckpointError
from nemotune.train.state import blocks_to_write, kept_layouts, load_state, shares
from nemotune.train.storage import write_blocks
from nemotune.weights import Layout

SHAPE = (12, 10)
WHOLE = Layout.whole(SHAPE)
SEGMENTS = [
    ((0, 2), (4, 6), (8, 9)),
    ((2, 4), (6, 8), (8, 9)),
    ((9, 12),),
]  # of a fused projection: one segment is everyone's, one only the last's
WAYS = {
    "one": [WHOLE],
    "copies": [WHOLE, WHOLE, WHOLE],
    "uneven rows, and none": [WHOLE.rows(0, 5), WHOLE.rows(5, 10), WHOLE.rows(10, 12), WHOLE.rows(12, 12)],
    "columns": [WHOLE.along(1, [(0, 3)]), WHOLE.along(1, [(3, 10)])],
    "segments": [WHOLE.along(0, ranges) for ranges in SEGMENTS],
    "rows of segments": [WHOLE.along(0, ranges).rows(*rows) for ranges in SEGMENTS[:2] for rows in ((0, 2), (2, 5))] + [WHOLE.along(0, SEGMENTS[2])],
    "experts, their columns": [WHOLE.along(0, [rows]).along(1, [columns]) for rows in ((0, 6), (6, 12)) for columns in ((0, 5), (5, 10))],
    "a stage has it twice, one not at all": [WHOLE.rows(0, 6), WHOLE.rows(6, 12), None, WHOLE.rows(0, 6), WHOLE.rows(6, 12)],
}  # fmt: skip


def values(seed: int) -> torch.Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))


def held(layout: Layout | None, kind: type, *, seed: int) -> tuple[nn.Module, torch.optim.Optimizer, dict[str, Layout]]:
    """A process with that part of `weight`, and an optimiser that took two steps."""
    model = nn.Module()
    model.bias = nn.Parameter(values(seed + 1)[0])
    if layout is not None:
        model.weight = nn.Parameter(layout.take(values(seed)).clone())
    options = {"momentum": 0.9} if kind is torch.optim.SGD else {}
    optimizer = kind(model.parameters(), lr=0.1, **options)
    for step in range(2):
        model.bias.grad = values(seed + step)[1]
        if layout is not None:
            model.weight.grad = layout.take(values(seed + step + 2)).clone()
        optimizer.step()
    return model, optimizer, {} if layout is None else {"weight": layout}


def everything(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    moments = {f"{n}.{key}": value for n, p in model.named_parameters() for key, value in optimizer.state[p].items()}
    return {**{name: p.detach() for name, p in model.named_parameters()}, **moments}


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD])
@pytest.mark.parametrize("way", WAYS)
def test_a_state_saved_in_any_parts_is_read_in_any_other(way, kind, tmp_path):
    ranks = [held(layout, kind, seed=0) for layout in WAYS[way]]
    turns = shares([kept_layouts(model, layouts) for model, _, layouts in ranks])
    blocks = [block for rank, turn in zip(ranks, turns, strict=True) for block in blocks_to_write(*rank, turn)]
    assert len({(block.name, block.offsets) for block in blocks}) == len(blocks)
    one = everything(*held(WHOLE, kind, seed=0)[:2])
    assert sum(block.values.numel() for block in blocks) == sum(tensor.numel() for tensor in one.values()), "each value once"
    write_blocks(blocks, tmp_path / "state", beside=lambda _: None)
    for other in WAYS.values():
        for layout in other:
            fresh, optimizer, layouts = held(layout, kind, seed=50)
            load_state(fresh, optimizer, layouts, tmp_path / "state")
            for name, tensor in everything(fresh, optimizer).items():
                part = layout.take(one[name]) if name.startswith("weight") and one[name].ndim == 2 else one[name]
                assert torch.equal(tensor, part), (other, name)


def test_writing_is_shared_evenly():
    turns = shares([{f"{i}": Layout.whole((100 + i, 7)) for i in range(20)}] * 4)
    assert sorted(len(turn) for turn in turns) == [5, 5, 5, 5]


@pytest.mark.parametrize("change", ["shape", "name"])
def test_a_state_of_another_model_is_named(change, tmp_path):
    rank = held(WHOLE, torch.optim.AdamW, seed=0)
    [turn] = shares([kept_layouts(rank[0], rank[2])])
    write_blocks(blocks_to_write(*rank, turn), tmp_path / "state", beside=lambda _: None)
    other = nn.Module()
    setattr(other, "weight" if change == "shape" else "other", nn.Parameter(torch.zeros(12, 9)))
    expected = r"model\.weight: got shape \(12, 10\), expected \(12, 9\)" if change == "shape" else r"model\.other: not in it"
    with pytest.raises(CheckpointError, match=expected):
        load_state(other, torch.optim.AdamW(other.parameters()), {}, tmp_path / "state")
