"""Publishing to a stand-in for the hub on this machine: what arrives, what is refused, and that a lost connection or process costs little."""

from __future__ import annotations

import base64
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from hub_server import TOKEN, Fault, Hub, serving
from huggingface_hub import HfApi, ModelCard
from rich.console import Console
from safetensors.torch import load_file, save_file
from toy_gguf import TINY, saved
from toy_published import make_run

from nemotune import assets
from nemotune.errors import CheckpointError, ConflictError, DataError, HubError, MissingFileError, NemotuneError, RecipeError
from nemotune.export.gguf.plan import plan_gguf
from nemotune.export.stream import write
from nemotune.export.tuned import open_tuned
from nemotune.recipe import load
from nemotune.workflow import publishing

BASE = "nvidia/NVIDIA-Nemotron-3-Nano-4B-BF16"
SHARD_BYTES = 11_000_000  # above what is sent together
SHARDS = [f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)]


@pytest.fixture
def hub():
    with serving() as hub:
        yield hub


@pytest.fixture
def waited(monkeypatch) -> list[float]:
    """The pauses that would have been made."""
    pauses: list[float] = []
    monkeypatch.setattr(time, "sleep", pauses.append)
    return pauses


@pytest.fixture(autouse=True)
def no_account(monkeypatch, tmp_path):
    """Nothing of the user's own: no token, no Xet, which the stand-in does not speak."""
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))


@pytest.fixture
def run_dir(tmp_path) -> Path:
    return make_run(tmp_path)


@pytest.fixture
def shards(tmp_path) -> Path:
    """A model of three large shards."""
    directory = tmp_path / "model"
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps({"model_type": "nemotron_h", "_name_or_path": str(tmp_path)}))
    for number, name in enumerate(SHARDS):
        save_file({f"t{number}": torch.full((SHARD_BYTES,), number, dtype=torch.uint8)}, directory / name)
    index = {"weight_map": {f"t{number}": name for number, name in enumerate(SHARDS)}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return directory


def publish(run_dir: Path, hub: Hub, *, token: str | None = TOKEN, repo: str = "me/toy", **options) -> str:
    """What the verb prints."""
    console = Console(record=True, width=300, file=open(os.devnull, "w"))  # noqa: SIM115, PTH123
    given = {"what": None, "base": BASE, "private": False, "branch": None, "overwrite": False, "dry_run": False, **options}
    api = HfApi(endpoint=hub.url, token=token)
    publishing.hub(load(str(run_dir)), run_dir=run_dir, repo=repo, console=console, api=api, **given)
    return console.export_text()


def test_what_arrives_is_whole_private_and_has_card_licence_and_metrics(run_dir, hub):
    told = publish(run_dir, hub, private=True)
    arrived, adapter = hub.contents("me/toy"), run_dir / "adapter"
    assert hub.repos["me/toy"].private and hub.repos["me/toy"].commits == 1
    assert set(arrived) == {"README.md", "NOTICE", *(path.name for path in adapter.iterdir())}
    unchanged = set(arrived) - {"README.md", "NOTICE"}
    assert all(arrived[name] == (adapter / name).read_bytes() for name in unchanged - {"adapter_config.json"})
    assert json.loads(arrived["adapter_config.json"])["base_model_name_or_path"] == "nemotron-tiny"
    card = ModelCard(arrived["README.md"].decode()).data
    assert (card.base_model, card.base_model_relation, card.library_name) == (BASE, "adapter", "peft")
    assert (card.license, card.license_name) == ("other", "nvidia-nemotron-open-model-license")
    exact = next(result for result in card.eval_results if result.metric_type == "exact")
    assert exact.metric_value == 0.875 and exact.metric_args["base"] == 0.25 and exact.metric_args["low"] == 0.41
    assert arrived["NOTICE"] == b"Licensed by NVIDIA Corporation under the NVIDIA Nemotron Model License.\n"
    assert f"published {hub.url}/me/toy (private)   next: hf download me/toy" in told


def test_nothing_private_is_sent(run_dir, hub, tmp_path):
    publish(run_dir, hub)
    blobs = [*hub.received, *hub.contents("me/toy").values()]
    for body in hub.received:
        for line in body.splitlines():
            value = json.loads(line).get("value", {}) if line.startswith(b'{"key"') else {}
            blobs.append(base64.b64decode(value.get("content", "")))
    for secret in (str(tmp_path), "secret-customer", "secret_tool", "nobody may see", TOKEN, str(Path.home()) + "/"):
        assert not [blob for blob in blobs if secret.encode() in blob], secret


def test_second_run_sends_nothing(run_dir, hub):
    publish(run_dir, hub)
    first = len(hub.requests)
    told = publish(run_dir, hub)
    assert "0 files sent, 8 were there already" in told
    assert all(request.startswith("GET ") for request in hub.requests[first:])


def test_dry_run_shows_files_and_card_and_sends_nothing(run_dir, hub):
    told = publish(run_dir, hub, dry_run=True, token=None)
    assert hub.requests == []
    assert "adapter_model.safetensors" in told and "base_model_relation: adapter" in told and "nothing was sent" in told
    assert "note: LICENSE: nvidia-nemotron-open-model-license wants a copy of itself" in told


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"token": None}, "no token: .* log in with `hf auth login`"),
        ({"token": "hf_wrong"}, "token: http.* does not know it .* log in with"),
        ({"repo": "nvidia/toy"}, "token: may not write to nvidia/toy .*You don't have the rights"),
        ({"repo": "toy"}, "--repo: got 'toy', expected OWNER/NAME"),
    ],
)
def test_who_may_not_publish_is_told_what_to_do(run_dir, hub, options, said):
    with pytest.raises(NemotuneError, match=said):
        publish(run_dir, hub, **options)
    assert not hub.repos and not hub.sent("PUT")


def test_hub_that_is_not_there_is_readable(run_dir, waited):
    with pytest.raises(HubError, match=r"http://127.0.0.1:9: cannot be reached .*HF_ENDPOINT.* The same command goes on"):
        publish(run_dir, SimpleNamespace(url="http://127.0.0.1:9"))


def test_offline_mode_is_told(run_dir, hub, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match="HF_HUB_OFFLINE is set"):
        publish(run_dir, hub)


def test_public_repository_is_refused_where_private_is_asked(run_dir, hub):
    hub.add("me/toy")
    with pytest.raises(ConflictError, match="--private: me/toy is there and public; nothing was sent"):
        publish(run_dir, hub, private=True)
    assert not hub.sent("^(POST|PUT)")


def test_other_files_of_the_same_names_stay_without_overwrite(run_dir, hub):
    hub.add("me/toy", **{"README.md": b"another's", "notes.txt": b"stay"})
    with pytest.raises(ConflictError, match=r"me/toy holds other files of the names README.md; nothing was sent. --overwrite"):
        publish(run_dir, hub)
    assert not hub.sent("^(POST|PUT)")
    told = publish(run_dir, hub, overwrite=True)
    assert "untouched: notes.txt" in told and hub.contents("me/toy")["README.md"].startswith(b"---\n")


def test_other_bytes_of_the_same_size_are_seen(run_dir, hub):
    publish(run_dir, hub)
    adapter = run_dir / "adapter"
    for name in ("adapter_model.safetensors", "chat_template.jinja"):
        raw = (adapter / name).read_bytes()
        (adapter / name).write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))
    with pytest.raises(ConflictError, match="other files of the names adapter_model.safetensors, chat_template.jinja;"):
        publish(run_dir, hub)
    assert "2 files sent, 6 were there already" in publish(run_dir, hub, overwrite=True)
    assert hub.contents("me/toy")["chat_template.jinja"] == (adapter / "chat_template.jinja").read_bytes()


def test_revision_is_a_branch_of_its_own(run_dir, hub):
    told = publish(run_dir, hub, branch="v2")
    assert hub.contents("me/toy") == {} and "README.md" in hub.contents("me/toy", "v2") and "/me/toy/tree/v2" in told


def test_busy_hub_is_waited_for_as_long_as_it_asks(run_dir, hub, waited):
    hub.faults = [
        Fault("POST /api/repos/create", 500),
        Fault("PUT /lfs", 503, times=2),
        Fault("POST .*/commit/", 429, {"Retry-After": "40"}),
        Fault("POST .*/preupload/", 500),
    ]
    publish(run_dir, hub)
    assert hub.repos["me/toy"].commits == 1 and len(hub.contents("me/toy")) == 8
    assert 40 in waited and len(waited) == 5 and len(hub.sent("PUT")) == 3


def test_hub_that_stays_out_of_order_is_given_up_with_words(run_dir, hub, waited):
    hub.faults = [Fault("POST .*/commit/", 502, error="bad gateway", times=99)]
    with pytest.raises(HubError, match=r"is busy or out of order \(502: bad gateway\).* The same command goes on"):
        publish(run_dir, hub)
    assert len(hub.sent("PUT")) == 1  # what the hub has is not sent with every try


def test_commit_whose_answer_was_lost_is_not_made_twice(run_dir, hub, waited):
    hub.faults = [Fault("POST .*/commit/")]
    publish(run_dir, hub)
    assert hub.repos["me/toy"].commits == 1


def test_connection_cut_within_a_large_file_is_made_good(run_dir, hub, shards, waited):
    hub.faults = [Fault("PUT /lfs", cut_after=SHARD_BYTES // 2)]
    publish(run_dir, hub, what=str(shards))
    assert [len(hub.contents("me/toy")[name]) for name in SHARDS] == [(shards / name).stat().st_size for name in SHARDS]
    assert len(hub.sent("PUT")) == 4 and len(waited) == 1


def test_run_after_a_failed_one_sends_only_what_is_left(run_dir, hub, shards):
    oid = publishing.Content("", shards / SHARDS[1]).sha256
    hub.faults = [Fault(f"PUT /lfs/{oid}", 403, error="Private repository storage limit reached")]
    with pytest.raises(HubError, match=r"me/toy: no room for it on the hub \(.*storage limit reached\); free some storage of me"):
        publish(run_dir, hub, what=str(shards))
    assert hub.contents("me/toy") == {} and len(hub.stored) == 1  # the branch is as it was; the first shard stays with the hub
    before = len(hub.requests)
    publish(run_dir, hub, what=str(shards))
    assert len([request for request in hub.requests[before:] if request.startswith("PUT")]) == 2
    assert set(SHARDS) <= set(hub.contents("me/toy")) and hub.repos["me/toy"].commits == 1


def test_killed_within_a_file_the_same_command_sends_the_rest(run_dir, hub, shards, tmp_path):
    command = [sys.executable, "-m", "nemotune", "export", "hub", str(run_dir), "--repo", "me/toy", "--what", str(shards), "--base", BASE]
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(tmp_path / "hf")}
    oid, size = publishing.Content("", shards / SHARDS[1]).sha256, (shards / SHARDS[1]).stat().st_size
    hub.faults = [Fault(f"PUT /lfs/{oid}", cut_after=SHARD_BYTES // 2, stalls=True)]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    assert hub.stalled.wait(60)
    process.send_signal(signal.SIGKILL)
    process.wait(10)
    assert hub.contents("me/toy") == {} and len(hub.stored) == 1
    first, hub.large_bytes = dict(hub.large_bytes), {}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert first[oid] == SHARD_BYTES // 2 and sorted(hub.large_bytes.values()) == [size, size]
    assert set(SHARDS) <= set(hub.contents("me/toy")) and hub.repos["me/toy"].commits == 1
    assert f"sent {SHARDS[1]}, 11.0 MB; " in done.stderr and f"published {hub.url}/me/toy (public)" in done.stdout


def test_what_the_hub_lists_otherwise_is_an_error(run_dir, hub):
    hub.ignored = {"tokenizer.json"}
    with pytest.raises(CheckpointError, match=r"me/toy: lists tokenizer.json with other bytes than the files here"):
        publish(run_dir, hub)


def test_damaged_adapter_is_refused_before_anything_is_sent(run_dir, hub):
    path = run_dir / "adapter" / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="adapter_model.safetensors: cannot be read"):
        publish(run_dir, hub)
    assert hub.requests == []


def test_adapter_that_does_not_fit_its_base_is_refused_before_anything_is_sent(run_dir, hub):
    path = run_dir / "adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    name = min(tensors)
    save_file({**tensors, name: torch.full_like(tensors[name], float("nan"))}, path)
    with pytest.raises(CheckpointError, match="not finite"):
        publish(run_dir, hub)
    save_file({key: value for key, value in tensors.items() if key != name}, path)
    with pytest.raises(CheckpointError, match="does not fit"):
        publish(run_dir, hub)
    assert hub.requests == []


def test_token_in_a_text_is_refused_before_anything_is_sent(run_dir, hub):
    (run_dir / "adapter" / "chat_template.jinja").write_text(f"{{# {TOKEN} #}}")
    with pytest.raises(DataError, match="chat_template.jinja: holds a token; take it out"):
        publish(run_dir, hub)
    assert hub.requests == []


def test_own_token_of_any_shape_is_refused(run_dir, hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "s3cr3t-of-another-hub")
    (run_dir / "LICENSE").write_text("s3cr3t-of-another-hub")
    with pytest.raises(DataError, match="LICENSE: holds your token"):
        publish(run_dir, hub)
    assert hub.requests == []


@pytest.mark.parametrize(
    ("method", "what", "place"),
    [
        ("lora", None, "adapter"),
        ("lora", "merged", "export/merged"),
        ("full", None, "model"),
        ("full", "merged", "model"),
        ("lora", "gguf", "export/gguf"),
    ],
)
def test_what_is_published_lies_where_the_run_left_it(tmp_path, method, what, place):
    recipe = load("quickstart", [f"method={method}", "export.merged=false"])
    with pytest.raises(MissingFileError, match="--what: .* is not there; `nemotune .*` makes it"):
        publishing._directory(recipe, tmp_path, what)
    (tmp_path / place).mkdir(parents=True)
    (tmp_path / place / "model-q8_0.gguf").touch()
    assert publishing._directory(recipe, tmp_path, what) == tmp_path / place


def test_base_is_known_by_its_id_by_the_hubs_cache_or_by_its_last_part(tmp_path, run_dir):
    def base(path, given=None):
        (tmp_path / path).mkdir(parents=True, exist_ok=True)
        found = publishing._base(load("quickstart", [f"model.path={tmp_path / path}"]), given)
        return found.name, found.on_hub

    assert base("customers/acme-base") == ("acme-base", False)
    assert base("models--nvidia--Nemotron-H-8B/snapshots/abc") == ("nvidia/Nemotron-H-8B", True)
    assert base("customers/acme-base", BASE) == (BASE, True)
    with pytest.raises(RecipeError, match="--base: got 'acme', expected OWNER/NAME"):
        base("customers/acme-base", "acme")


def test_licence_files_of_the_base_go_along(tmp_path, hub):
    tiny = assets.resolve("nemotron-tiny")
    base = shutil.copytree(tiny, tmp_path / "base", ignore=shutil.ignore_patterns("*.jsonl", "test"))
    (base / "LICENSE.txt").write_text("the base's agreement")
    (base / "README.md").write_text("---\nlicense: apache-2.0\n---\nThe base.\n")
    told = publish(make_run(tmp_path, f"model.path={base}"), hub, base=None)
    assert hub.contents("me/toy")["LICENSE.txt"] == b"the base's agreement" and "NOTICE" not in hub.contents("me/toy")
    assert ModelCard(hub.contents("me/toy")["README.md"].decode()).data.license == "apache-2.0"
    assert json.loads(hub.contents("me/toy")["adapter_config.json"])["base_model_name_or_path"] == "base"
    assert "note: model.path: base is no id of the hub" in told


def test_other_settings_than_those_trained_with_are_refused(run_dir, hub):
    console = Console(quiet=True)
    options = {"what": None, "base": BASE, "private": False, "branch": None, "overwrite": False, "dry_run": True}
    with pytest.raises(ConflictError, match="lora.rank: got 8, the run was begun with 2"):
        publishing.hub(load(str(run_dir), ["lora.rank=8"]), run_dir=run_dir, repo="me/toy", console=console, **options)


def test_the_card_of_gguf_files_names_ollama_only_where_it_asks_by_their_template(run_dir, hub, tmp_path):
    saved(tmp_path / "llama", "llama")
    shutil.copy(TINY / "chat_template.jinja", tmp_path / "llama")
    for name, model, is_named in (("tiny", TINY, False), ("llama", tmp_path / "llama", True)):
        write(plan_gguf(open_tuned(model), "f16", name=name), tmp_path / "files" / name / "m.gguf")
        told = publish(run_dir, hub, what=str(tmp_path / "files" / name), dry_run=True)
        assert ("ollama run hf.co/me/toy" in told) is is_named


def test_a_users_own_card_and_licence_win(run_dir, hub):
    (run_dir / "README.md").write_text("---\nlicense: mit\n---\n\nMine.\n")
    (run_dir / "LICENSE").write_text("the agreement\n")
    told = publish(run_dir, hub)
    assert hub.contents("me/toy")["README.md"].endswith(b"Mine.\n") and hub.contents("me/toy")["LICENSE"] == b"the agreement\n"
    assert "(yours, " in told and "wants a copy of itself" not in told
    (run_dir / "adapter" / "README.md").write_text("---\nlicense: mit\n---\n\nOf this adapter.\n")
    publish(run_dir, hub, overwrite=True)
    assert hub.contents("me/toy")["README.md"].endswith(b"Of this adapter.\n")
    (run_dir / "adapter" / "README.md").write_text("Mine.\n")
    with pytest.raises(DataError, match=r"README.md: its front matter names no license"):
        publish(run_dir, hub, overwrite=True)
