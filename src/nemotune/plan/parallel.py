"""Whether a recipe's degrees of parallelism fit its model, from config.json alone, before any process starts.

Degrees against the number of processes are `recipe/degrees.py`; what each process then holds is `nemotune.distributed`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

from nemotune.errors import RecipeError, UnsupportedError
from nemotune.lora.targets import adaptable_modules, matched_modules
from nemotune.models import LlamaConfig, NemotronHConfig, build_model, locate, read_config
from nemotune.recipe import Recipe
from nemotune.recipe.degrees import Degrees

__all__ = ["check_parallel", "require_fit"]

Config = NemotronHConfig | LlamaConfig


def check_parallel(recipe: Recipe) -> Degrees:
    """The degrees of `recipe` for its `parallel.nproc`, which its model can be divided by. Reads config.json.

    Raises RecipeError and UnsupportedError.
    """
    degrees = Degrees.of(recipe.parallel)
    if degrees != Degrees():
        require_fit(recipe, degrees, read_config(locate(recipe.model.path, recipe.model.revision, weights=False)))
    return degrees


def require_fit(recipe: Recipe, degrees: Degrees, config: Config) -> None:
    """Raise RecipeError naming everything that a degree does not divide, UnsupportedError for what is not built for these degrees."""
    misfits, unbuilt = list(_misfits(degrees, config)), list(_unbuilt(recipe, degrees, config))
    if misfits:
        raise RecipeError("\n".join(misfits + unbuilt))
    if unbuilt:
        raise UnsupportedError("\n".join(unbuilt))


def _misfits(degrees: Degrees, config: Config) -> Iterator[str]:
    if wrong := _unfit_for_tensor(config, degrees.tensor, with_experts=degrees.expert == 1):
        nearest = _nearest(degrees.tensor, lambda degree: not _unfit_for_tensor(config, degree, with_experts=degrees.expert == 1))
        yield f"parallel.tensor: got {degrees.tensor}, which does not divide the model's {', '.join(wrong)}; nearest that does: {nearest}"
    experts = _num_experts(config)
    if not experts and degrees.expert > 1:
        yield f"parallel.expert: got {degrees.expert}, and the model has no experts; set parallel.expert=1"
    elif experts % degrees.expert:
        nearest = _nearest(degrees.expert, lambda degree: experts % degree == 0)
        yield f"parallel.expert: got {degrees.expert}, expected a divisor of the model's {experts} experts; nearest: {nearest}"
    if degrees.pipeline > config.num_layers:
        yield f"parallel.pipeline: got {degrees.pipeline}, expected at most the model's {config.num_layers} layers"


def _unfit_for_tensor(config: Config, degree: int, *, with_experts: bool) -> list[str]:
    """The sizes of the model that cannot be split `degree` ways. Fewer key-value heads than ranks are held by several of them."""
    unfit = [f"{name} ({size})" for name, size in _split_sizes(config, with_experts=with_experts) if size % degree]
    heads = config.num_key_value_heads
    return [*unfit, f"num_key_value_heads ({heads})"] if _has_attention(config) and heads % degree and degree % heads else unfit


def _split_sizes(config: Config, *, with_experts: bool) -> Iterator[tuple[str, int]]:
    """Experts that are divided among ranks keep their width."""
    yield "vocab_size", config.vocab_size
    if _has_attention(config):
        yield "num_attention_heads", config.num_attention_heads
    if isinstance(config, LlamaConfig) or "mlp" in config.block_types:
        yield "intermediate_size", config.intermediate_size
    if isinstance(config, NemotronHConfig) and "mamba" in config.block_types:
        yield "mamba_num_heads", config.mamba_num_heads
        yield "n_groups", config.n_groups
    if isinstance(config, NemotronHConfig) and "moe" in config.block_types:
        if with_experts:
            yield "moe_intermediate_size", config.moe_intermediate_size
        yield "moe_shared_expert_intermediate_size", config.moe_shared_expert_intermediate_size


def _has_attention(config: Config) -> bool:
    return isinstance(config, LlamaConfig) or "attention" in config.block_types


def _num_experts(config: Config) -> int:
    return config.n_routed_experts if isinstance(config, NemotronHConfig) else 0


def _nearest(asked: int, fits: Callable[[int], bool]) -> int:
    """The degree nearest to `asked` by its factor; 1 always fits."""
    return min(filter(fits, range(1, 2 * asked + 1)), key=lambda degree: abs(math.log(degree / asked)))


def _unbuilt(recipe: Recipe, degrees: Degrees, config: Config) -> Iterator[str]:
    """What no other part of the code would refuse and none carries out."""
    if recipe.model.quantization == "nf4" and (over := _over_one(degrees, "shard", "tensor")):
        yield f"model.quantization: nf4 cannot be divided by {over}; use {_at_one(over)} (more data ranks instead), or model.quantization=none"
    if recipe.train.optimizer == "adamw_8bit" and (over := _over_one(degrees, "pipeline", "shard", "context", "tensor", "expert")):
        yield f"train.optimizer: adamw_8bit works with parallel.data alone, got {over}; use train.optimizer=adamw, or {_at_one(over)}"
    if recipe.model.offload == "experts" and (over := _over_one(degrees, "shard", "tensor", "expert")):
        yield f"model.offload: experts cannot be lent and divided, got {over}; use model.offload=none, or {_at_one(over)}"
    if recipe.train.router_aux_loss_coef and degrees.context > 1:
        yield (
            f"train.router_aux_loss_coef: the loss is that of whole documents, which parallel.context={degrees.context} divides; "
            "use train.router_aux_loss_coef=0 (train.router_bias_update_rate works), or parallel.context=1"
        )
    if recipe.method == "lora" and recipe.lora.dora and degrees.shard > 1:
        yield (
            f"lora.dora: DoRA needs whole rows of a weight when it begins, which parallel.shard={degrees.shard} divides; "
            "use lora.dora=false, or parallel.shard=1 (more data ranks instead)"
        )
    if degrees.tensor > 1:
        yield from _unbuilt_for_tensor(recipe, config)
    if degrees.pipeline > 1 and config.tie_word_embeddings and recipe.method != "lora":
        yield f"parallel.pipeline: got {degrees.pipeline}, and the embeddings are tied to the head and trained; use parallel.pipeline=1"


def _unbuilt_for_tensor(recipe: Recipe, config: Config) -> Iterator[str]:
    biases = ["attention_bias", "mlp_bias", *(["use_bias"] if isinstance(config, NemotronHConfig) else [])]
    if found := [name for name in biases if getattr(config, name)]:
        yield f"parallel.tensor: the model's output projections have biases ({', '.join(found)}), which no rank may add alone; use parallel.tensor=1"
    if recipe.method != "lora":
        return
    if recipe.lora.dora:
        yield "lora.dora: DoRA needs whole rows of a weight, which parallel.tensor divides; use lora.dora=false, or parallel.tensor=1"
    if recipe.lora.targets != "default":
        model = build_model(config)
        kinds = adaptable_modules(model)
        if any(kinds[name] == "embeddings" for name in matched_modules(model, recipe.lora.targets)):
            yield "lora.targets: embeddings are not adapted with parallel.tensor over 1; leave them out, or use parallel.tensor=1"


def _over_one(degrees: Degrees, *keys: str) -> str:
    return " ".join(f"parallel.{key}={getattr(degrees, key)}" for key in keys if getattr(degrees, key) > 1)


def _at_one(over: str) -> str:
    return " ".join(f"{setting.partition('=')[0]}=1" for setting in over.split())
