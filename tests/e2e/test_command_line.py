"""The command line without any work: help, what is imported for it, and how mistakes are told."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import nemotune
from nemotune.cli.main import MODULES, VERBS, guarded
from nemotune.errors import AFTER_SIGNAL
from nemotune.recipe import builtin_names, dump, json_schema, load

Command = Callable[..., subprocess.CompletedProcess[str]]
HEAVY = ("torch", "transformers", "datasets", "numpy", "pyarrow", "pydantic", "yaml", "tensorboard")


@pytest.fixture
def command(tmp_path: Path) -> Command:
    """`command("run", "quickstart")` runs `nemotune run quickstart` in an empty directory; script="finetune" runs that one."""
    source = str(Path(nemotune.__file__).parent.parent)

    def run(*words: str, script: str = "main") -> subprocess.CompletedProcess[str]:
        code = f"import sys; from nemotune.cli.{script} import main; sys.argv[0] = 'nemotune'; main()"
        environment = os.environ | {"PYTHONPATH": source, "COLUMNS": "160", "NO_COLOR": "1", "TERM": "dumb"}
        return subprocess.run(
            [sys.executable, "-c", code, *words], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
        )

    return run


def modules_after(code: str) -> set[str]:
    program = f"import sys\nsys.path.insert(0, {str(Path(nemotune.__file__).parent.parent)!r})\n{code}\nprint(*sys.modules, sep='\\n', file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    return set(done.stderr.split())


def test_help_imports_nothing_heavy() -> None:
    loaded = modules_after("from nemotune.cli.main import app\napp(['--help'], standalone_mode=False)")
    assert "nemotune.cli.run" in loaded  # the verbs were asked for their help
    assert not loaded & set(HEAVY)


def test_help_of_every_verb_imports_nothing_heavy() -> None:
    lines = ["import typer", "from nemotune.cli import finetune", "from nemotune.cli.main import app", "commands = [(finetune.app, [])]"]
    lines.append(f"commands += [(app, [verb]) for verb in {VERBS}] + [(app, ['recipes', name]) for name in ('list', 'show', 'schema')]")
    lines.append("for application, words in commands: application([*words, '--help'], standalone_mode=False)")
    loaded = modules_after("\n".join(lines))
    assert "nemotune.cli.doctor" in loaded
    assert not loaded & {*HEAVY} - {"pydantic"}  # typer itself looks for it


def test_package_import_is_light_and_its_functions_are_lazy() -> None:
    assert not modules_after("import nemotune; nemotune.__version__; dir(nemotune)") & set(HEAVY)
    assert callable(nemotune.load_model) and callable(nemotune.load_tokenizer)
    with pytest.raises(AttributeError, match="no attribute 'load_modle'"):
        _ = nemotune.load_modle


def test_recipes_need_no_torch() -> None:
    assert not modules_after("from nemotune.recipe import load, support; support.check(load('quickstart'))") & {
        "torch",
        "transformers",
        "datasets",
    }


def test_counting_a_model_loads_no_compiler() -> None:
    """It takes a second, and memory to the end."""
    loaded = modules_after("from nemotune.plan.cost import estimate\nfrom nemotune.recipe import load\nestimate(load('quickstart'))")
    assert "torch" in loaded and "torch._dynamo" not in loaded


def test_help_lists_every_verb_and_every_verb_has_help(command: Command) -> None:
    done = command("--help")
    assert done.returncode == 0
    for verb in VERBS:
        assert f" {verb} " in done.stdout
        assert (Path(nemotune.__file__).parent / "cli" / f"{MODULES.get(verb, verb)}.py").is_file()
    assert "--resume" in command("train", "--help").stdout


def test_version(command: Command) -> None:
    assert command("--version").stdout == f"nemotune {nemotune.__version__}\n"


@pytest.mark.parametrize(("typed", "meant"), [("trian", "train"), ("evaluate", "eval"), ("reports", "report")])
def test_misspelt_verb_suggests_the_nearest(command: Command, typed: str, meant: str) -> None:
    done = command(typed)
    assert done.returncode == 2
    assert f"no verb '{typed}'. Did you mean '{meant}'?" in done.stderr


@pytest.mark.parametrize(
    ("words", "lines"),
    [
        (["run", "quikstart"], ["recipe: no built-in recipe 'quikstart'. Did you mean 'quickstart'? A path to a YAML file works too."]),
        (["data", "quickstart", "data.formt=chat"], ["data.formt: unknown key. Did you mean 'format'?"]),
        (["plan", "none.yaml"], ["recipe: no file 'none.yaml' here"]),
        (["train", "quickstart", "train.epochs=x", "lora.rnk=1"], ["lora.rnk: unknown key. Did you mean 'rank'?", "train.epochs: got 'x', expected"]),
        (["run", "glaive-nano-4b", "train.compile=true"], ["train.compile: not built yet: torch.compile"]),
        (["plan", "quickstart", "parallel.nproc=3", "parallel.data=2"], ["parallel: got pipeline=1 x data=2"]),
    ],
)  # fmt: skip
def test_mistake_is_one_readable_block(command: Command, words: list[str], lines: list[str]) -> None:
    done = command(*words)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr and done.stdout == ""
    heading, *told = done.stderr.splitlines()
    assert heading == "Error"
    for line, expected in zip(told, lines, strict=True):
        assert line.startswith(f"  {expected}")


def test_first_word_of_two_is_told_what_comes_next(command: Command) -> None:
    done = command("export", "hbu")
    assert done.returncode == 2 and "export takes one more word: " in done.stderr and "export hub" in done.stderr


def test_finetune_is_told_to_be_a_command_of_its_own(command: Command) -> None:
    result = command("finetune", "--max-samples", "10")
    assert result.returncode == 2 and "finetune is a command of its own: type it without nemotune" in " ".join(result.stderr.split())


def test_debug_shows_where_an_error_came_from(command: Command) -> None:
    for words in (["--debug", "run", "quikstart"], ["run", "quikstart", "--debug"]):
        done = command(*words)
        assert done.returncode == 2 and "Traceback" in done.stderr and "quikstart" in done.stderr


def test_what_the_system_refuses_is_one_readable_block_too(command: Command, tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("a file")
    done = command("data", "quickstart", "data.max_samples=5", "--run-dir", "taken/run")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[1] == "  taken/run: Not a directory; check the path and who may use it"


@pytest.mark.parametrize(
    "words, told",
    [
        (["run", "quickstart"], "The same command with --resume goes on from the last checkpoint of a training run."),
        (["export", "gguf", "quickstart"], "What is done is kept: the same command goes on from there."),
    ],
    ids=["run", "export"],
)
def test_interrupt_exits_130_and_says_in_one_line_what_goes_on(words: list[str], told: str) -> None:
    code = (
        f"import sys; sys.path.insert(0, {str(Path(nemotune.__file__).parent.parent)!r})\n"
        "import nemotune.recipe\n"
        "def interrupted(*_): raise KeyboardInterrupt\n"
        "nemotune.recipe.load = interrupted\n"
        f"sys.argv = ['nemotune', *{words}]\n"
        "from nemotune.cli.main import main; main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (130, "")
    assert done.stderr == f"Interrupted. {told}\n"


@pytest.mark.parametrize(
    "set_before, spins",
    [({}, "3000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "ACTIVE"}, None)],
    ids=["unset", "count", "policy"],
)
def test_threads_spin_briefly_unless_the_user_says_otherwise(
    set_before: dict[str, str], spins: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: dict[str, str] = {}
    monkeypatch.setattr(os, "environ", set_before)
    guarded(lambda words: found.update(os.environ))
    assert found.get("GOMP_SPINCOUNT") == spins


def test_recipes_list_names_every_recipe_and_what_it_waits_for(command: Command) -> None:
    done = command("recipes", "list")
    rows = {line.split()[0]: line for line in done.stdout.splitlines() if line.strip()}
    assert all(name in rows for name in builtin_names())
    assert "runs today" in rows["quickstart"] and "evaluate.tasks" in rows["fiqa-nano-8b"]


def test_recipes_show_prints_what_is_written_or_resolved(command: Command) -> None:
    assert command("recipes", "show", "fiqa-nano-8b").stdout.startswith("# Financial questions")
    resolved = json.loads(command("recipes", "show", "fiqa-nano-8b", "train.epochs=2").stdout)
    assert resolved == dump(load("fiqa-nano-8b", ["train.epochs=2"]))
    assert json.loads(command("recipes", "show", "--resolved").stdout) == dump(load("quickstart"))


def test_recipes_schema_is_written_once(command: Command, tmp_path: Path) -> None:
    assert json.loads(command("recipes", "schema").stdout) == json_schema()
    assert command("recipes", "schema", "--output", "recipe.schema.json").returncode == 0
    assert json.loads((tmp_path / "recipe.schema.json").read_text()) == json_schema()
    again = command("recipes", "schema", "--output", "recipe.schema.json")
    assert again.returncode == 2 and "--overwrite replaces it" in again.stderr
    assert command("recipes", "schema", "--output", "recipe.schema.json", "--overwrite").returncode == 0


def test_doctor_tells_machine_and_versions(command: Command) -> None:
    found = json.loads(command("doctor", "--json").stdout)
    assert found["nemotune"] == nemotune.__version__ and found["cpus"] >= 1 and found["memory_bytes"] > 2**30
    assert all(found["packages"].values())


def test_what_a_process_meets_while_it_is_ended_among_others_is_told_in_a_line_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "attempt_0").mkdir()
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "it")
    monkeypatch.setattr("sys.argv", ["nemotune", "train"])

    def lose(words: list[str]) -> None:
        error = RuntimeError("Connection closed by peer")
        error.add_note(AFTER_SIGNAL)
        raise error

    for rank in range(2):
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "attempt_0" / str(rank) / "error.json"))
        with pytest.raises(SystemExit) as stop:
            guarded(lose)
        assert stop.value.code == 1
    assert capsys.readouterr().err == f"RuntimeError {AFTER_SIGNAL}, as where another process is lost; --debug shows it.\n"
