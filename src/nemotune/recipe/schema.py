"""The recipe: every setting of a run, typed, frozen, with its default in this one place.

It says what to do, never how: no torch here, nothing is read from disk. `load.py` makes one from YAML and overrides;
`support.py` says which values the code can carry out today.
"""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    field_validator,
    model_validator,
)

from nemotune.recipe.blend import of_a_blend
from nemotune.recipe.deadline import stop_time

Format = Literal["medmcqa", "fiqa", "glaive", "squad", "chat", "text", "megatron"]
Method = Literal["lora", "full", "pretrain"]
EngineName = Literal["native", "trl", "unsloth", "automodel", "megatron"]
Task = Literal["multiple_choice", "tool_calls", "span_qa", "perplexity", "semantic_similarity"]
GgufType = Literal["f32", "f16", "bf16", "q8_0", "q5_k_m", "q4_k_m"]
Tracker = Literal["tensorboard", "wandb", "mlflow"]
Fraction = Annotated[float, Field(ge=0, lt=1)]


class Section(BaseModel):
    """A frozen part of the recipe; a key that it does not know is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Source(Section):
    """Rows: a hub id, a directory or a file (.jsonl .json .csv .parquet .arrow .txt); config and split as `datasets` names them."""

    path: str
    config: str | None = None
    split: str | None = None


def _source(value: Any) -> Any:
    return {"path": value} if isinstance(value, str) else value


Rows = Annotated[Source, BeforeValidator(_source, json_schema_input_type=str | Source)]
Held = Annotated[Fraction | Source | None, BeforeValidator(_source, json_schema_input_type=Fraction | str | Source | None)]


class Model(Section):
    """The base: a directory or hub id; `dtype` holds its frozen weights and computes, trained weights are always fp32.

    `weights: random` draws fresh ones (from train.seed) for pretraining: then config.json and the tokenizer are all that is needed.
    """

    path: str
    revision: str | None = None
    weights: Literal["pretrained", "random"] = "pretrained"
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    quantization: Literal["none", "nf4"] = "none"
    offload: Literal["none", "experts"] = "none"  # what lies in host memory and is lent to the GPU


class Data(Section):
    """What is trained on. `validation` and `test` are shares of the training rows, sources of their own, or null."""

    format: Format
    train: Rows
    validation: Held = None
    test: Held = None
    max_samples: PositiveInt | None = None
    max_bad_rows: Annotated[float, Field(ge=0, le=1)] = 0.05
    template: str = "model"  # model | none | chatml | a Jinja file
    thinking: bool = False
    sequence_length: PositiveInt = 4096
    overflow: Literal["drop", "truncate", "split", "error"] = "drop"  # split: long text into several documents
    packing: bool | Literal["concatenated"] = True  # concatenated: of a blend, one stream cut into rows, without borders
    train_on: Literal["assistant", "all"] = "assistant"

    @model_validator(mode="after")
    def _shares_leave_rows(self) -> Data:
        shares = [held for held in (self.validation, self.test) if isinstance(held, float)]
        if sum(shares) >= 1:
            raise ValueError(f"data.validation + data.test: got {sum(shares)}, expected less than 1 so that rows are left to train on")
        return self


class Lora(Section):
    """LoRA (arXiv 2106.09685). `targets`: block types, module names, or `default` (every linear block type but Mamba's out_proj).

    The patterns give ranks and alphas of their own to some of the targets; the first key that matches a module counts, as in PEFT.
    """

    rank: PositiveInt = 16
    alpha: PositiveFloat = 32
    dropout: Annotated[float, Field(ge=0, le=0.99)] = 0.0
    targets: Literal["default"] | Annotated[tuple[str, ...], Field(min_length=1)] = "default"
    rank_pattern: dict[str, PositiveInt] = {}
    alpha_pattern: dict[str, PositiveFloat] = {}
    rslora: bool = False
    dora: bool = False
    plus_ratio: PositiveFloat | None = None  # LoRA+ (arXiv 2402.12354): the rate of B over that of A

    @field_validator("targets", mode="before")
    @classmethod
    def _one_name_is_a_list(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) and value != "default" else value


class Train(Section):
    """The optimisation. Batch sizes count packed rows when packing, else samples; `eval_every` and `checkpoint_every` count steps."""

    epochs: PositiveFloat = 1
    max_steps: PositiveInt | None = None
    micro_batch_size: PositiveInt = 1
    global_batch_size: PositiveInt = 8
    learning_rate: PositiveFloat = 2e-4
    min_learning_rate: NonNegativeFloat = 0.0
    schedule: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    warmup_ratio: Fraction = 0.03
    warmup_steps: NonNegativeInt | None = None
    decay_ratio: Annotated[float, Field(ge=0, le=1)] = 0.2  # of the steps, at the end of schedule: wsd (arXiv 2404.06395 uses 0.1 to 0.2)
    decay_style: Literal["linear", "cosine", "exponential", "minus_sqrt"] = "linear"  # of schedule: wsd
    optimizer: Literal["adamw", "adamw_8bit"] = "adamw"
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    eps: PositiveFloat = 1e-8
    weight_decay: NonNegativeFloat = 0.0
    max_grad_norm: NonNegativeFloat = 1.0
    router_bias_update_rate: NonNegativeFloat = 0.0  # what a correction bias moves by after each step (arXiv 2408.15664)
    router_aux_loss_coef: NonNegativeFloat = 0.0  # of the sequence-wise balance loss (arXiv 2412.19437)
    activation_checkpointing: Literal["none", "selective", "full", "offload"] = "none"
    compile: bool = False
    seed: Annotated[int, Field(ge=0, le=2**32 - 1)] = 42
    eval_every: PositiveInt | None = None
    early_stopping: PositiveInt | None = None  # evaluations without a better validation loss before stopping
    checkpoint_every: PositiveInt | None = 200
    keep_checkpoints: PositiveInt = 2
    deadline: str | None = None  # "11h30m" after the command's start, or "2026-05-01T18:00": saved and stopped before

    @model_validator(mode="after")
    def _rates_fall(self) -> Train:
        if self.min_learning_rate > self.learning_rate:
            raise ValueError(
                f"train.min_learning_rate: got {self.min_learning_rate:g}, expected at most train.learning_rate ({self.learning_rate:g})"
            )
        return self

    @model_validator(mode="after")
    def _batches_divide(self) -> Train:
        if self.global_batch_size % self.micro_batch_size:
            raise ValueError(
                f"train.global_batch_size: got {self.global_batch_size}, expected a multiple of train.micro_batch_size ({self.micro_batch_size})"
            )
        return self

    @field_validator("deadline", mode="before")
    @classmethod
    def _deadline_is_text(cls, value: Any) -> Any:
        return value.isoformat() if isinstance(value, datetime) else value  # YAML reads a bare date and time as one

    @field_validator("deadline")
    @classmethod
    def _deadline_is_a_time(cls, value: str | None) -> str | None:
        if value is not None:
            stop_time(value, started=0.0)
        return value


class Parallel(Section):
    """Processes and how they share the work: pipeline x data x shard x context x tensor = nproc; expert divides data x shard x context."""

    nproc: PositiveInt = 1
    data: PositiveInt | Literal["auto"] = "auto"
    shard: PositiveInt = 1
    tensor: PositiveInt = 1
    expert: PositiveInt = 1
    context: PositiveInt = 1
    pipeline: PositiveInt = 1


class Engine(Section):
    """Who trains; `python` is the interpreter of an engine that lives in an environment of its own."""

    name: EngineName = "native"
    python: str | None = None


class Evaluate(Section):
    """What is measured on the held-out rows, for the base (`baseline`) and the tuned model alike."""

    tasks: tuple[Task, ...] = ("perplexity",)
    max_samples: PositiveInt | None = 200
    max_new_tokens: Annotated[int, Field(ge=1, le=131072)] | None = None  # null: each task's own limit
    baseline: bool = True
    backend: Literal["native", "nemo_evaluator"] = "native"


class Export(Section):
    """What is written beside the adapter."""

    adapter: bool = True
    merged: bool = False
    gguf: tuple[GgufType, ...] = ()


class Logging(Section):
    """`every` counts steps between rows of metrics.jsonl."""

    every: PositiveInt = 10
    trackers: tuple[Tracker, ...] = ("tensorboard",)


class Recipe(Section):
    """One run, whole. Field by field: docs/recipe.md, and `nemotune recipes schema`."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    model: Model
    data: Data
    method: Method = "lora"
    lora: Lora = Lora()
    train: Train = Train()
    parallel: Parallel = Parallel()
    engine: Engine = Engine()
    evaluate: Evaluate = Evaluate()
    export: Export = Export()
    logging: Logging = Logging()

    @model_validator(mode="after")
    def _sections_agree(self) -> Recipe:
        problems = []
        if self.method == "pretrain" and self.data.format not in ("text", "megatron", "chat"):
            problems.append(f"data.format: got '{self.data.format}', expected text, megatron or chat for method: pretrain")
        if self.data.format == "megatron" and self.method != "pretrain":
            problems.append("data.format: 'megatron' holds tokens without a loss mask, expected method: pretrain")
        if self.method != "lora" and self.model.quantization != "none":
            problems.append(
                f"model.quantization: got '{self.model.quantization}', expected none for method: {self.method} (only LoRA leaves the base frozen)"
            )
        if self.method != "lora" and self.model.offload != "none":
            problems.append(
                f"model.offload: got '{self.model.offload}', expected none for method: {self.method} (only LoRA leaves experts frozen)"
            )
        if self.data.format == "megatron":
            problems += of_a_blend(self.data, self.train)
        elif self.data.packing == "concatenated":
            problems.append(f"data.packing: got 'concatenated', expected true or false for data.format: {self.data.format}")
        if self.data.overflow == "split" and self.data.format not in ("text", "megatron"):
            problems.append(
                f"data.overflow: got 'split', expected drop, truncate or error for data.format: {self.data.format} (an answer would lose its question)"
            )
        if self.model.weights == "random" and self.method != "pretrain":
            problems.append(f"model.weights: got 'random', expected pretrained for method: {self.method}")
        if self.method != "lora" and self.export.merged:
            problems.append(
                f"export.merged: got true, expected false for method: {self.method} (it leaves a whole model, there is nothing to merge)"
            )
        for key in ("router_bias_update_rate", "router_aux_loss_coef"):
            if self.method == "lora" and (got := getattr(self.train, key)):
                problems.append(f"train.{key}: got {got:g}, expected 0 for method: lora (routers stay frozen)")
        if self.train.early_stopping and not self.train.eval_every:
            problems.append("train.early_stopping: needs train.eval_every, since it counts evaluations")
        if self.train.eval_every and self.data.validation is None and self.data.format != "megatron":  # whose blend file may have a list
            problems.append("train.eval_every: needs data.validation (a share such as 0.02, or rows of its own)")
        if problems:
            raise ValueError("; ".join(problems))
        return self

    @property
    def run_dir(self) -> Path:
        """`runs/<name>`, relative to where the command was typed."""
        return Path("runs") / self.name
