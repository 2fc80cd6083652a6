"""A Modelfile asks the model in the words that it was tuned on, or there is none."""

from __future__ import annotations

import io
import os
import shutil
from pathlib import Path

import pytest
from gguf import GGUFWriter
from rich.console import Console
from toy_gguf import TINY, saved

from nemotune.errors import CheckpointError, ConflictError, MissingFileError, UnsupportedError
from nemotune.export import ollama
from nemotune.export.ollama import Served, is_asked_alike, modelfile, plan_ollama, renderer_of, served
from nemotune.export.stream import write
from nemotune.export.tuned import open_tuned
from nemotune.workflow import ollama as workflow
from nemotune.workflow.sources import Source

REAL = os.environ.get("NEMOTUNE_TEST_DATA")
BUILTIN = Path(ollama.__file__).parents[1] / "data" / "templates"
QUIET = Console(quiet=True)


@pytest.fixture(scope="module")
def llama_dir(tmp_path_factory):
    """A random llama that speaks ChatML, samples, and has a licence."""
    path = tmp_path_factory.mktemp("models") / "llama"
    saved(path, "llama")
    shutil.copy(BUILTIN / "chatml.jinja", path / "chat_template.jinja")
    (path / "generation_config.json").write_text('{"eos_token_id": [2, 11], "do_sample": true, "temperature": 0.6, "top_p": 0.95}')
    (path / "LICENSE").write_text("Do as you like.\nTell whose it was.\n")
    return path


@pytest.mark.skipif(not REAL, reason="NEMOTUNE_TEST_DATA is not set")
def test_nvidias_templates_are_known_by_what_they_make_of_conversations():
    """Ollama's renderers follow these templates; the ones for training make the same prompts from another text."""
    found = {}
    for path in Path(str(REAL), "data/nemotron/chat_templates").glob("nemotron_3_*.jinja"):
        found[path.stem], _ = renderer_of("nemotron_h_moe", path.read_text(), path.name)
    assert found == {
        "nemotron_3_nano": "nemotron-3-nano", "nemotron_3_nano_training": "nemotron-3-nano",
        "nemotron_3_super": "nemotron-3-nano", "nemotron_3_super_training": "nemotron-3-nano",
        "nemotron_3_ultra": "nemotron-3.5-nano", "nemotron_3_ultra_training": "nemotron-3.5-nano",
    }  # fmt: skip
    changed = Path(str(REAL), "data/nemotron/chat_templates/nemotron_3_nano.jinja").read_text().replace("<tool_response>", "<result>")
    with pytest.raises(UnsupportedError):
        renderer_of("nemotron_h_moe", changed, "changed")


@pytest.mark.parametrize("template", [TINY / "chat_template.jinja", BUILTIN / "nemotron3.jinja", BUILTIN / "chatml.jinja"])
def test_a_hybrid_that_ollama_would_ask_otherwise_is_refused(template):
    """Ollama ignores TEMPLATE for nemotron_h, so no Modelfile would be right."""
    with pytest.raises(UnsupportedError, match="makes other prompts") as caught:
        renderer_of("nemotron_h", template.read_text(), "my-model")
    assert "my-model" in str(caught.value) and "llama-server --jinja" in str(caught.value)
    with pytest.raises(UnsupportedError, match="makes other prompts"):
        plan_ollama(open_tuned(TINY), "f16")
    with pytest.raises(UnsupportedError, match="no chat template"):
        renderer_of("llama", None, "my-model")


def test_a_hybrid_is_given_the_renderer_and_parser_of_its_template(monkeypatch):
    template = (BUILTIN / "nemotron3.jinja").read_text()
    monkeypatch.setitem(ollama.RENDERERS, ollama.renderings(template), ("nemotron-9", "9.1.0"))
    model = Served("nemotron_h_moe", template, ("<|im_end|>", "</s>"), 4096)
    assert modelfile(model, source="./model.gguf", generation={"do_sample": False, "temperature": 0.7}, license_text=None) == (
        "FROM ./model.gguf\nRENDERER nemotron-9\nPARSER nemotron-9\nPARAMETER num_ctx 4096\n"
        'PARAMETER stop "<|im_end|>"\nPARAMETER stop "</s>"\nPARAMETER temperature 0\nREQUIRES 9.1.0\n'
    )


def test_the_directory_holds_the_file_and_how_to_ask_it(llama_dir, tmp_path):
    target = tmp_path / "ollama"
    write(plan_ollama(open_tuned(llama_dir), "q8_0"), target)
    assert sorted(path.name for path in target.iterdir()) == ["Modelfile", "model-q8_0.gguf"]
    lines = (target / "Modelfile").read_text()
    assert lines == (
        'FROM ./model-q8_0.gguf\nPARAMETER num_ctx 512\nPARAMETER stop "<|im_end|>"\nPARAMETER stop "</s>"\nPARAMETER temperature 0.6\n'
        'PARAMETER top_p 0.95\nLICENSE """Do as you like.\nTell whose it was.\n"""\nREQUIRES 0.30.0\n'
    )
    assert is_asked_alike(target / "model-q8_0.gguf")
    found = served(target / "model-q8_0.gguf")
    assert found.architecture == "llama" and found.template == (llama_dir / "chat_template.jinja").read_text()

    workflow.of_file(target / "model-q8_0.gguf", target=tmp_path / "beside", overwrite=False, dry_run=False, console=QUIET)
    beside = (tmp_path / "beside" / "Modelfile").read_text()
    assert beside.startswith(f"FROM {target.resolve() / 'model-q8_0.gguf'}\n") and 'stop "<|im_end|>"' in beside
    with pytest.raises(ConflictError, match="--overwrite"):
        workflow.of_file(target / "model-q8_0.gguf", target=tmp_path / "beside", overwrite=False, dry_run=False, console=QUIET)


def test_a_dry_run_writes_nothing(llama_dir, tmp_path):
    source = Source("mine", llama_dir, None)
    workflow.of_model(source, kind="q8_0", target=tmp_path / "ollama", overwrite=False, dry_run=True, console=QUIET)
    assert not list(tmp_path.iterdir())


def test_the_next_command_has_a_name_that_ollama_takes(llama_dir, tmp_path):
    write(plan_ollama(open_tuned(llama_dir), "q8_0"), tmp_path / "ollama")
    (tmp_path / "ollama" / "model-q8_0.gguf").rename(tmp_path / "My Model ü.gguf")
    told = io.StringIO()
    console = Console(file=told, width=300)
    workflow.of_file(tmp_path / "My Model ü.gguf", target=tmp_path / "beside", overwrite=False, dry_run=False, console=console)
    assert told.getvalue().endswith(f"next: ollama create my-model -f {tmp_path}/beside/Modelfile\n")


def test_what_is_no_gguf_file_is_said(tmp_path):
    with pytest.raises(MissingFileError, match="--gguf"):
        workflow.of_file(tmp_path / "none.gguf", target=tmp_path, overwrite=False, dry_run=False, console=QUIET)
    (tmp_path / "broken.gguf").write_bytes(b"GGUX" + bytes(100))
    with pytest.raises(CheckpointError, match="not a GGUF file"):
        served(tmp_path / "broken.gguf")
    writer = GGUFWriter(tmp_path / "adapter.gguf", "nemotron_h_moe")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(CheckpointError, match="adapter.gguf: no GGUF file of a model, but of an adapter"):
        served(tmp_path / "adapter.gguf")
    assert not is_asked_alike(tmp_path / "adapter.gguf")
    with pytest.raises(UnsupportedError, match="LICENSE"):
        modelfile(Served("llama", "{{ messages }}", (), 8), source="x", generation={}, license_text='a """ b')
