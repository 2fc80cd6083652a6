"""`nemotune doctor DIR` finds what is wrong with a model directory before anything is spent on it, and passes one that is whole."""

from __future__ import annotations

import errno
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from toy_chat import PLAIN
from typer.testing import CliRunner

from nemotune import assets
from nemotune.cli.main import app
from nemotune.errors import MissingFileError
from nemotune.plan.model_directory import check_model
from nemotune.weights import Checkpoint

TINY = assets.resolve("nemotron-tiny")
VOCABULARY = json.loads((TINY / "config.json").read_text())["vocab_size"]
NAMES = ["config", "weights", "tokenizer", "embeddings", "head", "template", "stop tokens", "generation"]
TABLES = ["backbone.embeddings.weight", "lm_head.weight"]


@pytest.fixture
def directory(tmp_path):
    return Path(shutil.copytree(TINY, tmp_path / "model", ignore=shutil.ignore_patterns("*.jsonl")))


def statuses(directory) -> dict[str, str]:
    return {check.name: check.status for check in check_model(str(directory))}


def found(directory, name) -> str:
    [check] = [check for check in check_model(str(directory)) if check.name == name]
    return f"{check.status}: {check.message}"


def edit_json(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_weights(directory, edit):
    tensors = load_file(directory / "model.safetensors")
    edit(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def test_a_whole_model_passes_every_check(directory, monkeypatch):
    monkeypatch.setattr(Checkpoint, "read", lambda self, name: pytest.fail(f"{name} was loaded"))
    read, slices = [], Checkpoint.slices
    monkeypatch.setattr(Checkpoint, "slices", lambda self, name, num_rows: read.append(name) or slices(self, name, num_rows))
    assert statuses(directory) == dict.fromkeys(NAMES, "ok")
    assert read == TABLES, "no other tensor, and these some rows at a time"
    assert statuses("nemotron-tiny") == dict.fromkeys(NAMES, "ok")
    assert found(directory, "config") == f"ok: nemotron_h, 6 layers, vocabulary of {VOCABULARY:,}"
    assert found(directory, "stop tokens") == "ok: </s> (2), <|im_end|> (11)"
    assert re.fullmatch(rf"ok: {VOCABULARY:,} rows, the median's RMS [\d.]+, none of a token near zero", found(directory, "embeddings"))


def test_what_is_no_directory_is_named():
    for path in ("nowhere", ""):
        with pytest.raises(MissingFileError, match=f"MODEL_DIR: '{path}' is no directory"):
            check_model(path)


@pytest.mark.parametrize(
    ("changes", "message"), [({"model_type": "gpt2"}, "model_type: got 'gpt2'"), ({"mlp_hidden_act": "gelu"}, "mlp_hidden_act: got 'gelu'")]
)
def test_a_config_of_another_model_is_an_error_and_what_needs_it_is_left_out(directory, changes, message):
    edit_json(directory / "config.json", **changes)
    assert message in found(directory, "config")
    assert statuses(directory) == {"config": "error", "tokenizer": "ok", "template": "ok"}


def test_an_empty_directory_is_told_part_by_part(tmp_path):
    assert statuses(tmp_path) == {"config": "error", "tokenizer": "error"}


def pop(tensors):
    del tensors["backbone.norm_f.weight"]


def cut(tensors):
    tensors["lm_head.weight"] = tensors["lm_head.weight"][:-1].contiguous()


def quantise(tensors):
    tensors["lm_head.weight"] = tensors["lm_head.weight"].to(torch.float8_e4m3fn)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (pop, "backbone.norm_f.weight: missing, expected shape (256,)"),
        (cut, f"lm_head.weight: got shape ({VOCABULARY - 1}, 256), expected ({VOCABULARY}, 256)"),
        (quantise, "stored as F8_E4M3: quantised checkpoints cannot be tuned, use the BF16 release"),
        (lambda tensors: tensors.update(extra=torch.ones(2)), "extra: has no place in the model"),
    ],
)
def test_weights_that_do_not_fit_are_an_error(directory, edit, message):
    edit_weights(directory, edit)
    assert found(directory, "weights").startswith("error: ") and message in found(directory, "weights")


def test_files_that_may_not_be_read_are_an_error(directory, monkeypatch):
    read_text = Path.read_text

    def refuse(self, *args, **settings):
        if self.name.endswith("config.json"):
            raise PermissionError(errno.EACCES, "Permission denied", str(self))
        return read_text(self, *args, **settings)

    monkeypatch.setattr(Path, "read_text", refuse)
    assert statuses(directory) == {"config": "error", "tokenizer": "ok", "template": "ok"}
    assert "Permission denied" in found(directory, "config")


def test_weights_cut_off_or_missing_are_an_error(directory):
    shard = directory / "model.safetensors"
    shard.write_bytes(shard.read_bytes()[:-7])
    assert "model.safetensors: cannot be read" in found(directory, "weights")
    shard.unlink()
    assert "no model.safetensors" in found(directory, "weights")


def test_a_tokenizer_that_is_broken_or_of_another_model_is_an_error(directory):
    edit_json(directory / "config.json", vocab_size=1000)
    assert f"error: has the id {VOCABULARY - 1}, and config.json a vocabulary of 1000" in found(directory, "tokenizer")
    (directory / "tokenizer.json").write_text("{")
    assert "its tokenizer cannot be read" in found(directory, "tokenizer")


def test_templates_are_tried_with_tools_and_without(directory):
    template = directory / "chat_template.jinja"
    template.write_text("{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
                        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")  # fmt: skip
    assert "but none with tools (the template leaves tools out: get_weather)" in found(directory, "template")
    assert statuses(directory) == {**dict.fromkeys(NAMES, "ok"), "template": "warning"}
    template.write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    assert found(directory, "template").startswith("error: the tokenizer's own cannot render a greeting")
    assert statuses(directory)["stop tokens"] == "error"
    template.write_text("{% if %}")
    assert "line 1" in found(directory, "template")
    template.write_text(PLAIN)
    assert statuses(directory) == dict.fromkeys(NAMES, "ok")


def test_stop_tokens_have_to_be_tokens(directory):
    edit_json(directory / "config.json", eos_token_id=[2, 5000])
    assert "eos_token_id [5000] is no token of the tokenizer" in found(directory, "stop tokens")


def id_of(directory, token):
    return next(
        entry["id"] for entry in json.loads((directory / "tokenizer.json").read_text())["added_tokens"] if entry["content"] == token
    )


def zero(*ids, table="backbone.embeddings.weight"):
    def edit(tensors):
        tensors[table][list(ids)] = 0

    return edit


def test_rows_near_zero_are_named_by_their_tokens_with_those_of_chats_and_what_to_do(directory):
    chats = [id_of(directory, token) for token in ("<|im_start|>", "<|im_end|>", "<tool_call>")]
    edit_weights(directory, zero(*chats, 700))
    told = found(directory, "embeddings")
    assert told.startswith(f"warning: {VOCABULARY:,} rows, ") and ", 4 near zero (under 0.001 of that): " in told
    assert f"<|im_start|> ({chats[0]}), <|im_end|> ({chats[1]})" in told and " (700); " in told
    assert "tokens of chats are among them: <|im_start|>, <|im_end|>, <tool_call>. " in told
    assert f"nemotune doctor {directory} --repair OUT" in told
    assert statuses(directory) == {**dict.fromkeys(NAMES, "ok"), "embeddings": "warning"}


def test_ten_tokens_are_named_and_the_others_counted(directory):
    edit_weights(directory, zero(*range(700, 713), table="lm_head.weight"))
    told = found(directory, "head")
    assert (
        " 13 near zero " in told
        and "(700), " in told
        and "(709) and 3 more; no token of chats is among them. " in told
        and "710" not in told
    )
    assert statuses(directory) == {**dict.fromkeys(NAMES, "ok"), "head": "warning"}


def test_rows_of_no_token_are_no_matter(directory):
    def pad(tensors):
        for name in TABLES:
            tensors[name] = torch.cat([tensors[name], torch.zeros(8, 256, dtype=tensors[name].dtype)])

    edit_weights(directory, pad)
    edit_json(directory / "config.json", vocab_size=VOCABULARY + 8)
    assert statuses(directory) == dict.fromkeys(NAMES, "ok")


def test_doctor_repairs_into_a_new_directory(directory, tmp_path):
    edit_weights(directory, zero(5, 6))
    code, output = doctor(directory, "--repair", tmp_path / "out")
    assert code == 0 and f"embeddings: 2 rows near zero are now the mean of the other {VOCABULARY - 2:,}" in output
    assert output.splitlines()[-1] == f"wrote {tmp_path / 'out'}. Next: nemotune doctor {tmp_path / 'out'}"
    assert statuses(tmp_path / "out") == dict.fromkeys(NAMES, "ok")
    code, output = doctor(tmp_path / "out", "--repair", tmp_path / "again")
    assert code == 0 and "nothing was written" in output and not (tmp_path / "again").exists()


def test_a_repair_needs_a_model_and_a_name_that_is_free(directory, tmp_path):
    def refused(*words):
        return str(CliRunner().invoke(app, ["doctor", *map(str, words)]).exception)

    assert refused("--repair", tmp_path / "out").startswith("--repair: needs a model to repair: nemotune doctor MODEL_DIR --repair OUT")
    assert refused(directory, "--repair", tmp_path) == f"--repair: {tmp_path} already exists; name a directory that does not"
    assert refused("nowhere", "--repair", tmp_path / "out").startswith("MODEL_DIR: 'nowhere' is no directory")


def test_generation_settings_name_every_stop_token(directory):
    path = directory / "generation_config.json"
    edit_json(path, eos_token_id=2)
    assert found(directory, "generation").startswith("warning: its eos_token_id 2 lacks [11], which end answers too")
    path.write_text("{")
    assert found(directory, "generation").startswith("error: ")
    path.unlink()
    assert found(directory, "generation").startswith("warning: no generation_config.json")


def doctor(*words) -> tuple[int, str]:
    done = CliRunner(env={"COLUMNS": "200"}).invoke(app, ["doctor", *map(str, words)])
    return done.exit_code, done.output


def test_doctor_prints_a_line_a_check_and_exits_with_2_on_errors(directory):
    code, output = doctor(directory)
    lines = [line.split()[0] for line in output.splitlines() if line.startswith(("ok", "warning", "error"))]
    assert code == 0 and lines == ["ok"] * len(NAMES)
    assert output.splitlines()[-1] == f"Next: nemotune plan quickstart model.path={directory}"
    (directory / "generation_config.json").unlink()
    assert doctor(directory)[0] == 0
    (directory / "model.safetensors").unlink()
    code, output = doctor(directory)
    assert code == 2 and "error    weights" in output
    code, output = doctor(directory, "--json")
    assert code == 2 and [check["status"] for check in json.loads(output)["model"]] == ["ok", "error", "ok", "ok", "ok", "warning"]
