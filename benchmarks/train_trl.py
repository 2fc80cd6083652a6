"""The other contender of train_vs_trl: TRL's SFTTrainer with PEFT on the same documents. Arguments: a model, documents, settings as JSON."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import SFTConfig, SFTTrainer

from benchmarks.harness import report


class Clock(TrainerCallback):
    """The seconds of every optimiser step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, args, state, control, **_) -> None:
        self.started = time.perf_counter()

    def on_step_end(self, args, state, control, **_) -> None:
        self.seconds.append(time.perf_counter() - self.started)


def main() -> None:
    model_path, documents, given = sys.argv[1], json.loads(Path(sys.argv[2]).read_text()), json.loads(sys.argv[3])
    rows = [
        {"input_ids": d["input_ids"], "labels": [t if on else -100 for t, on in zip(d["input_ids"], d["mask"], strict=True)]}
        for d in documents
    ]
    settings = SFTConfig(
        output_dir="runs/benchmarks/trl", per_device_train_batch_size=given["batch"], gradient_accumulation_steps=given["documents_per_step"] // given["batch"],
        max_steps=given["steps"], learning_rate=1e-3, lr_scheduler_type="constant", optim="adamw_torch_fused", max_length=None, packing=False,
        gradient_checkpointing=False, bf16=False, use_cpu=True, save_strategy="no", report_to="none", logging_steps=1, seed=42,
        train_sampling_strategy="group_by_length" if given.get("grouped") else "random", dataloader_pin_memory=False, disable_tqdm=True,
    )  # fmt: skip
    clock = Clock()
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(model_path, dtype=getattr(torch, given["dtype"])), args=settings,
        train_dataset=Dataset.from_list(rows), processing_class=AutoTokenizer.from_pretrained(model_path), callbacks=[clock],
        peft_config=LoraConfig(r=16, lora_alpha=32, lora_dropout=0.0, target_modules=given["targets"], task_type="CAUSAL_LM"),
    )  # fmt: skip
    counts: list[tuple[int, int]] = []
    collate = trainer.data_collator

    def counted(examples):
        batch = collate(examples)
        counts.append((int(batch["attention_mask"].sum()), batch["attention_mask"].numel()))
        return batch

    trainer.data_collator = counted
    trainer.train()
    per_step = given["documents_per_step"] // given["batch"]
    useful = sum(useful for useful, _ in counts[per_step : per_step * given["steps"]])
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    padding = 1 - sum(useful for useful, _ in counts) / sum(total for _, total in counts)
    figures = {"tokens_per_second": useful / sum(clock.seconds[1:]), "padding": padding, "first_loss": losses[0], "last_loss": losses[-1]}
    report(figures)


if __name__ == "__main__":
    main()
