"""Schedules, the health gate and the record of a run."""

from __future__ import annotations

import math

import pytest
import torch
from random_models import make
from toy_split import ToySplit

from nemotune.data.loader import Loader
from nemotune.errors import TrainingError
from nemotune.lora import apply_lora
from nemotune.models import load_model
from nemotune.models.nemotron_h import Mamba2
from nemotune.recipe import Lora, Train, load
from nemotune.train.health import Liveness, SpikeGuard, require_finite
from nemotune.train.metrics import Metrics, read_metrics
from nemotune.train.run import count_steps
from nemotune.train.schedule import learning_rate, warmup_steps
from nemotune.train.step import accumulate


def test_warmup_rises_to_the_rate_and_the_cosine_ends_at_its_minimum():
    train = Train(learning_rate=1.0, min_learning_rate=0.1, warmup_steps=4)
    rates = [learning_rate(step, 100, train) for step in range(100)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0] and rates[4] == 1.0
    assert rates[52] == pytest.approx(0.55) and rates[-1] == pytest.approx(0.1, abs=1e-3)


@pytest.mark.parametrize("schedule, at_half, at_end", [("linear", 0.5, 0.01), ("constant", 1.0, 1.0), ("wsd", 1.0, 0.05)])
def test_schedules_have_their_shape(schedule, at_half, at_end):
    train = Train(learning_rate=1.0, schedule=schedule, warmup_steps=0)
    assert learning_rate(50, 100, train) == pytest.approx(at_half)
    assert learning_rate(99, 100, train) == pytest.approx(at_end, abs=1e-9)


def test_no_warmup_starts_at_the_full_rate():
    assert learning_rate(0, 10, Train(learning_rate=0.5, warmup_ratio=0.0)) == 0.5


@pytest.mark.parametrize("ratio, total, steps", [(0.07, 100, 7), (0.03, 100, 3), (0.03, 110, 4), (1e-5, 100, 1), (0, 100, 0)])
def test_warmup_is_the_share_as_it_is_written_rounded_up(ratio, total, steps):
    assert warmup_steps(total, Train(warmup_ratio=ratio)) == steps


@pytest.mark.parametrize("epochs, steps", [(1.1, 121), (0.07, 8), (0.3, 33), (3, 330)])
def test_epochs_are_counted_as_they_are_written(epochs, steps):
    assert count_steps(110, load("quickstart", [f"train.epochs={epochs}"])) == steps


@pytest.fixture
def adapted(tmp_path):
    make("hybrid").save_pretrained(tmp_path / "hf")
    model = load_model(tmp_path / "hf", dtype="float32")
    return model.train(), apply_lora(model, Lora(rank=4, alpha=8, targets=("attention", "mamba", "mlp", "experts")))


def one_backward(model, keys):
    accumulate(model, Loader(ToySplit([30, 20]), global_batch_size=2, micro_batch_size=2, seed=0).step(0), keys=keys, seed=0, step=0)


def test_every_adapter_is_alive_in_our_model(adapted):
    model, keys = adapted
    liveness = Liveness(model)
    one_backward(model, keys)
    liveness.check()


def test_an_adapter_that_the_forward_bypasses_stops_the_run(adapted):
    model, keys = adapted
    layer = model.backbone.layers[0].mixer
    assert isinstance(layer, Mamba2)
    frozen = layer.out_proj.base
    layer.out_proj.forward = lambda x: torch.nn.functional.linear(x, frozen.weight)  # as a fused kernel does
    liveness = Liveness(model)
    one_backward(model, keys)
    with pytest.raises(TrainingError, match=r"layers\.0\.mixer\.out_proj\.lora_B"):
        liveness.check()


def test_experts_without_tokens_are_listed_and_are_no_error(adapted):
    model, keys = adapted
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.zero_()
                buffer[0] = buffer[1] = 99.0
    liveness = Liveness(model)
    for _ in range(10):
        one_backward(model, keys)
        liveness.check()
    assert set(liveness.unreached().values()) == {4} and len(liveness.unreached()) == 4


def test_a_non_finite_gradient_is_named():
    good, bad = (torch.nn.Parameter(torch.ones(2)) for _ in range(2))
    good.grad, bad.grad = torch.ones(2), torch.tensor([1.0, math.inf])
    with pytest.raises(TrainingError, match=r"step 7: .*that of layers\.3\.bad"):
        require_finite(1.0, math.inf, {"layers.1.good": good, "layers.3.bad": bad}, step=7)


def test_a_spike_warns_and_divergence_stops():
    guard = SpikeGuard()
    assert all(guard.check(2.0, step=i) is None for i in range(32))
    assert "9.00" in guard.check(9.0, step=33)
    assert guard.check(2.0, step=34) is None
    with pytest.raises(TrainingError, match="lower train.learning_rate"):
        for i in range(5):
            guard.check(9.0, step=35 + i)


def test_resumed_metrics_replace_the_rows_after_the_checkpoint(tmp_path):
    first = Metrics(tmp_path, ())
    for step in range(1, 6):
        first.write("train", step, loss=float(step))
    first.close()
    (tmp_path / "metrics.jsonl").open("a").write('{"kind": "train", "ste')
    second = Metrics(tmp_path, (), resume_step=3)
    second.write("train", 4, loss=40.0)
    second.close()
    assert [(row["step"], row["loss"]) for row in read_metrics(tmp_path)] == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 40.0)]
