"""The benchmark scripts run at their smallest size, and their contenders compute the same."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from random_models import relative
from toy_split import ToySplit

from nemotune.data.loader import collate
from nemotune.lora import apply_lora
from nemotune.models import load_model
from nemotune.recipe import Lora
from nemotune.train.step import accumulate

ROOT = Path(__file__).parents[3]
sys.path.insert(0, str(ROOT))

from benchmarks import convert_megatron, gguf_vs_llama_cpp, harness, load, merge_vs_peft, ops, quantize, step, train_vs_trl, watch  # noqa: E402


@pytest.fixture
def results(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    return tmp_path


def test_ops_and_those_of_transformers_give_the_same(results, capsys):
    """fp32: rounding of sums; bf16: a few of its steps of 2^-8. bitsandbytes' CPU kernel misses some eight-bit magnitudes by a code,
    up to 1.4 % of a scale."""
    pytest.importorskip("bitsandbytes", reason="the NF4 of transformers")
    ops.main(["--size", "small", "--seconds", "0"])
    figures = json.loads((results / "ops.json").read_text())["figures"]
    assert capsys.readouterr().out.strip() == ops.show(figures)
    for dtype, limit in (("float32", 1e-5), ("bfloat16", 2e-2)):
        rows = figures[dtype]["ops"]
        assert len(rows) == 10 and figures[dtype]["matmul_gflops"] > 0
        for name, row in rows.items():
            assert row["difference"] < (2e-2 if "NF4" in name else limit), (dtype, name)


def test_block_types_are_measured_beside_llama_cpps(results, capsys):
    """Which gives the same bytes, or the script ends."""
    pytest.importorskip("xllamacpp", reason="llama.cpp's own quantisers")
    quantize.main(["--million", "0.02", "--rounds", "1"])
    kept = json.loads((results / "quantize.json").read_text())
    assert capsys.readouterr().out.strip() == kept["table"] == quantize.show(kept["figures"])
    assert set(kept["figures"]) == {"Q8_0", "Q5_0", "Q5_1", "Q4_K", "Q5_K", "Q6_K"}


@pytest.mark.parametrize("family", train_vs_trl.CONFIGS)
def test_what_is_told_of_trl_is_computed_from_the_figures(family):
    """docs/performance.md holds the table and the sentence word for word (test_docs.py)."""
    kept = json.loads((ROOT / "benchmarks" / "results" / f"train_vs_trl_{family}.json").read_text())
    assert kept["table"] == train_vs_trl.show(kept["figures"]) and kept["told"] == train_vs_trl.told(kept["figures"], **kept["counts"])
    slower = kept["figures"] | {"nemotune, bf16": kept["figures"]["nemotune, bf16"] | {"tokens_per_second": 1.0}}
    assert "runs 0.01 times" in train_vs_trl.told(slower, **kept["counts"])


def test_a_step_in_parts_has_the_gradients_of_the_step(hybrid_dir):
    model = load_model(hybrid_dir, dtype="float32")
    keys = apply_lora(model, Lora(rank=4, targets=("attention", "mamba", "shared_experts")))
    batch = collate(ToySplit([30, 12]), [0, 1])
    accumulate(model.train(), [batch], keys=keys, seed=0, step=0)
    whole = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    found = step.step_in_parts(model, batch)
    assert whole and all(relative(p.grad, whole[name]) < 1e-6 for name, p in model.named_parameters() if p.requires_grad)
    blocks = step.count_blocks(model)
    assert {part for part, _ in found} == {*blocks, "head and loss"} and min(found.values()) > 0
    figures = {" ".join(key): value for key, value in found.items()}
    assert step.show(figures, tokens=42, supervised=40, blocks=blocks).count("\n") == 2 + len(blocks) + 1


def test_figures_of_several_rounds_come_with_their_ends():
    values = iter([5.0, 1.0, 3.0])
    commands = {"a": [sys.executable, "-c", ""]}

    def run(command):
        return {"tokens_per_second": next(values)}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(harness, "_run", run)
        found = harness.in_turn(commands, rounds=3)["a"]
    assert found == {"tokens_per_second": 3.0, "tokens_per_second_low": 1.0, "tokens_per_second_high": 5.0}
    assert train_vs_trl._speed(found) == "3 (1 to 5)"


def test_every_contender_loads_the_directory(tmp_path):
    load.write_weights("nemotron_h", tmp_path / "model", repeats=2, small=True)
    assert json.loads((tmp_path / "model" / "config.json").read_text())["num_hidden_layers"] == 20
    figures = {name: load.load(name, tmp_path / "model") | {"peak_gb": 1.0} for name in load.CONTENDERS}
    assert all(found["seconds"] > 0 for found in figures.values())
    assert load.show(figures, 0.5).count("\n") == 4


@pytest.mark.parametrize("script", [gguf_vs_llama_cpp, merge_vs_peft, convert_megatron])
@pytest.mark.parametrize("family", ["llama", "nemotron_h"])
def test_what_is_told_of_exports_is_computed_from_the_figures(script, family):
    kept = json.loads((ROOT / "benchmarks" / "results" / f"{script.__name__.rpartition('.')[2]}_{family}.json").read_text())
    assert kept["table"] == script.show(kept["figures"])


def test_commands_are_measured_from_outside(tmp_path):
    """Two of them: their seconds add up, the larger's memory counts, and what lay in the directory at its fullest. The system counts the size of
    the process that starts another as that one's, so it is a small one here too."""
    write = "import sys, time; from pathlib import Path; a = b'x' * 50_000_000; p = Path(sys.argv[1]); p.write_bytes(a[:3_000_000]); time.sleep(0.2); p.unlink()"
    commands = [[sys.executable, "-c", write, str(tmp_path / "x")], [sys.executable, "-c", "import time; time.sleep(0.1)"]]
    code = f"import json; from pathlib import Path; from benchmarks.watch import watched; print(json.dumps(watched({commands!r}, Path({str(tmp_path)!r}))))"
    found = json.loads(subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout)
    assert found["seconds"] > 0.3 and found["cpu_seconds"] > 0
    assert 0.05 < found["peak_gb"] < 0.5 and found["disk_gb"] == 0.003
    with pytest.raises(SystemExit, match="ended with 3"):
        watch.watched([[sys.executable, "-c", "raise SystemExit(3)"]], tmp_path)
