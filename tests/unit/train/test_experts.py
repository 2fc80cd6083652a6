"""Which experts the held-out rows are sent to is counted in the passes that are made anyway, and costs nothing where there are none."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from random_models import make
from rich.console import Console
from torch.utils._python_dispatch import TorchDispatchMode
from toy_loop import HELD_OUT, interrupted_at, rows, train_toy

from nemotune.data.loader import batches
from nemotune.models import load_model
from nemotune.models.nemotron_h import Router
from nemotune.train.experts import ExpertCounter, describe_load, load_row


def test_counts_are_the_routers_choices(hybrid_dir):
    model = load_model(hybrid_dir, dtype="float32")
    seen = {}
    for name, router in model.named_modules():
        if isinstance(router, Router):
            router.register_forward_hook(
                lambda _, x, routing, name=name: seen.setdefault(name, []).append(routing.experts_TK.numpy().copy())
            )
    counter = ExpertCounter(model)
    held_out = list(batches(HELD_OUT, max_tokens=12))
    assert len(held_out) == 2
    for _ in range(2):  # counting begins anew each time
        seen.clear()
        with torch.no_grad(), counter.counting():
            for batch in held_out:
                model(batch.tokens_T, batch.cu_seqlens)
    model(held_out[0].tokens_T, held_out[0].cu_seqlens)  # not counted
    told = {name.split(".")[2]: np.bincount(np.concatenate(found[:2]).ravel(), minlength=6).tolist() for name, found in seen.items()}
    assert counter.counts() == told and list(told) == ["1", "5"]
    tokens, top_k = sum(batch.num_tokens for batch in held_out), 2
    assert all(sum(counts) == tokens * top_k for counts in told.values())


class Operators(TorchDispatchMode):
    """The names of the operators that run."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.add(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


def test_counting_waits_for_no_device(hybrid_dir):
    """Counting adds no operator that copies to the host (as item() does) or has an output of unknown size (as bincount has)."""
    model, [batch] = load_model(hybrid_dir, dtype="float32"), batches(HELD_OUT, max_tokens=999)
    counter = ExpertCounter(model)
    with torch.no_grad(), Operators() as plain:
        model(batch.tokens_T, batch.cu_seqlens)
    with torch.no_grad(), counter.counting(), Operators() as counted:
        model(batch.tokens_T, batch.cu_seqlens)
    assert counted.names - plain.names == {"scatter_add_", "ones_like"} and counter.counts()


def test_drift_is_the_share_of_choices_that_moved():
    row = load_row({"1": [1, 3, 0, 0], "4": [1, 1, 1, 1]}, {"1": [8, 0, 0, 0], "4": [2, 2, 2, 2]})
    assert row["drift"] == row["layers"]["1"]["drift"] == 0.75 and row["layers"]["4"]["drift"] == 0
    assert (row["layers"]["1"]["busiest"], row["layers"]["1"]["idlest"], row["layers"]["4"]["busiest"]) == (0.75, 0, 0.25)
    assert describe_load({"step": 7, **row}) == (
        "experts at step 7: the busiest has 75.0% of the choices (layer 1), the idlest 0.0% (layer 1); drift against the base up to 0.750 (layer 1)"
    )


SETTINGS = "train.max_steps=6", "train.eval_every=2", "train.checkpoint_every=2", "lora.targets=[attention, mamba]"


def test_a_run_records_the_load_of_the_base_and_of_each_validation(train, tmp_path):
    told = io.StringIO()
    train(*SETTINGS, console=Console(file=told))
    found = rows(tmp_path / "run", "experts")
    assert [row["step"] for row in found] == [0, 2, 4, 6]
    assert found[0]["drift"] == 0 < found[-1]["drift"] < 1
    base = {layer: load["counts"] for layer, load in found[0]["layers"].items()}
    for row in found[1:]:
        assert {key: row[key] for key in ("drift", "layers")} == load_row({k: v["counts"] for k, v in row["layers"].items()}, base)
    assert describe_load(found[-1]) in told.getvalue()


def test_the_base_of_a_resumed_run_is_that_of_its_beginning(train, tmp_path):
    train(*SETTINGS, name="whole")
    with pytest.raises(KeyboardInterrupt):
        train(*SETTINGS, doctor=interrupted_at(4))
    train(*SETTINGS, resume=True)
    assert rows(tmp_path / "run", "experts") == rows(tmp_path / "whole", "experts")


def hooked(model):
    return [name for name, module in model.named_modules() if isinstance(module, Router) and module._forward_hooks]


def test_routers_are_hooked_in_passes_over_held_out_rows_only(train):
    states = set()

    def doctor(model):
        model.register_forward_pre_hook(lambda module, inputs: states.add((module.training, len(hooked(module)))))

    model, _ = train("train.max_steps=2", "train.eval_every=1", doctor=doctor)
    assert states == {(True, 0), (False, 2)} and not hooked(model)


@pytest.mark.parametrize(("variant", "settings", "passes"), [("llama", ["train.eval_every=1"], 2), ("hybrid", [], 0)])
def test_nothing_is_added_without_experts_or_without_validations(tmp_path, variant, settings, passes):
    make(variant).save_pretrained(tmp_path / "hf")
    made = []
    train_toy(
        tmp_path / "hf", tmp_path / "run", "train.max_steps=2", *settings,
        doctor=lambda model: model.register_forward_pre_hook(lambda module, inputs: made.append(module.training)),
    )  # fmt: skip
    assert made.count(False) == passes and rows(tmp_path / "run", "experts") == []
