"""The model card: README.md of the repository. Its front matter is checked by `huggingface_hub`; its text is `card.md.jinja`.

Tells what was trained and how it was measured, never where: of a path only the last part is shown, and no row of the data.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from jinja2 import Environment, PackageLoader, StrictUndefined

from nemotune import assets
from nemotune.errors import DataError
from nemotune.export.hub.contents import Kind
from nemotune.export.hub.license import Base
from nemotune.lora.forms import form_of

__all__ = ["AdapterLoads", "Card", "Metric", "check_card", "shown_recipe"]

LIBRARIES: Mapping[Kind, str] = {"adapter": "peft", "model": "transformers", "gguf": "gguf"}
RELATIONS: Mapping[Kind, str] = {"adapter": "adapter", "model": "finetune", "gguf": "quantized"}  # hub's `merge` is of several models


@dataclass(frozen=True)
class Metric:
    """A metric of base and tuned on the same held-out rows, with the interval of the difference where there were rows enough for one.

    `shown` are base, tuned, difference and interval as text.
    """

    task: str
    name: str
    values: Mapping[str, Any]
    shown: tuple[str, str, str, str]


@dataclass(frozen=True)
class AdapterLoads:
    """Why PEFT or vLLM does not take an adapter; empty where it does."""

    not_in_peft: str = ""
    not_in_vllm: str = ""

    @classmethod
    def of(cls, keys: Collection[str]) -> AdapterLoads:
        """By the names of its tensors. Raises CheckpointError for forms that are not read here either."""
        form = form_of(keys)
        peft = "tensors of single experts, which PEFT leaves out without a word" if form == "per_expert" else ""
        if any(".out_proj." in key for key in keys):
            peft = "Mamba's `out_proj`, which PEFT refuses"
        return cls(peft, "all routed experts in one tensor, which is PEFT's form" if form == "fused" else "")


@dataclass(frozen=True)
class Card:
    """What a card tells; `facts` and `limits` are lines of its text."""

    repo: str
    kind: Kind
    base: Base
    recipe: Mapping[str, Any]  # as `shown_recipe` makes it
    datasets: Sequence[str] = ()
    facts: Sequence[tuple[str, str]] = ()
    metrics: Sequence[Metric] = ()
    limits: Sequence[str] = ()
    files: Sequence[str] = ()
    adapter: AdapterLoads = AdapterLoads()
    in_ollama: bool = False  # whether Ollama asks GGUF files by their own template

    @property
    def name(self) -> str:
        return self.repo.partition("/")[2]

    @property
    def from_scratch(self) -> bool:
        """Whether the base gave its shape alone."""
        return self.recipe["model"]["weights"] == "random"

    def render(self) -> str:
        """The whole README.md. Raises DataError where the hub would not take its front matter."""
        loader = PackageLoader("nemotune.export.hub", "")
        pages = Environment(loader=loader, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, autoescape=False)
        recipe = yaml.safe_dump(dict(self.recipe), sort_keys=False, allow_unicode=True, width=120).strip()
        body = pages.get_template("card.md.jinja").render(card=self, recipe_yaml=recipe, thinking=self.recipe["data"]["thinking"])
        text = f"---\n{self._front_matter().to_yaml()}\n---\n\n{body.strip()}\n"
        check_card(text, "the model card")
        return text

    def _front_matter(self) -> ModelCardData:
        family = ["nemotron", "lora"] if self.recipe["method"] == "lora" else ["nemotron"]
        named = self.base.on_hub and not self.from_scratch
        return ModelCardData(
            base_model=self.base.name if named else None,
            base_model_relation=RELATIONS[self.kind] if named else None,
            license=self.base.license.id,
            license_name=self.base.license.name,
            license_link=self.base.license.link,
            library_name=LIBRARIES[self.kind],
            pipeline_tag="text-generation",
            tags=["nemotune", *family, *(["llama"] if self.base.license.llama else [])],
            datasets=list(self.datasets) or None,
            model_name=self.name,
            eval_results=[self._result(metric) for metric in self.metrics] or None,
        )

    def _result(self, metric: Metric) -> EvalResult:
        return EvalResult(
            task_type="text-generation",
            task_name=metric.task.replace("_", " "),
            dataset_type=self.datasets[0] if self.datasets else "private",
            dataset_name="held-out rows" + (f" of {self.datasets[0]}" if self.datasets else ""),
            metric_type=metric.name,
            metric_name=f"{metric.task} {metric.name}",
            metric_value=metric.values["tuned"],
            metric_args={key: metric.values[key] for key in ("base", "difference", "low", "high", "confidence", "n")},
        )


def check_card(text: str, where: str) -> None:
    """Raise DataError where the front matter of a README.md is none that the hub reads, or names no licence."""
    try:
        data = ModelCard(text).data
    except (ValueError, yaml.YAMLError) as error:
        raise DataError(
            f"{where}: its front matter cannot be read ({str(error).splitlines()[0]}); it is YAML between two lines of ---"
        ) from error
    if not data.license:
        raise DataError(f"{where}: its front matter names no license; take the base's, since what was made from it is under it")


def shown_recipe(recipe: Mapping[str, Any], *, base: str, datasets: Sequence[str]) -> dict[str, Any]:
    """The recipe as a card shows it: every place on this machine by its last part; hub names and built-in ones whole."""

    def shown(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: shown(entry) for key, entry in value.items()}
        if isinstance(value, list | tuple):
            return [shown(entry) for entry in value]
        if isinstance(value, str) and value not in datasets and re.search(r"[/\\]", value) and not assets.resolve(value):
            return re.split(r"[/\\]", value.rstrip("/\\"))[-1]
        return value

    found = shown(recipe)
    return {**found, "model": {**found["model"], "path": base}}
