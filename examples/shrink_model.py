"""Make a small random model from any Nemotron config.json: the same family, block types and tokenizer, a thousandth of the size.

For trying a recipe where the real weights would not fit:

    python examples/shrink_model.py --config NANO/config.json --tokenizer NANO --out small
    nemotune run medmcqa-nano-30b model.path=small model.dtype=float32 data.train=rows.jsonl

`--tokenizer` is a directory with tokenizer.json, or that file (also gzipped); `--template` a chat template beside it.
"""

from __future__ import annotations

import argparse
import gzip
import json
import shutil
from pathlib import Path
from typing import Any

from nemotune.models import load_model, save_model

SMALL = {
    "hidden_size": 64, "head_dim": 16, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 96,
    "mamba_num_heads": 4, "mamba_head_dim": 32, "ssm_state_size": 16, "n_groups": 2, "chunk_size": 64,
    "n_routed_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 48, "moe_shared_expert_intermediate_size": 64, "moe_latent_size": 32,
}  # fmt: skip
PATTERN_KEYS = ("hybrid_override_pattern", "layers_block_type")


def shrink(config: dict[str, Any], *, layers: int) -> dict[str, Any]:
    """The config with small widths and at most `layers` layers that still hold every block type it had."""
    small = {**config, **{key: value for key, value in SMALL.items() if config.get(key) is not None}, "head_dim": SMALL["head_dim"]}
    small["num_hidden_layers"] = min(layers, config["num_hidden_layers"])
    for key in PATTERN_KEYS:
        if config.get(key):
            small[key] = _shorter(config[key], layers)
            small["num_hidden_layers"] = len(small[key])
    return small | {"num_nextn_predict_layers": 0}


def _shorter(pattern: str | list[str], layers: int) -> str | list[str]:
    """The first layers, with the first of each kind that would be cut off put at the end."""
    head, tail = list(pattern[:layers]), list(pattern[layers:])
    missing = [kind for kind in dict.fromkeys(tail) if kind not in head]
    head = head[: layers - len(missing)] + missing
    return "".join(head) if isinstance(pattern, str) else head


def copy_tokenizer(source: Path, out: Path, template: Path | None, config: dict[str, Any]) -> None:
    """tokenizer.json and what lies beside it; alone, its special tokens are those that config.json names by id."""
    if source.is_dir():
        for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
            if (source / name).is_file():
                shutil.copyfile(source / name, out / name)
    else:
        text = gzip.decompress(source.read_bytes()) if source.suffix == ".gz" else source.read_bytes()
        (out / "tokenizer.json").write_bytes(text)
        tokens = {token["id"]: token["content"] for token in json.loads(text)["added_tokens"]}
        special = {f"{kind}_token": tokens.get(_first(config.get(f"{kind}_token_id"))) for kind in ("bos", "eos", "pad")}
        named = {key: token for key, token in special.items() if token is not None}
        (out / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **named}))
    if template is not None:
        shutil.copyfile(template, out / "chat_template.jinja")


def _first(token_id: int | list[int] | None) -> int | None:
    return token_id[0] if isinstance(token_id, list) else token_id


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True, help="config.json of the real model")
    parser.add_argument("--tokenizer", type=Path, required=True, help="a directory, or tokenizer.json[.gz]")
    parser.add_argument("--template", type=Path, help="a chat template (Jinja)")
    parser.add_argument("--out", type=Path, required=True, help="the directory to write")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    blank = options.out.with_name(f".{options.out.name}.config")
    blank.mkdir(parents=True)
    config = shrink(json.loads(options.config.read_text()), layers=options.layers)
    (blank / "config.json").write_text(json.dumps(config, indent=2))
    copy_tokenizer(options.tokenizer, blank, options.template, config)
    save_model(load_model(blank, dtype="bfloat16", random_seed=options.seed), options.out)
    shutil.rmtree(blank)
    print(f"wrote {options.out}")


if __name__ == "__main__":
    main()
