"""A file of a run, or of its base, that was cut off or is not what it should be is named, with what to do; never a traceback."""

from __future__ import annotations

import shutil

import pytest
from rich.console import Console
from toy_run import TINY, make_run

from nemotune.data.prepare import prepare
from nemotune.data.template import Renderer
from nemotune.engines import native
from nemotune.errors import CheckpointError, ConflictError, DataError, MissingFileError, NemotuneError
from nemotune.evaluate.report import write_report
from nemotune.lora import apply_lora, save_adapter
from nemotune.models import load_model, load_tokenizer
from nemotune.recipe import load
from nemotune.workflow import stages
from nemotune.workflow.run_dir import open_run


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of one step with an adapter, kept with its cache."""
    root = tmp_path_factory.mktemp("finished")
    run_dir = make_run(root, overrides=("evaluate.max_samples=2", "evaluate.tasks=[perplexity]", "logging.trackers=[]"))
    recipe = load(str(run_dir))
    model = load_model(TINY)
    apply_lora(model, recipe.lora)
    save_adapter(model, run_dir / "adapter", recipe.lora, base=str(TINY))
    return run_dir


@pytest.fixture
def run_dir(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "toy")


def cut(path, keep: float):
    """Leave the first part of the file, never one that ends with a line."""
    content = path.read_bytes()[: round(keep * path.stat().st_size)]
    path.unlink()  # prepared data are links into the cache
    path.write_bytes(content.rstrip(b"\n}]"))


def evaluate(recipe, run_dir):
    stages.evaluate(recipe, run_dir=run_dir, overwrite=True, dry_run=False, console=Console(quiet=True))


def resume(recipe, run_dir):
    prepared = prepare(recipe, load_tokenizer(TINY), out_dir=run_dir / "data")
    open_run(recipe, run_dir, fingerprint=prepared.fingerprint, resume=True, overwrite=False)


def merge(recipe, run_dir):
    stages.merge(recipe, run_dir=run_dir, output=None, overwrite=True, dry_run=False, console=Console(quiet=True))


def report(recipe, run_dir):
    write_report(run_dir)


READERS = {
    "recipe.json": (evaluate, resume, merge, report),
    "environment.json": (report,),
    "coverage.json": (report,),
    "data/stats.json": (evaluate, resume, report),
    "data/test.jsonl": (evaluate,),
    "data/test.documents.arrow": (evaluate,),
    "data/test.packs.arrow": (evaluate,),
    "eval/base.jsonl": (report,),
    "eval/compare.json": (report,),
    "adapter/adapter_config.json": (evaluate, merge),
    "adapter/adapter_model.safetensors": (evaluate, merge),
}


@pytest.mark.parametrize("keep", [0.0, 0.6])
@pytest.mark.parametrize(("name", "read"), [(name, read) for name, readers in READERS.items() for read in readers])
def test_a_file_that_was_cut_off_is_named(run_dir, name, read, keep):
    recipe = load(str(run_dir))
    cut(run_dir / name, keep if name != "eval/base.jsonl" else 0.6)  # without any row it is whole
    with pytest.raises(NemotuneError) as error:
        read(recipe, run_dir)
    assert name.split("/")[-1] in str(error.value) or str(run_dir / name).rpartition("/")[0] in str(error.value)
    assert not list(run_dir.glob(".*"))


@pytest.mark.parametrize("read", [evaluate, resume])
def test_a_run_without_its_recipe_says_so(run_dir, read):
    recipe = load(str(run_dir))
    (run_dir / "recipe.json").unlink()
    with pytest.raises(MissingFileError, match=r"recipe\.json: no such file; without it nothing says what this run is"):
        read(recipe, run_dir)


@pytest.mark.parametrize("line", [b"junk", b'{"kind": "train", "st', b"\xff\xfe", bytes(64)])
def test_a_broken_line_within_the_record_is_named(run_dir, line):
    record = run_dir / "metrics.jsonl"
    record.write_bytes(line + b"\n" + record.read_bytes())
    with pytest.raises(DataError, match=r"metrics\.jsonl, line 1: is no row .*; remove that line"):
        write_report(run_dir)


def test_a_line_cut_off_in_the_middle_of_a_character_is_named(run_dir):
    tuned = run_dir / "eval" / "tuned.jsonl"
    tuned.write_bytes(tuned.read_bytes() + '{"task": "é"}'.encode()[:11])
    with pytest.raises(DataError, match=r"tuned\.jsonl, line \d+: is not an evaluation row"):
        write_report(run_dir)


def test_test_rows_prepared_anew_are_not_those_of_the_trained_model(run_dir):
    recipe = load(str(run_dir))
    changed = load(str(run_dir), ["data.test=0.2"])
    prepare(changed, load_tokenizer(TINY), out_dir=run_dir / "data", overwrite=True)
    with pytest.raises(ConflictError, match="maybe with test rows that it was trained on"):
        evaluate(recipe, run_dir)


@pytest.mark.parametrize(("name", "content"), [("stats.json", "{"), ("train.jsonl", "")])
def test_a_broken_entry_of_the_cache_is_made_anew(finished, tmp_path, monkeypatch, name, content):
    monkeypatch.setenv("NEMOTUNE_CACHE", str(tmp_path / "cache"))
    recipe, tokenizer = load(str(finished)), load_tokenizer(TINY)
    first = prepare(recipe, tokenizer, out_dir=tmp_path / "first")
    (tmp_path / "cache" / "data" / first.fingerprint / name).write_text(content)
    assert prepare(recipe, tokenizer, out_dir=tmp_path / "second").stats == first.stats


@pytest.fixture
def base(tmp_path):
    return shutil.copytree(TINY, tmp_path / "base", ignore=shutil.ignore_patterns("*.jsonl"))


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("content", [b"", b'{"version": "1.0", "tru', b"[]", b"\xff\xfe"])
def test_a_broken_tokenizer_is_named(base, name, content):
    (base / name).write_bytes(content)
    with pytest.raises(
        CheckpointError, match=f"{base}: its tokenizer cannot be read .*; copy tokenizer.json and tokenizer_config.json again"
    ):
        load_tokenizer(base)


@pytest.mark.parametrize("content", ["[]", "7"])
def test_a_config_that_is_no_object_is_named(base, content):
    (base / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"config\.json: got "):
        load_model(base)


def test_broken_generation_settings_of_the_base_are_told_before_training(finished, base, tmp_path, monkeypatch):
    (base / "generation_config.json").write_text('{"eos_token_id": [')
    monkeypatch.setattr(native, "run_training", lambda *args, **kwargs: pytest.fail("trained first"))
    recipe = load(str(finished), [f"model.path={base}"])
    with pytest.raises(DataError, match=r"generation_config\.json: cut off or not JSON"):
        native.train(recipe, None, run_dir=tmp_path / "run", resume=False, console=Console(quiet=True))


def test_a_template_that_is_no_text_or_ends_no_turn_is_named(tmp_path):
    template = tmp_path / "t.jinja"
    template.write_bytes(b"{{ messages }}\xff")
    with pytest.raises(DataError, match=r"data\.template: .*t\.jinja is not UTF-8 text"):
        Renderer(load_tokenizer(TINY), template=str(template))
    template.write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    with pytest.raises(DataError, match=r"data\.template: .*t\.jinja.* without a special token"):
        _ = Renderer(load_tokenizer(TINY), template=str(template)).stop_ids
