"""Packed documents never see each other: the packed row equals each document alone, forward and gradient."""

from __future__ import annotations

import pytest
import torch
from random_models import VARIANTS, make, relative

from nemotune.models import load_model

LENGTHS = [13, 1, 22, 5]


@pytest.fixture
def model(request, tmp_path):
    make(request.param).save_pretrained(tmp_path / "hf")
    return load_model(tmp_path / "hf", dtype="float32", trainable=True)


def row(seed=1):
    return torch.randint(0, 96, (sum(LENGTHS),), generator=torch.Generator().manual_seed(seed))


BORDERS = torch.tensor([0, *LENGTHS], dtype=torch.int32).cumsum(0, dtype=torch.int32)


@pytest.mark.parametrize("model", VARIANTS, indirect=True)
def test_packed_equals_separate(model):
    tokens, targets = row(), row(seed=2)
    packed = model(tokens, BORDERS)
    model.loss(packed, targets).backward()
    packed_gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    alone = [model(document, torch.tensor([0, len(document)], dtype=torch.int32)) for document in tokens.split(LENGTHS)]
    sum(model.loss(hidden, target) for hidden, target in zip(alone, targets.split(LENGTHS), strict=True)).backward()
    assert relative(packed, torch.cat(alone)) < 1e-5
    for name, parameter in model.named_parameters():
        assert relative(packed_gradients[name], parameter.grad) < 1e-5, name


@pytest.mark.parametrize("model", VARIANTS, indirect=True)
def test_changing_a_document_leaves_the_others(model):
    before = row()
    after = before.clone()
    after[: LENGTHS[0]] = row(seed=5)[: LENGTHS[0]]
    assert not torch.equal(before, after)
    with torch.no_grad():
        first, second = model(before, BORDERS)[LENGTHS[0] :], model(after, BORDERS)[LENGTHS[0] :]
    if "moe" in getattr(model.config, "block_types", ()):
        assert relative(second, first) < 1e-5
    else:
        assert torch.equal(first, second)
