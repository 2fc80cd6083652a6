"""A small random nemotron_h with the built-in tokenizer, rows for it, and the command line in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from nemotune import assets
from nemotune.models import load_model, save_model
from nemotune.models.saving import copy_side_files

CONFIG = {
    "architectures": ["NemotronHForCausalLM"], "model_type": "nemotron_h", "hybrid_override_pattern": "ME*-", "num_hidden_layers": 4,
    "hidden_size": 32, "head_dim": 8, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48, "vocab_size": 2048,
    "mamba_num_heads": 4, "mamba_head_dim": 16, "ssm_state_size": 16, "n_groups": 2, "chunk_size": 32, "conv_kernel": 4,
    "n_routed_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "moe_shared_expert_intermediate_size": 40,
    "eos_token_id": 2, "bos_token_id": 1, "pad_token_id": 0, "tie_word_embeddings": False, "torch_dtype": "float32",
}  # fmt: skip


@pytest.fixture(scope="session")
def small_model(tmp_path_factory) -> Path:
    """A directory that transformers and nemotune load: random weights, the built-in model's tokenizer and template."""
    root = tmp_path_factory.mktemp("small_model")
    blank = root / "blank"
    blank.mkdir()
    copy_side_files(assets.resolve("nemotron-tiny"), blank)
    vocabulary = json.loads((blank / "tokenizer.json").read_text())
    size = max(len(vocabulary["model"]["vocab"]), *(token["id"] + 1 for token in vocabulary["added_tokens"]))
    (blank / "config.json").write_text(json.dumps({**CONFIG, "vocab_size": -(-size // 8) * 8}))
    save_model(load_model(blank, dtype="float32", random_seed=0), root / "model")
    return root / "model"


@pytest.fixture(scope="session")
def chat_rows(tmp_path_factory) -> Path:
    """Forty short conversations."""
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"How many are {i} and {i + 1}?"},
                {"role": "assistant", "content": f"They are {2 * i + 1}."},
            ]
        }
        for i in range(40)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def recipe_file(small_model, chat_rows, tmp_path) -> Path:
    """A recipe over both, quick to run."""
    path = tmp_path / "recipe.yaml"
    path.write_text(
        f"""
name: trial
model: {{path: {small_model}, dtype: float32}}
data: {{format: chat, train: {chat_rows}, validation: 0.1, test: 0.1, sequence_length: 256, packing: false}}
lora: {{rank: 4, alpha: 8, dropout: 0.1}}
train: {{max_steps: 12, epochs: 10, global_batch_size: 4, micro_batch_size: 2, learning_rate: 1.0e-2, checkpoint_every: 3, eval_every: 4}}
logging: {{every: 1}}
"""
    )
    return path


@pytest.fixture
def nemotune(tmp_path):
    """Call the command line in `tmp_path`; returns the finished process, or with `wait=False` the running one."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "NEMOTUNE_CACHE": str(tmp_path / "cache"), "COLUMNS": "160"}

    def call(*words: object, wait: bool = True):
        command = [sys.executable, "-m", "nemotune.cli.main", *map(str, words)]
        process = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if not wait:
            return process
        output, _ = process.communicate(timeout=300)
        return subprocess.CompletedProcess(command, process.returncode, output)

    return call


@pytest.fixture
def small_disk(tmp_path):
    """Mounts a real disk of some bytes at a path; a size again changes it. What is on it is gone when the test is done."""
    disk = tmp_path / "disk"
    disk.mkdir()

    def mount(size: int, *, change: bool = False) -> Path:
        if not change:
            unmount()
        options = f"{'remount,' if change else ''}size={max(size, 4096)}"  # 0 would be without an end
        if os.geteuid() != 0 or subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", disk], capture_output=True).returncode:
            pytest.skip("mounting a small disk needs root")
        return disk

    def unmount() -> None:
        if os.path.ismount(disk):
            subprocess.run(["umount", "-l", disk], check=True)

    yield mount
    unmount()
