"""The tables and examples of docs/ are the code's; that their recipes, commands and Python work is tested in test_readme.py."""

from __future__ import annotations

import inspect
import json
import os
import re
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from pages import DOCS, ROOT, blocks, coded, table_rows
from random_models import make
from rich.console import Console
from toy_split import ToySplit

from nemotune.data.formats import FORMATS
from nemotune.data.prepare import prepare
from nemotune.data.preview import show
from nemotune.evaluate import TASKS, compare, span_qa, tool_calls
from nemotune.evaluate.compare import MIN_ROWS, PRIMARY, RESAMPLES
from nemotune.evaluate.report import MEANINGS
from nemotune.evaluate.rows import Row
from nemotune.export.megatron import homes
from nemotune.lora import apply_lora, coverage
from nemotune.lora.targets import adaptable_modules
from nemotune.models import build_model, config_json, load_model, load_tokenizer, parse_config, read_config
from nemotune.models.loading import FAMILIES, UNUSED_PREFIXES
from nemotune.ops.kernels import Kernels, kernels
from nemotune.plan.held import OPTIMIZER_BYTES
from nemotune.recipe import Data, Lora, Train, load
from nemotune.train import deadline, health, run
from nemotune.train.balance import Balance
from nemotune.train.experts import load_row
from nemotune.train.metrics import read_metrics
from nemotune.train.schedule import DECAYS
from nemotune.workflow import adapters
from nemotune.workflow.run_dir import MAY_CHANGE

DATA, LORA, TRAINING, EVALUATION, MODELS = (DOCS / f"{name}.md" for name in ("data", "lora", "training", "evaluation", "models"))
REAL = os.environ.get("NEMOTUNE_TEST_DATA")


def values(text: str) -> list[dict[str, Any]]:
    """The JSON objects that stand one after another in `text`."""
    found, decoder = [], json.JSONDecoder()
    while text := text.lstrip():
        value, end = decoder.raw_decode(text)
        found.append(value)
        text = text[end:]
    return found


def columns(page: Path, heading: str, column: int = 0) -> list[str]:
    """What stands between backquotes in one column of a table."""
    return [name for row in table_rows(page, heading) for name in coded(row[column])]


# data.md


@pytest.fixture
def chat_rows() -> list[dict[str, Any]]:
    return values(blocks(DATA, "json")[0])


def test_every_format_has_a_row_that_converts(chat_rows):
    names = [coded(row[0])[0] for row in table_rows(DATA, "`data.format` | fields | what becomes of them")]
    assert {"chat", *names} == set(FORMATS)
    for name, row in zip(names, values(blocks(DATA, "json")[1]), strict=True):
        FORMATS[name](row)
    assert len([FORMATS["chat"](row) for row in chat_rows[:-1]]) == 3


def test_raw_form_of_a_medical_question_is_told():
    row = next(row for row in values(blocks(DATA, "json")[1]) if "cop" in row)
    example = FORMATS["medmcqa"](row)
    assert example.prompt.endswith("\nD. K\nAnswer:") and example.completion == " B"


def test_choices_of_the_data_section_are_told():
    told = re.search(r"`data\.overflow` decides about documents over `data\.sequence_length`: (.*?)\. None", DATA.read_text(), re.DOTALL)
    assert told and tuple(coded(told[1])) == get_args(Data.model_fields["overflow"].annotation)
    assert columns(DATA, "`data.template` | a row is rendered with") == ["model", "none", "chatml"]


def shape(text: str) -> list[str]:
    """Lines without what depends on the tokenizer: numbers, the fingerprint, bars; white space and the histogram's bins are one."""
    lines = [re.sub(r"[0-9a-f]{32}|[\d,.]*\d|█+", "N", " ".join(line.split())) for line in text.splitlines() if line.strip()]
    lines = [re.sub(r"up to N( N)* N?", "up to N", line) if line.startswith("up to") else line for line in lines]
    return [line for at, line in enumerate(lines) if not (line.startswith("up to") and at and lines[at - 1].startswith("up to"))]


def test_output_of_the_data_verb_is_what_it_prints(chat_rows, tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in chat_rows))
    settings = ("data.sequence_length=128", "data.max_bad_rows=0.3", "data.validation=null", "data.test=null", "train.eval_every=null")
    tokenizer = load_tokenizer("nemotron-tiny")
    recipe = load("quickstart", [f"data.train={path}", *settings])
    prepared = prepare(recipe, tokenizer, out_dir=tmp_path / "data", cache_dir=tmp_path / "cache")
    show(prepared, tokenizer, Console(width=140), samples=1)
    assert shape(blocks(DATA, "text")[0]) == shape(capsys.readouterr().out)


# lora.md


def test_block_types_and_their_modules_are_the_models(tmp_path):
    for variant in ("hybrid", "latent", "llama"):
        make(variant).save_pretrained(tmp_path / variant)
    rows = table_rows(LORA, "block type | modules in `nemotron_h` | modules in `llama`")
    for column, variants in ((1, ("hybrid", "latent")), (2, ("llama",))):
        told = {coded(row[0])[0]: set(coded(row[column])) for row in rows if row[column]}
        real: dict[str, set[str]] = {}
        for variant in variants:
            for name, kind in adaptable_modules(build_model(read_config(tmp_path / variant))).items():
                real.setdefault(kind, set()).add(name.rpartition(".")[2])
        assert real.pop("head") == {"lm_head"}
        assert told == real


def test_a_misspelt_target_reads_as_told(tmp_path):
    make("hybrid").save_pretrained(tmp_path)
    with pytest.raises(ValueError) as error:
        apply_lora(build_model(read_config(tmp_path)), Lora(targets=("q_porj",)))
    told = re.search(r"`(lora\.targets: .*?\?)`", LORA.read_text())
    assert told and str(error.value).startswith(told[1])


def test_liveness_steps_are_told():
    assert f"In the first {health.EXPERT_STEPS} steps every adapter tensor is watched" in LORA.read_text()


@pytest.mark.skipif(not REAL, reason="NEMOTUNE_TEST_DATA is not set")
def test_coverage_of_nano_30b_is_the_table():
    configs = json.loads((Path(str(REAL)) / "data/nemotron/configs/known_config_values.json").read_text())
    model = build_model(parse_config(configs["nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-BF16"]["config"]))
    apply_lora(model, Lora())
    found = [row for row in coverage(model).rows if row.adapted]
    real = [[r.block_type, f"{r.layers}", f"{r.modules}", f"{r.adapted}", f"{r.parameters:,}", f"{r.bytes / 1e6:,.2f}"] for r in found]
    assert table_rows(LORA, "block type | layers | modules | adapted | parameters | MB") == real
    experts = next(row.parameters for row in found if row.block_type == "experts")
    assert f"They are {experts / coverage(model).parameters:.0%} of these parameters".replace("%", " %") in LORA.read_text()


def test_every_reader_of_adapters_has_a_row():
    assert columns(LORA, "`--for` | experts of one projection | names | refused") == list(adapters.PLANS)


# megatron.md


def test_modules_here_and_there_are_those_of_the_homes():
    """But for MTP, whose layers are spelled out, and norms, which lie with what they come before."""
    rows = [row for row in table_rows(DOCS / "megatron.md", "block | here | there") if row[0] != "MTP"]
    told = [{name for row in rows for name in coded(row[column])} for column in (1, 2)]
    tables = [row for table in (homes.LINEAR, homes.OTHER) for block in table.values() for row in block]
    spelled = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
    ours = {name.replace(last, each) for name, _, _ in tables for last in [module(name)] for each in spelled.get(last, (last,))}
    ends = [pair for family in homes.ENDS.values() for pair in family] + [(homes.HEAD, "lm_head.weight")]
    ours = {stem(name) for name in ours} | {stem(name) for _, name in ends}
    theirs = {stem(name) for _, name, _ in tables} | {stem(name) for name, _ in ends}
    in_llama = {name.replace("mixer.", "self_attn.") for name in told[0] if name.endswith(("q_proj", "k_proj", "v_proj", "o_proj"))}
    norms = {"norm", "input_layernorm", "post_attention_layernorm"}
    assert told[0] | in_llama == ours - norms
    assert told[1] | told[0] & theirs == theirs - {"pre_mlp_layernorm"}  # some have one name


def module(name: str) -> str:
    """The last part of a module's or a tensor's name that names a module."""
    return stem(name).rpartition(".")[2]


def stem(name: str) -> str:
    """A tensor's name as the page has it: without what it is of its module."""
    return re.sub(r"\.(weight|bias|layer_norm_weight|e_score_correction_bias|expert_bias)$", "", name)


# training.md


def test_schedules_are_the_recipes():
    told = columns(TRAINING, "`train.schedule` | from `train.learning_rate` to `train.min_learning_rate`")
    assert told == list(get_args(Train.model_fields["schedule"].annotation))
    assert columns(TRAINING, "`train.decay_style` | share of the way that is left") == list(DECAYS)


def test_kernels_are_told():
    rows = table_rows(TRAINING, "op | on CUDA | on a CPU | reference")
    assert [coded(row[0])[0] for row in rows] == [field.name for field in fields(Kernels) if field.name != "why"]
    here = kernels(torch.device("cpu"), torch.bfloat16, 128)
    assert f"```\n{here}\n```" in TRAINING.read_text()
    on_cpu = [coded(row[1 if row[2] == "the same" else 2])[0] for row in rows]
    assert on_cpu == [getattr(here, coded(row[0])[0]) for row in rows]
    source = "\n".join(path.read_text() for path in (ROOT / "src" / "nemotune" / "ops").glob("*.py"))
    assert [name for *_, cell in rows for name in coded(cell) if f"def {name}(" not in source] == []
    assert [
        path for row in rows for path in re.findall(r"ops/\w+\.py", " ".join(row)) if not (ROOT / "src" / "nemotune" / path).exists()
    ] == []


def test_bytes_for_each_parameter_are_the_plans():
    rows = [[int(cell) for cell in row[1:]] for row in table_rows(TRAINING, "| weight | gradient | optimiser | sum")]
    assert rows[0] == [2, 0, 0, 2]
    assert rows[1:] == [[4, 4, moments, 8 + moments] for moments in OPTIMIZER_BYTES.values()]


def test_what_a_resumed_run_may_change_is_told():
    told = columns(TRAINING, "may change on `--resume` |")
    assert sorted(name.removesuffix("*") for name in told) == sorted(MAY_CHANGE)


def test_messages_of_the_health_gate_are_told():
    told = columns(TRAINING, "the message says | what happened | what to do")
    source = inspect.getsource(health)
    assert len(told) == source.count("raise TrainingError(")
    assert [text for text in told if text not in source] == []
    rule = f"for {health.SPIKES_TO_STOP} steps it was above twice its median of {health.SPIKE_WINDOW} steps, plus {health.SPIKE_MARGIN:.0f}"
    assert rule in TRAINING.read_text() and health.SPIKE_FACTOR == 2


def test_columns_of_the_metrics_are_told(tmp_path):
    make("llama").save_pretrained(tmp_path / "hf")
    model = load_model(tmp_path / "hf", dtype="float32")
    keys = apply_lora(model, Lora(rank=2))
    settings = ("train.max_steps=1", "train.eval_every=1", "data.validation=0.1", "train.checkpoint_every=null", "logging.trackers=[]")
    run(
        model, load("quickstart", settings), train=ToySplit([8, 9]), validation=ToySplit([7]), run_dir=tmp_path / "run",
        keys=keys, resume=False, console=Console(quiet=True),
    )  # fmt: skip
    trained, evaluated = read_metrics(tmp_path / "run")
    assert columns(TRAINING, "column | meaning") == [key for key in trained if key != "kind"]
    assert set(evaluated) == {"kind", "step", "loss", "perplexity"}


def test_what_is_recorded_of_experts_is_told(tmp_path):
    [layer] = load_row({"1": [2, 0]}, {"1": [1, 1]})["layers"].values()
    assert columns(TRAINING, "of a layer | meaning") == list(layer)
    make("hybrid").save_pretrained(tmp_path)
    balance = Balance(load_model(tmp_path, dtype="float32", trainable=True), rate=1e-3, coef=1e-4)
    assert columns(TRAINING, "column of a balanced run | meaning") == list(balance.step())


def test_what_a_deadline_reckons_with_is_told():
    text = " ".join(TRAINING.read_text().split())
    assert f"the longest of the last {deadline.RECENT_STEPS} steps" in text
    assert deadline.CHECKPOINTS_AT_THE_END == 3 and "three times the longest checkpoint" in text
    assert f"{deadline.BYTES_PER_SECOND / 1e6:.0f} MB a second" in text
    assert (deadline.MARGIN_SECONDS, deadline.MARGIN_SHARE) == (60, 1 / 20) and "a minute, or of a twentieth of the whole time" in text
    reckoned = deadline.Deadline().reckon(checkpoint_bytes=0.0, validation_steps=0.0)
    assert [name for name in ("seconds_left", *reckoned) if f"`{name}`" not in text] == []


# evaluation.md


def test_tasks_metrics_and_their_meanings_are_the_codes():
    rows = table_rows(EVALUATION, "`evaluate.tasks` | what is asked | metrics | judged by")
    assert [coded(row[0])[0] for row in rows] == list(TASKS)
    assert {coded(row[0])[0]: coded(row[3])[0] for row in rows} == PRIMARY
    assert [metric for row in rows for metric in coded(row[2])] == list(MEANINGS)
    assert {coded(row[0])[0]: row[1] for row in table_rows(EVALUATION, "metric | meaning")} == MEANINGS


def test_limits_of_answers_and_the_bootstrap_are_told():
    asked = {row[0].strip("`"): row[1] for row in table_rows(EVALUATION, "`evaluate.tasks` | what is asked | metrics | judged by")}
    assert f"up to {tool_calls.MAX_NEW_TOKENS} tokens" in asked["tool_calls"]
    assert f"up to {span_qa.MAX_NEW_TOKENS} tokens" in asked["span_qa"]
    text = EVALUATION.read_text()
    assert f"{RESAMPLES:,} times" in text and f"Under {MIN_ROWS} source rows: no interval" in text and f"At {MIN_ROWS} about" in text
    assert inspect.signature(compare).parameters["confidence"].default == 0.95 and "95 % interval" in text


def test_a_scored_row_reads_as_told():
    [told] = values(blocks(EVALUATION, "json")[0])
    assert list(told) == [field.name for field in fields(Row)]
    asked = FORMATS["squad"](next(row for row in values(blocks(DATA, "json")[1]) if "answers" in row))
    assert (told["prompt"], told["expected"]) == (asked.prompt, asked.meta["answers"][0])
    assert told["scores"] == {"exact_match": span_qa.exact_match("on a fjord", "on a fjord"), "f1": span_qa.f1("on a fjord", "on a fjord")}


# models.md


def test_families_are_the_codes():
    assert columns(MODELS, "`model_type` | checkpoints | blocks") == [family.family for family in FAMILIES.values()]


def test_spellings_of_the_config_are_those_that_are_read():
    read = [re.findall(r'"(\w+)"', names) for names in re.findall(r'keys(?:\.count)?\(((?:"\w+"(?:, )?)+)', inspect.getsource(config_json))]
    told = [coded(row[1]) for row in table_rows(MODELS, "read as | names")]
    assert sorted(told) == sorted([*(names for names in read if len(names) > 1), list(config_json.PATTERN_KEYS)])


def test_symbols_of_a_pattern_are_those_that_are_read():
    told = re.search(r"A pattern spells blocks as (.*); `\|`", MODELS.read_text())
    assert told and set(coded(told[1])) == {symbol for symbol in config_json.BLOCK_TYPES if len(symbol) == 1}


def test_parameters_that_stay_fp32_are_told():
    told = re.search(r"Weights are held in `dtype`, but (.*) always in fp32", MODELS.read_text())
    assert told and set(coded(told[1])) == {name for family in FAMILIES.values() for name in family.fp32_parameters}
    assert all(f"`{prefix}*`" in MODELS.read_text() for prefix in UNUSED_PREFIXES)


def test_signature_of_load_model_is_told():
    told = re.search(r"`nemotune\.load_model\((.*?)\)`", MODELS.read_text())
    parameters = list(inspect.signature(load_model).parameters.values())
    real = [p.name if p.default is p.empty else f"{p.name}={json.dumps(p.default)}" for p in parameters]
    spelled = ", ".join(real).replace("null", "None").replace("false", "False")
    assert told and told[1] == spelled


def test_parity_figures_are_those_of_the_tests():
    sources = "\n".join(path.read_text() for path in (ROOT / "tests" / "parity").glob("test_*.py"))
    functions = dict(re.findall(r"^def (test_\w+)(.*?)(?=^\S|\Z)", sources, flags=re.MULTILINE | re.DOTALL))
    for promise, _, within, name in table_rows(MODELS, "promise | against | within | test"):
        body = functions[name.strip("`")]
        assert [figure for figure in re.findall(r"1e-\d", within) if f"< {figure}" not in body] == [], promise
        assert "equal" not in within or "torch.equal(" in body or "==" in body, promise


def test_every_promise_names_tests_that_exist():
    sources = "\n".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    rows = table_rows(ROOT / "docs" / "promises.md", "elsewhere | here | test")
    assert len(rows) > 15
    missing = [name for *_, named in rows for name in re.findall(r"`(test_\w+)`", named) if f"def {name}(" not in sources]
    assert missing == [] and all("`test_" in named for *_, named in rows)


def test_tables_of_performance_are_those_that_were_measured():
    page = (ROOT / "docs" / "performance.md").read_text() + (ROOT / "docs" / "parallelism.md").read_text()
    results = sorted(path for path in (ROOT / "benchmarks" / "results").glob("*.json") if not path.stem.endswith(".small"))
    assert results
    for path in results:
        measured = json.loads(path.read_text())
        told = [measured[key] for key in ("table", "told", "command", "date") if key in measured]
        assert [text for text in told if text not in page] == [], path.name
