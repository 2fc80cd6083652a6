"""Evaluation and training speak of the same loss."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from random_models import make
from toy_split import ToySplit

from nemotune.data.example import Example
from nemotune.data.loader import batches
from nemotune.evaluate import perplexity, summarize
from nemotune.evaluate.candidate import Candidate
from nemotune.evaluate.rows import HeldOut
from nemotune.models import load_model
from nemotune.train.step import validation_loss


@pytest.mark.parametrize("variant", ["hybrid", "llama"])
def test_perplexity_is_the_validation_loss_of_training(variant, tmp_path):
    make(variant).save_pretrained(tmp_path)
    model = load_model(tmp_path, dtype="float32")
    split = ToySplit([13, 2, 30, 7, 22])
    tokenizer = SimpleNamespace(decode=lambda tokens, skip_special_tokens: "")
    candidate = Candidate(model, SimpleNamespace(tokenizer=SimpleNamespace(backend_tokenizer=tokenizer)))
    held_out = HeldOut([Example(meta={"row": row}) for row in range(5)], split.documents)
    # the same fp32 logits in other batches: a few units in the last place
    assert summarize(perplexity.score(candidate, held_out))["perplexity"]["loss"]["value"] == pytest.approx(
        validation_loss(model, batches(split, max_tokens=32)), rel=2e-6
    )
