"""Every export, killed by -9 at random moments or out of disk: what it was to replace is as it was, or whole; the next run completes it and leaves
nothing beside."""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from random_models import make
from toy_gguf import SIDE_FILES, TINY

from nemotune.errors import DiskFullError
from nemotune.export import stream
from nemotune.export.adapters.gguf_file import plan_for_llama_cpp
from nemotune.export.adapters.opened import open_adapter
from nemotune.export.adapters.peft_files import plan_for_vllm
from nemotune.export.gguf import llama_cpp
from nemotune.export.gguf.plan import plan_gguf
from nemotune.export.megatron.checkpoint import open_megatron
from nemotune.export.megatron.lora_files import plan_lora
from nemotune.export.megatron.to_hf import open_export
from nemotune.export.megatron.to_megatron import plan_import
from nemotune.export.merge import plan_merge
from nemotune.export.stream import write
from nemotune.export.tuned import open_tuned
from nemotune.lora import apply_lora, save_adapter
from nemotune.lora.layers import lora_modules
from nemotune.models import load_model
from nemotune.recipe import Lora

LORA = Lora(rank=4, targets=("attention", "mamba", "experts"))
PAUSE_SECONDS = 0.001  # between two pieces of a file, so that there are moments to die in


@pytest.fixture(scope="module")
def tuned_dirs(tmp_path_factory) -> tuple[Path, Path]:
    """A base in several shards, and an adapter."""
    directory = tmp_path_factory.mktemp("tuned")
    make("hybrid", vocab_size=1504).to(torch.bfloat16).save_pretrained(directory / "base", max_shard_size="50KB")
    for name in SIDE_FILES:
        shutil.copy(TINY / name, directory / "base" / name)
    model = load_model(directory / "base")
    apply_lora(model, LORA)
    for _, layer in lora_modules(model):
        torch.nn.init.normal_(layer.lora_B, std=0.1)
    save_adapter(model, directory / "adapter", LORA, base="base")
    return directory / "base", directory / "adapter"


def merged(base: Path, adapter: Path, target: Path) -> None:
    write(plan_merge(open_tuned(base, adapter)), target, overwrite=True)


def imported(base: Path, adapter: Path, target: Path) -> None:
    write(plan_import(open_tuned(base)), target, overwrite=True)


def packed(base: Path, adapter: Path, target: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(llama_cpp, "is_installed", lambda: False)
        write(plan_gguf(open_tuned(base, adapter), "q4_k_m"), target, overwrite=True)


def exported(base: Path, adapter: Path, target: Path) -> None:
    megatron = base.with_name("megatron")
    if not megatron.is_dir():
        imported(base, adapter, megatron)
    write(open_export(open_megatron(megatron), base).plan(), target, overwrite=True)


def for_vllm(base: Path, adapter: Path, target: Path) -> None:
    write(plan_for_vllm(open_adapter(adapter, base)), target, overwrite=True)


def for_llama_cpp(base: Path, adapter: Path, target: Path) -> None:
    write(plan_for_llama_cpp(open_adapter(adapter, base)), target, overwrite=True)


def for_megatron(base: Path, adapter: Path, target: Path) -> None:
    write(plan_lora(open_adapter(adapter, base)), target, overwrite=True)


EXPORTS: dict[str, tuple[str, Callable[[Path, Path, Path], object]]] = {
    "merge": ("out", merged),
    "megatron": ("out", imported),
    "gguf": ("out.gguf", packed),
    "megatron to hf": ("out", exported),
    "adapter for vllm": ("out", for_vllm),
    "adapter for llama.cpp": ("out.gguf", for_llama_cpp),
    "adapter for megatron": ("out", for_megatron),
}


def contents(path: Path) -> dict[str, bytes]:
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    return {str(file.relative_to(path)): file.read_bytes() for file in files}


def run_and_kill(export: Callable[[], object], *, after_seconds: float) -> bool:
    """Run it in a process of its own and kill that; whether it was alive until then."""
    process = os.fork()
    if process == 0:
        try:
            torch.set_num_threads(1)
            export()
        finally:
            os._exit(0)
    time.sleep(after_seconds)
    os.kill(process, signal.SIGKILL)
    _, status = os.waitpid(process, 0)
    return os.WIFSIGNALED(status)


@pytest.mark.parametrize("name", EXPORTS)
def test_a_killed_export_leaves_its_target_as_it_was_or_whole_and_the_next_run_completes_it(name, tuned_dirs, tmp_path, monkeypatch):
    filename, export = EXPORTS[name]
    target = tmp_path / filename
    export(*tuned_dirs, target)
    whole = contents(target)
    monkeypatch.setattr(stream, "SYNC_BYTES", 10_000)
    slowly = stream._write_all
    monkeypatch.setattr(stream, "_write_all", lambda out, buffer: time.sleep(PAUSE_SECONDS) or slowly(out, buffer))
    began = time.perf_counter()
    export(*tuned_dirs, target)
    seconds, died = time.perf_counter() - began, 0
    draw = random.Random(name)
    for moment in range(6):
        if moment == 3:
            shutil.rmtree(target) if target.is_dir() else target.unlink()
        was_there = target.exists()
        died += run_and_kill(lambda: export(*tuned_dirs, target), after_seconds=draw.uniform(0.1, 1.0) * seconds)
        assert target.exists() or not was_there
        assert not target.exists() or contents(target) == whole
    assert died >= 3, "killed while it ran"
    export(*tuned_dirs, target)
    assert contents(target) == whole and [path.name for path in tmp_path.iterdir()] == [filename]


@pytest.mark.parametrize("name", ["merge", "gguf", "megatron"])
def test_a_disk_that_fills_leaves_the_target_as_it_was_and_the_next_run_goes_on(name, tuned_dirs, small_disk, monkeypatch):
    """On a real small disk, where space seemed to be enough when the export began."""
    filename, export = EXPORTS[name]
    disk = small_disk(2**26)
    export(*tuned_dirs, disk / filename)
    whole, used = contents(disk / filename), 2**26 - shutil.disk_usage(disk).free
    small_disk(int(1.6 * used), change=True)
    with pytest.raises(DiskFullError, match="are needed"):
        export(*tuned_dirs, disk / filename)
    monkeypatch.setattr("nemotune.export.stream.require_space", lambda directory, needed: None)
    with pytest.raises(DiskFullError, match=r"the disk is full; what is done lies in .*\.partial"):
        export(*tuned_dirs, disk / filename)
    assert contents(disk / filename) == whole
    small_disk(2**26, change=True)
    export(*tuned_dirs, disk / filename)
    assert contents(disk / filename) == whole and [path.name for path in disk.iterdir()] == [filename]
