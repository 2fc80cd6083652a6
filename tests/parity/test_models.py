"""Our models against transformers': logits, gradients, and files in both directions."""

from __future__ import annotations

import pytest
import torch
from random_models import VARIANTS, make, relative, with_our_dt_limits
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from nemotune.models import load_model, save_model


@pytest.fixture
def pair(request, tmp_path):
    theirs = make(request.param)
    theirs.save_pretrained(tmp_path / "hf")
    return with_our_dt_limits(theirs), load_model(tmp_path / "hf", dtype="float32", trainable=True)


def their_name(name):
    """transformers' name of our parameter: another prefix, and experts without `.weight`."""
    name = name.replace("backbone.", "model.")
    return name.removesuffix(".weight") if ".experts." in name else name


@pytest.mark.parametrize("length", [1, 7, 8, 29])
@pytest.mark.parametrize("pair", VARIANTS, indirect=True)
def test_logits_equal_transformers(pair, length):
    theirs, ours = pair
    tokens = torch.randint(0, 96, (length,), generator=torch.Generator().manual_seed(1))
    got = ours.logits(ours(tokens, torch.tensor([0, length], dtype=torch.int32)))
    assert relative(got, theirs(tokens[None], use_cache=False).logits[0]) < 1e-4


@pytest.mark.parametrize("pair", VARIANTS, indirect=True)
def test_gradients_equal_transformers(pair):
    theirs, ours = pair
    tokens = torch.randint(0, 96, (29,), generator=torch.Generator().manual_seed(1))
    weights = torch.randn(29, 96, generator=torch.Generator().manual_seed(2))
    (ours.logits(ours(tokens, torch.tensor([0, 29], dtype=torch.int32))) * weights).sum().backward()
    (theirs(tokens[None], use_cache=False).logits[0] * weights).sum().backward()
    reference = {name: p.grad for name, p in theirs.named_parameters()}
    ours_by_their_name = {their_name(name): p.grad for name, p in ours.named_parameters()}
    assert ours_by_their_name.keys() == reference.keys()
    for name, gradient in reference.items():
        assert relative(ours_by_their_name[name], gradient) < 1e-3, name


def test_transformers_clamps_dt_where_megatron_does_not(tmp_path):
    theirs = make("hybrid")
    theirs.save_pretrained(tmp_path / "hf")
    ours = load_model(tmp_path / "hf", dtype="float32")
    with torch.no_grad():
        for model in (theirs, ours):
            for name, parameter in model.named_parameters():
                if name.endswith("dt_bias"):
                    parameter.fill_(-9.0)  # dt well below time_step_min
    tokens = torch.arange(29)
    got = ours.logits(ours(tokens, torch.tensor([0, 29], dtype=torch.int32)))
    as_released = relative(got, theirs(tokens[None], use_cache=False).logits[0])
    assert as_released > 1e-3
    assert relative(got, with_our_dt_limits(theirs)(tokens[None], use_cache=False).logits[0]) < 1e-4


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_saving_gives_every_tensor_back(variant, dtype, tmp_path):
    theirs = make(variant).to(getattr(torch, dtype))
    theirs.save_pretrained(tmp_path / "hf", max_shard_size="20KB")
    save_model(load_model(tmp_path / "hf", dtype=dtype), tmp_path / "ours")
    save_model(load_model(tmp_path / "ours", dtype=dtype), tmp_path / "again")
    before, after, again = (tensors_of(tmp_path / name) for name in ("hf", "ours", "again"))
    assert before.keys() == after.keys() == again.keys()
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype
        assert torch.equal(tensor.view(torch.uint8), after[name].view(torch.uint8)) and torch.equal(tensor, again[name]), name
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "ours") is not None


def tensors_of(directory):
    return {name: tensor for file in directory.glob("*.safetensors") for name, tensor in load_file(file).items()}
