"""Packed documents never see each other: the packed row equals each document alone, forward and gradient."""

from __future__ import annotations

from itertools import pairwise

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
    """To the bit without experts. With them a product over an expert's tokens is of another shape, and rounds otherwise."""
    before, first_experts = outputs(model, row())
    assert len(first_experts) == getattr(model.config, "block_types", ()).count("moe")
    for changed, (start, end) in enumerate(pairwise(BORDERS.tolist())):
        tokens = row()
        tokens[start:end] = (tokens[start:end] + 1 + torch.arange(end - start) % 7) % 96
        after, experts = outputs(model, tokens)
        others = torch.cat([torch.arange(start), torch.arange(end, sum(LENGTHS))])
        if first_experts:
            assert relative(after[others], before[others]) < 1e-5, f"document {changed}"
        else:
            assert torch.equal(after[others], before[others]), f"document {changed}"
        assert not torch.equal(after[start:end], before[start:end])
        for layer, chosen in first_experts.items():
            assert torch.equal(experts[layer][others], chosen[others]), f"document {changed}, {layer}"


@torch.no_grad()
def outputs(model, tokens):
    """Hidden states, and the experts that each router chose [T, top_k], by its name."""
    chosen = {}

    def note(name):
        return lambda module, inputs, routing: chosen.update({name: routing.experts_TK.sort(-1).values})

    hooks = [module.register_forward_hook(note(name)) for name, module in model.named_modules() if name.endswith(".gate")]
    hidden = model(tokens, BORDERS)
    for hook in hooks:
        hook.remove()
    return hidden, chosen
