"""What a GGUF file is compared with is the merged model, though no more than a block of it is ever in memory."""

from __future__ import annotations

import pytest
import torch
from random_models import make

from nemotune.export.gguf.reference import reference_bytes, reference_logits
from nemotune.export.merge import merge
from nemotune.export.tuned import Tuned, open_tuned
from nemotune.lora import apply_lora, lora_modules, save_adapter
from nemotune.models import load_model
from nemotune.recipe import Lora

PROMPTS = [[5, 1, 9, 60, 2, 33], [90, 4], [7] * 11]


@pytest.mark.parametrize("variant", ["hybrid", "latent", "llama_tied", "llama_biased"])
def test_logits_equal_the_merged_models(variant, tmp_path, monkeypatch):
    make(variant).to(torch.bfloat16).save_pretrained(tmp_path / "base")
    trained, lora = load_model(tmp_path / "base", dtype="float32"), Lora(rank=4, alpha=8)
    apply_lora(trained, lora)
    with torch.no_grad():
        for _, layer in lora_modules(trained):
            layer.lora_B.normal_(0, 0.2, generator=torch.Generator().manual_seed(3))
    save_adapter(trained, tmp_path / "adapter", lora, base=str(tmp_path / "base"))
    merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")

    tuned, read = open_tuned(tmp_path / "base", tmp_path / "adapter"), []
    plain_read = Tuned.read
    monkeypatch.setattr(Tuned, "read", lambda self, name: read.append(name) or plain_read(self, name))
    ours, same = reference_logits(tuned, PROMPTS)
    merged = load_model(tmp_path / "merged", dtype="float32")
    borders = torch.tensor([0, 6, 8, 19], dtype=torch.int32)
    with torch.inference_mode():
        theirs = merged.logits(merged(torch.tensor([token for prompt in PROMPTS for token in prompt]), borders))
    assert torch.equal(ours, theirs) and torch.equal(same, ours) and ours.shape == (19, 96)

    assert all(parameter.is_meta for parameter in tuned.model.parameters())
    blocks = [name.split(".layers.")[1].split(".")[0] for name in read if ".layers." in name]
    assert blocks == sorted(blocks, key=int)  # each block is read once, in the order in which it is needed
    whole = 4 * sum(parameter.numel() for parameter in merged.parameters())
    assert reference_bytes(tuned) < whole


def test_rounding_is_shown_by_noise_on_every_matrix_that_a_file_rounds(tmp_path):
    """Logits move with the noise, in proportion while it is small; those of the exact model do not."""
    make("llama").save_pretrained(tmp_path / "base")
    tuned = open_tuned(tmp_path / "base")
    exact, _ = reference_logits(tuned, PROMPTS)
    moved = {}
    for noise in (1e-4, 2e-4):
        again, rounded = reference_logits(tuned, PROMPTS, noise=noise)
        assert torch.equal(again, exact)
        moved[noise] = (rounded - exact).square().mean().sqrt() / exact.std()
    assert 1e-4 < moved[1e-4] < 1e-3 and moved[2e-4] / moved[1e-4] == pytest.approx(2, rel=0.01)
