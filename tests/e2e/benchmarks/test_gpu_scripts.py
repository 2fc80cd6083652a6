"""The scripts for a GPU run on a CPU with a shrunken model; what they count is what is computed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).parents[3]
sys.path.insert(0, str(ROOT))

from benchmarks import harness  # noqa: E402
from benchmarks.gpu import native, setting, train  # noqa: E402
from benchmarks.gpu.parity import OnDevice  # noqa: E402
from benchmarks.roofline import lora_step_flops  # noqa: E402
from nemotune.lora import apply_lora  # noqa: E402
from nemotune.models import build_model, parse_config  # noqa: E402
from nemotune.models.initialize import initialize  # noqa: E402
from nemotune.models.quantize import NF4GroupedLinear, NF4Linear  # noqa: E402
from nemotune.ops.nf4 import dequantize  # noqa: E402
from nemotune.ops.rope import rope_frequencies  # noqa: E402
from nemotune.recipe import Lora  # noqa: E402

DATA = os.environ.get("NEMOTUNE_TEST_DATA")


def a_setting(part: str, *, small: bool = True) -> setting.Setting:
    return setting.Setting(part, small=small, device="cpu", experts=False, checkpointing="none", warmup_steps=1, steps=2)


def test_train_keeps_the_figures_of_each_part(tmp_path, monkeypatch, capsys):
    """Both contenders from the same first loss: that of a uniform guess, as every weight is drawn."""
    pytest.importorskip("peft")
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    for part in ("native-bf16-4096", "native-nf4-4096", "peft-bf16-4096"):
        train.main(["--small", "--steps", "1", "--warmup-steps", "1", "--only", part])
        assert json.loads(capsys.readouterr().out.splitlines()[-1])["tokens_per_second"] > 0
    assert train.kept() == {}, "figures of a model of a few thousand parameters are no figures of a GPU"
    figures = train.kept(small=True)
    uniform = torch.tensor(float(setting.SMALL["vocab_size"])).log().item()
    for found in figures.values():
        assert found["first_loss"] == pytest.approx(uniform, rel=0.03) and 0 < found["share"] < 1
    assert train.show(figures).count("\n") == 4
    for found in json.loads((tmp_path / "gpu.train.small.json").read_text())["figures"].values():
        assert found["device"] == "cpu" and found["date"] and found["setting"]["small"]


def test_figures_of_another_setting_are_a_row_of_their_own(tmp_path, monkeypatch):
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    monkeypatch.setattr(train, "measure", lambda setting, profile: {"tokens_per_second": float(setting.steps)})
    one = ["--small", "--only", "native-bf16-4096"]
    train.main(one)
    for more in (["--checkpointing", "full"], ["--experts"], ["--steps", "3"]):
        train.main([*one, *more])
    figures = train.kept(small=True)
    assert {name: found["tokens_per_second"] for name, found in figures.items()} == {
        "native-bf16-4096, selective": 3.0, "native-bf16-4096, full": 8.0, "native-bf16-4096-experts, selective": 8.0,
    }  # fmt: skip
    heading, _, first, *_ = train.show(figures).splitlines()
    cells = dict(zip(heading.split(" | "), first.split(" | "), strict=True))
    assert cells["device |"] == "cpu |" and cells["steps"] == "3" and "selective" in first


def test_every_contender_gets_the_same_documents():
    """Padding adds places, never tokens."""
    from benchmarks.gpu.with_peft import padded_batches

    shared = a_setting("peft-bf16-16384")
    for batch in shared.measured:
        documents = list(padded_batches(batch, shared.sequence))
        assert sum(int(mask.sum()) for _, mask, _ in documents) == batch.num_tokens <= shared.sequence
        assert sum(int((targets >= 0).sum()) for _, _, targets in documents) == batch.num_supervised
        assert all(mask.numel() <= shared.sequence for _, mask, _ in documents)


def test_quantised_weights_are_drawn_as_the_wide_ones_are():
    """NF4's error of normal weights is a tenth of their size; that of another draw is 1.4 times."""
    wide, narrow = (native.random_model(a_setting(part)) for part in ("native-bf16-4096", "native-nf4-4096"))
    quantized = {name: module for name, module in narrow.named_modules() if isinstance(module, NF4Linear | NF4GroupedLinear)}
    assert any(isinstance(module, NF4GroupedLinear) for module in quantized.values())
    for name, module in quantized.items():
        drawn = wide.get_parameter(f"{name}.weight").float()
        for index, matrix in enumerate(drawn if drawn.ndim == 3 else drawn.unsqueeze(0)):
            held = module.quantized.at(index) if drawn.ndim == 3 else module.quantized
            assert (dequantize(held, matrix.shape, torch.float32) - matrix).norm() < 0.12 * matrix.norm(), (name, index)
    for name, tensor in narrow.state_dict().items():
        assert torch.equal(tensor, wide.state_dict()[name]), name


def test_counted_operations_are_those_of_torch():
    config = parse_config(setting.SMALL | {"hybrid_override_pattern": "--", "num_hidden_layers": 2})
    batch, lora = a_setting("native-bf16-4096").measured[0], Lora(rank=8, targets=("mlp",))
    model = build_model(config).to_empty(device="cpu")
    initialize(model, seed=0)
    apply_lora(model, lora)
    model.embeddings.weight.requires_grad_(True)  # else the first block's input needs no gradient
    with FlopCounterMode(display=False) as counter:
        model.logits(model(batch.tokens_T, batch.cu_seqlens)[batch.targets_T >= 0]).sum().backward()
    assert counter.get_total_flops() == lora_step_flops(config, lora, batch)


def test_a_token_passes_three_billion_parameters():
    """The A3B of its name: four operations each, half of the head, and the small products of scan and attention."""
    nano = a_setting("native-bf16-4096", small=False)
    batch = nano.measured[0]
    assert 3.0e9 < lora_step_flops(nano.config, nano.lora, batch) / batch.num_tokens / 4 < 3.4e9


@pytest.mark.skipif(not DATA, reason="NEMOTUNE_TEST_DATA is not set")
def test_nano_30b_is_the_published_one():
    path = Path(DATA or "") / "data/nemotron/configs/NVIDIA-Nemotron-3-Nano-30B-A3B.config.VERBATIM.json"
    assert parse_config(setting.NANO_30B) == parse_config(json.loads(path.read_text()))


def test_what_tests_create_lies_on_the_device_and_what_nemotune_creates_where_it_says():
    with OnDevice("meta"):
        drawn = torch.randn(3, generator=torch.Generator().manual_seed(0), requires_grad=True)
        assert drawn.is_meta and drawn.requires_grad and drawn.is_leaf
        assert torch.empty(2).normal_(0, 1, generator=torch.Generator()).is_meta and torch.nn.Linear(2, 3).weight.is_meta
        assert torch.arange(3, device="cpu").device.type == "cpu"
        assert rope_frequencies(8, 1e4).device.type == "cpu"


def test_parity_runs_the_tests_that_it_is_given(tmp_path):
    (tmp_path / "test_it.py").write_text("import torch\ndef test_it(): assert torch.ones(2).is_meta\ndef test_no(): assert False\n")
    script = f"""
from pathlib import Path
from benchmarks import harness
from benchmarks.gpu import parity
harness.RESULTS = Path({str(tmp_path)!r})
raise SystemExit(parity.main(["--device", "meta", {str(tmp_path / "test_it.py")!r}]))
"""
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert done.returncode == 1, done.stderr
    found = json.loads((tmp_path / "gpu.parity.json").read_text())
    assert found["figures"] == {"passed": 1, "failed": 1} and found["failed"][0].endswith("test_no")
