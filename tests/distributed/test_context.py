"""Several processes that share a row train as one does, wherever the borders of their pieces fall."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from processes import in_processes
from random_models import make
from torch import Tensor, nn
from toy_split import ToySplit
from toy_steps import Case, Trace, assert_same, take_steps, traces

from nemotune.data.loader import FILLER, IGNORED, Batch, collate
from nemotune.distributed import World, connect
from nemotune.distributed.context import PieceAttention, PieceConv, PieceScan
from nemotune.distributed.pieces import Piece
from nemotune.distributed.rows import row_of
from nemotune.distributed.world import TOKENS
from nemotune.models import load_model
from nemotune.ops.attention import varlen_attention_ref
from nemotune.ops.conv import causal_conv1d_ref
from nemotune.ops.documents import Documents
from nemotune.ops.ssd_ref import ssd_ref
from nemotune.recipe.degrees import Degrees
from nemotune.train.activation import set_activation_checkpointing
from nemotune.train.balance import Balance
from nemotune.train.step import accumulate

ROWS = {  # lengths of documents
    "one over all pieces": [41],
    "borders within, at and one after a document's": [10, 1, 9, 6, 14],  # of 40 tokens: pieces begin at 10, 20, 30
    "three pieces of one": [3, 32, 5],
    "one after a border": [9, 10, 12, 9],
    "pieces shorter than the kernel": [7],
    "fewer tokens than pieces": [2, 1],
    "a filler": [2],
}


def borders(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int()


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_pieces_say_where_they_lie_and_what_they_need():
    pieces = [Piece(borders([10, 1, 9, 6, 14]), rank=rank, ranks=4) for rank in range(4)]
    assert [piece.lengths for piece in pieces] == [[10], [1, 9], [6, 4], [10]]
    assert [piece.numbers for piece in pieces] == [slice(0, 1), slice(1, 3), slice(3, 5), slice(4, 5)]
    assert [piece.before for piece in pieces] == [0, 0, 0, 4]
    assert pieces[2].positions_T.tolist() == [*range(6), *range(4)] and pieces[3].positions_T.tolist() == list(range(4, 14))
    assert [piece.traffic() for piece in pieces[2:]] == [([0, 0, 0, 4], [0] * 4), ([0] * 4, [0, 0, 4, 0])]
    over_three = [Piece(borders([3, 32, 5]), rank=rank, ranks=4) for rank in range(4)]
    assert [piece.traffic().sent for piece in over_three] == [[0, 7, 7, 7], [0, 0, 10, 10], [0, 0, 0, 10], [0] * 4]
    assert [piece.traffic(3).sent for piece in over_three] == [[0, 3, 0, 0], [0, 0, 3, 0], [0, 0, 0, 3], [0] * 4]
    short = [Piece(borders([7]), rank=rank, ranks=4) for rank in range(4)]
    assert [piece.tokens for piece in short] == [slice(0, 1), slice(1, 3), slice(3, 5), slice(5, 7)]
    assert short[3].traffic(3).received == [0, 1, 2, 0] and short[3].extended(3).lengths == [5]


def test_a_piece_without_tokens_is_nobodys():
    batch = Batch(torch.tensor([5, 6]), borders([2]), torch.tensor([6, IGNORED]), torch.tensor([8]))
    rows = [row_of(batch, torch.device("cpu"), World(Degrees(context=4), rank=rank)) for rank in range(4)]
    assert [row.tokens_T.tolist() for row in rows] == [[0], [5], [0], [6]]
    assert [row.document_ids.tolist() for row in rows] == [[FILLER], [8], [FILLER], [8]]
    assert [row.targets_T.tolist() for row in rows] == [[IGNORED], [6], [IGNORED], [IGNORED]]
    assert [row.documents.positions_T.tolist() for row in rows] == [[0], [0], [0], [1]]


HEADS, GROUPS, WIDTH, STATE, CHANNELS = 4, 2, 8, 5, 12
SHAPES = {  # of each token's inputs
    "attention": [(HEADS, WIDTH), (GROUPS, WIDTH), (GROUPS, WIDTH)],
    "conv": [(CHANNELS,)],
    "scan": [(HEADS, WIDTH), (HEADS,), (GROUPS, STATE), (GROUPS, STATE)],
}


IN_ONE: dict[str, Callable[..., Tensor]] = {  # the references, of which none cuts anything
    "attention": lambda q, k, v, documents, state: varlen_attention_ref(q, k, v, documents),
    "conv": lambda x, conv1d, documents, state: causal_conv1d_ref(x, conv1d.weight.squeeze(1), conv1d.bias, documents),
    "scan": lambda *inputs: ssd_ref(*inputs[:-1])[0],
}


def of_ops(lengths: list[int], cores: Mapping[str, Callable[..., Tensor]], documents: Documents) -> dict[str, Tensor]:
    """Outputs of the cores over a row or a piece of it, and the gradients of each token's inputs ("d") and of parameters ("p")."""
    piece = documents if isinstance(documents, Piece) else None
    conv1d, found = nn.Conv1d(CHANNELS, CHANNELS, 4, groups=CHANNELS), {}
    with torch.no_grad():
        for seed, parameter in enumerate(conv1d.parameters()):
            parameter.copy_(drawn(*parameter.shape, seed=seed))
    A, D = (-drawn(HEADS, seed=2).exp()).requires_grad_(), drawn(HEADS, seed=3).requires_grad_()
    parameters = {"attention": [], "conv": [conv1d.weight, conv1d.bias], "scan": [A, D]}

    def here(values: Tensor) -> Tensor:
        return values[:1] * 0 if piece and piece.is_empty else values[piece.tokens if piece else slice(None)]

    for name, core in cores.items():
        inputs = [here(drawn(sum(lengths), *shape, seed=10 + number)) for number, shape in enumerate(SHAPES[name])]
        if name == "scan":
            inputs[1] = 0.2 * inputs[1].exp()
        inputs = [each.clone().requires_grad_() for each in inputs]
        if name == "attention":
            y = core(*inputs, documents, None)
        elif name == "conv":
            y = core(*inputs, conv1d, documents, None)
        else:
            x, dt, B, C = inputs
            y = core(x, dt, A, B, C, D, documents, None)
        of_y = here(drawn(sum(lengths), *y.shape[1:], seed=20))
        gradients = torch.autograd.grad(y, [*inputs, *parameters[name]], of_y)
        per_token = {f"{name} y": y.detach(), **{f"{name} d{number}": each for number, each in enumerate(gradients[: len(inputs)])}}
        found |= {key: each[:0] if piece and piece.is_empty else each for key, each in per_token.items()}
        found |= {f"{name} p{number}": each for number, each in enumerate(gradients[len(inputs) :])}
    return found


def errors_of_ops(world: World) -> dict[tuple[str, str], float]:
    """The largest difference of each result put together from one in one process, as a share of its largest value."""
    group, errors = world.group("context"), {}
    in_pieces = {"attention": PieceAttention(group), "conv": PieceConv(group), "scan": PieceScan(8, group)}
    for row, lengths in ROWS.items():
        piece = Piece(borders(lengths), rank=world.rank, ranks=world.size)
        parts = world.gather(of_ops(lengths, in_pieces, piece))
        alone = of_ops(lengths, IN_ONE, Documents(borders(lengths)))
        for name, expected in alone.items():
            pieces = [part[name] for part in parts]
            together = torch.stack(pieces).sum(0) if " p" in name else torch.cat(pieces)
            errors[row, name] = ((together - expected).abs().max() / expected.abs().max()).item()
    return errors


def of_documents(directory: Path, world: World) -> bool:
    """Whether every document but the changed one comes out to the bit as it did, and the changed one does not."""
    model = load_model(directory, dtype="float32")
    connect(model, world, None)
    lengths = ROWS["one after a border"]
    piece = Piece(borders(lengths), rank=world.rank, ranks=world.size)
    tokens_T = torch.arange(sum(lengths)) % 90
    fine = True
    for number in range(len(lengths)):
        changed_T = torch.where(Documents(borders(lengths)).indices_T == number, tokens_T + 3, tokens_T)
        with torch.no_grad():
            before, after = (model(row_T[piece.tokens], piece) for row_T in (tokens_T, changed_T))
        is_changed_T = (before != after).any(-1)
        fine &= is_changed_T.equal(piece.indices_T + piece.numbers.start == number)
    return all(world.gather(fine))


def of_blocks_computed_again(directory: Path, world: World) -> float:
    """The largest difference that activation checkpointing makes to a gradient, of what it is in all."""
    model = load_model(directory, dtype="float32", trainable=True)
    connect(model, world, None)
    piece = Piece(borders([23, 18]), rank=world.rank, ranks=world.size)
    tokens_T, gradients = torch.arange(41)[piece.tokens], []
    for mode in ("none", "selective", "full"):
        set_activation_checkpointing(model, mode)
        model.zero_grad()
        model.row_loss(tokens_T, piece, tokens_T + 1).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    difference = max((other - gradients[0]).abs().max().item() for other in gradients[1:])
    return max(world.gather(difference / gradients[0].abs().max().item()))


def biases_moved(directory: Path, world: World) -> list[Tensor]:
    """The correction biases after one step of balancing."""
    model = load_model(directory, dtype="float32", trainable=True)
    connect(model, world, None)
    balance = Balance(model, rate=0.1, coef=0.0, total=lambda summed: world.sum(summed, *TOKENS))
    batches = [collate(ToySplit([23, 18, 2]), documents) for documents in ([0, 1], [2])]
    accumulate(model, batches, keys=None, seed=0, step=0, balance=balance, world=world)
    balance.step()
    return [bias for name, bias in model.named_buffers() if name.endswith("e_score_correction_bias")]


def in_four(directory: Path, cases: dict[str, Case]) -> dict[str, Any]:
    world = World(Degrees(context=4), rank=dist.get_rank())
    return {
        "errors of ops": errors_of_ops(world),
        "documents apart": of_documents(directory / "wide_heads", world),
        "computed again": of_blocks_computed_again(directory / "hybrid", world),
        "biases": biases_moved(directory / "hybrid", world),
        "traces": traces(cases, [Degrees(context=4), Degrees(data=2, context=2)])
        | traces({name: cases[name] for name in ["hybrid with dropout"]}, [Degrees(context=2, tensor=2)]),
    }


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("models")
    for variant in ("hybrid", "llama", "wide_heads"):
        make(variant).save_pretrained(directory / variant)
    return directory


@pytest.fixture(scope="module")
def cases(directory) -> dict[str, Case]:
    """Of the last, the first two rows leave some of four pieces without tokens."""
    return {
        "hybrid": Case(directory / "hybrid", steps=4),
        "hybrid with dropout": Case(directory / "hybrid", dropout=0.3, steps=2),
        "hybrid, all of it": Case(directory / "hybrid", method="full", steps=3),
        "llama with dropout": Case(directory / "llama", dropout=0.3, steps=3),
        "llama, all of it": Case(directory / "llama", method="full", checkpointing="full", steps=2),
        "hybrid, short rows": Case(directory / "hybrid", method="full", steps=2, lengths=(3, 2, 60, 2), packs=((0,), (1, 3), (2,))),
    }


@pytest.fixture(scope="module")
def alone(cases) -> dict[str, Trace]:
    return {name: take_steps(case) for name, case in cases.items()}


@pytest.fixture(scope="module")
def four(directory, cases) -> dict[str, Any]:
    return in_processes(4, in_four, directory, cases)


def test_two_pieces_train_as_whole_rows(cases, alone):
    for (name, _), trace in in_processes(2, traces, cases, [Degrees(context=2)]).items():
        assert_same(trace, alone[name])


def test_four_pieces_and_two_of_two_rows_or_of_half_the_heads_train_as_whole_rows(four, alone):
    for (name, _), trace in four["traces"].items():
        assert_same(trace, alone[name])


def test_pieces_put_together_are_the_row_forward_and_backward(four):
    assert len(four["errors of ops"]) == 15 * len(ROWS)
    assert {key: error for key, error in four["errors of ops"].items() if error > 2e-6} == {}


def test_a_document_knows_nothing_of_the_others(four):
    assert four["documents apart"]


def test_blocks_are_computed_again_across_pieces(four):
    assert four["computed again"] < 1e-6


def test_routers_are_balanced_over_all_pieces(four, directory):
    expected = biases_moved(directory / "hybrid", World())
    assert len(expected) == 2 and all(map(torch.equal, four["biases"], expected))
