"""What NF4 changes of the weights, and what an adapter does, are told as shares of the weights."""

from __future__ import annotations

import pytest
import torch
from random_models import make

from nemotune.export.nf4_difference import nf4_difference
from nemotune.export.tuned import open_tuned
from nemotune.lora import apply_lora, lora_modules, save_adapter
from nemotune.models import load_model
from nemotune.recipe import Lora


@pytest.mark.parametrize("variant", ["hybrid", "llama"])
def test_shares_are_those_of_the_quantised_model_and_of_the_update(variant, tmp_path):
    make(variant).save_pretrained(tmp_path / "base")
    lora = Lora(rank=4, alpha=8, targets=("attention", "mamba") if variant == "hybrid" else ("attention", "lm_head"))
    model = load_model(tmp_path / "base", dtype="float32")
    apply_lora(model, lora)
    for _, layer in lora_modules(model):
        torch.nn.init.normal_(layer.lora_B, std=0.05, generator=torch.Generator().manual_seed(1))
    save_adapter(model, tmp_path / "adapter", lora, base="base")
    found = nf4_difference(open_tuned(tmp_path / "base", tmp_path / "adapter"))

    narrow = load_model(tmp_path / "base", dtype="float32", quantization="nf4")
    sums = torch.zeros(3, dtype=torch.float64)
    for name, layer in lora_modules(model):
        if name != "lm_head":
            wide, eye = layer.base.weight, torch.eye(layer.in_features)
            lost = narrow.get_submodule(name)(eye).T - wide
            sums += torch.stack([t.double().square().sum() for t in (wide, lost, 2 * layer.lora_B @ layer.lora_A)]).detach()
    _, nf4, update = (sums / sums[0]).sqrt().tolist()
    assert found.nf4 == pytest.approx(nf4, rel=0.02) and 0.05 < nf4 < 0.15
    assert found.update == pytest.approx(update, rel=0.01)  # rows that are no multiple of 64 are cut off
