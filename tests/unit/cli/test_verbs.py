"""Each verb opens its recipe and hands it to its stage with the options that were typed; `finetune` is `run` in short."""

from __future__ import annotations

import inspect
import time
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from nemotune.cli import finetune, options
from nemotune.cli.main import app
from nemotune.errors import NemotuneError
from nemotune.plan import environment
from nemotune.recipe import load
from nemotune.workflow import stages

STAGES = {"run": "run", "data": "data", "plan": "plan", "train": "train", "eval": "evaluate", "merge": "merge", "report": "report"}


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict[str, Any]]]:
    """The stages called, with their arguments bound to the real signatures."""
    calls: list[tuple[str, dict[str, Any]]] = []
    for name in (*STAGES.values(), "score"):
        signature = inspect.signature(getattr(stages, name))
        monkeypatch.setattr(
            stages, name, lambda *a, name=name, signature=signature, **k: calls.append((name, signature.bind(*a, **k).arguments))
        )
    return calls


def typed(*words: str, application: Any = app) -> None:
    done = CliRunner().invoke(application, words)
    assert done.exception is None, done.output


@pytest.mark.parametrize(("verb", "stage"), STAGES.items())
def test_verb_calls_its_stage_with_the_recipe(verb: str, stage: str, asked: list[tuple[str, dict[str, Any]]]) -> None:
    typed(verb, "quickstart", "train.epochs=7")
    [(called, arguments)] = asked
    assert called == stage
    if verb != "report":
        assert arguments["recipe"] == load("quickstart", ["train.epochs=7"])
    if verb != "plan":
        assert arguments["run_dir"] == Path("runs/quickstart")


def test_recipe_left_out_is_quickstart(asked: list[tuple[str, dict[str, Any]]]) -> None:
    typed("run")
    assert asked[0][1]["recipe"] == load("quickstart")


@pytest.mark.parametrize("verb", ["run", "train"])
def test_options_reach_the_stage(verb: str, asked: list[tuple[str, dict[str, Any]]]) -> None:
    typed(verb, "quickstart", "name=other", "--resume", "--dry-run")
    typed(verb, "quickstart", "--overwrite", "--run-dir", "elsewhere")
    first, second = (arguments for _, arguments in asked)
    assert (first["resume"], first["overwrite"], first["dry_run"], first["run_dir"]) == (True, False, True, Path("runs/other"))
    assert (second["resume"], second["overwrite"], second["dry_run"], second["run_dir"]) == (False, True, False, Path("elsewhere"))


@pytest.mark.parametrize(("application", "words"), [(app, ["run"]), (app, ["train"]), (finetune.app, [])])
def test_the_start_of_a_command_is_before_its_imports(
    application: Any, words: list[str], asked: list[tuple[str, dict[str, Any]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A deadline counts from it. The recipe is opened before torch is imported."""
    opened: list[float] = []

    def open_recipe(*args: Any, **rest: Any) -> Any:
        opened.append(time.time())
        return real(*args, **rest)

    real = options.open_recipe
    monkeypatch.setattr(options, "open_recipe", open_recipe)
    before = time.time()
    typed(*words, application=application)
    assert before <= asked[0][1]["started"] <= opened[0]


def test_run_directory_stands_for_its_recipe(asked: list[tuple[str, dict[str, Any]]], tmp_path: Path) -> None:
    import json

    from nemotune.recipe import dump

    (tmp_path / "recipe.json").write_text(json.dumps({"recipe": dump(load("quickstart", ["train.epochs=9"]))}))
    typed("eval", str(tmp_path))
    typed("report", str(tmp_path))
    assert asked[0][1]["recipe"].train.epochs == 9
    assert [arguments["run_dir"] for _, arguments in asked] == [tmp_path, tmp_path]


def test_data_and_merge_options_reach_their_stages(asked: list[tuple[str, dict[str, Any]]]) -> None:
    typed("data", "quickstart", "--show", "5")
    typed("merge", "quickstart", "--output", "out")
    assert asked[0][1]["show"] == 5 and asked[1][1]["output"] == Path("out")


def test_a_model_named_to_eval_is_scored_alone(asked: list[tuple[str, dict[str, Any]]]) -> None:
    typed("eval", "quickstart", "--model", "runs/quickstart/export/merged", "--overwrite")
    [(called, arguments)] = asked
    assert called == "score" and arguments["model"] == "runs/quickstart/export/merged" and arguments["overwrite"]


def test_finetune_is_the_function_calling_recipe_in_short(asked: list[tuple[str, dict[str, Any]]]) -> None:
    typed("--max-samples", "1000", "--merge", "--gguf", "q4_k_m", "--gguf", "f16", application=finetune.app)
    [(called, arguments)] = asked
    assert called == "run"
    assert arguments["recipe"] == load("glaive-nano-4b", ["data.max_samples=1000", "export.merged=true", "export.gguf=[q4_k_m, f16]"])
    assert arguments["run_dir"] == Path("runs/glaive-nano-4b")


def test_finetune_takes_model_data_and_output(asked: list[tuple[str, dict[str, Any]]]) -> None:
    typed(
        "--model",
        "a/b",
        "--data",
        "rows.jsonl",
        "--output",
        "here",
        "data.format=chat",
        application=finetune.app,
    )
    arguments = asked[0][1]
    assert (arguments["recipe"].model.path, arguments["recipe"].data.train.path, arguments["recipe"].data.format) == (
        "a/b",
        "rows.jsonl",
        "chat",
    )
    assert arguments["run_dir"] == Path("here")


def test_finetune_is_refused_as_run_is() -> None:
    done = CliRunner().invoke(finetune.app, ["--merge", "train.compile=true"])
    assert isinstance(done.exception, NemotuneError)
    assert [line.split(":")[0] for line in str(done.exception).splitlines()] == ["train.compile"]


@pytest.mark.parametrize(
    "words",
    [("--adapter", "a", "--output", "o"), ("--model", "m", "--gguf", "g", "--output", "o"), ("--model", "m"), ("--gguf", "g")],
)
def test_export_ollama_takes_a_model_or_a_file_and_then_needs_a_place(words: tuple[str, ...]) -> None:
    done = CliRunner().invoke(app, ("export", "ollama", *words))
    assert isinstance(done.exception, NemotuneError) and "--output" in str(done.exception)


def test_export_ollama_of_a_run_that_trained_nothing_says_what_comes_first(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ("export", "ollama", "quickstart", "--run-dir", str(tmp_path / "run")))
    assert isinstance(done.exception, NemotuneError) and "`nemotune train` comes first" in str(done.exception)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("merge", "--model", "m", "--output", "o"), "--adapter: missing, expected the adapter to merge into --model"),
        (("merge", "runs/mine", "--model", "m", "--adapter", "a", "--output", "o"), "--model: got runs/mine as well"),
        (("export", "adapter", "--for", "peft", "--model", "m", "--adapter", "a", "--output", "o", "--run-dir", "r"), "--model: got --run-dir as well"),
        (("export", "ollama", "runs/mine", "name=x", "--gguf", "g", "--output", "o"), "--gguf: got runs/mine name=x as well"),
    ],
    ids=["no adapter", "merge", "adapter", "ollama"],
)  # fmt: skip
def test_a_run_and_a_model_are_not_named_together(words: tuple[str, ...], message: str) -> None:
    done = CliRunner().invoke(app, words)
    assert isinstance(done.exception, NemotuneError) and message in str(done.exception)


def test_plan_says_what_a_run_writes(asked: list[tuple[str, dict[str, Any]]]) -> None:
    told = " ".join(CliRunner().invoke(app, ("plan", "quickstart", "name=mine", "export.gguf=[q4_k_m]")).output.split())
    assert "a run writes runs/mine/: data," in told and "adapter, eval, export/merged, export/mine-q4_k_m.gguf, report.html" in told


def test_doctor_says_whether_llama_cpp_is_there_to_run_what_is_exported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "_version", lambda name: None if name == "xllamacpp" else "1.0")
    told = " ".join(CliRunner().invoke(app, ["doctor"], env={"COLUMNS": "200"}).output.split())
    assert "xllamacpp (optional) not installed; for running GGUF files after they are written: pip install 'nemotune[llama-cpp]'" in told
    assert "gguf 1.0" in told and "huggingface_hub 1.0" in told
