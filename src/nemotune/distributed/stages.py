"""Which layers each pipeline stage holds: as even a share as whole layers allow of the weights that a token meets, in the model's order.

The first stage has the embeddings, the last one the final norm and the head, whose weights count too. Of routed experts those count that a token
is sent to. Not counted are pairs of query and key and Mamba's recurrence, a few hundredths of a layer but in very long documents.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from itertools import accumulate, pairwise

from torch import nn

from nemotune.distributed.world import World
from nemotune.models import CausalLM, LlamaConfig, NemotronHConfig, build_model
from nemotune.models.layers import Elsewhere, GroupedLinear


def arrange(model: CausalLM, world: World) -> None:
    """Leave of the empty `model` this stage's layers. What other stages hold stands in its place, without parameters, under its name.

    Embeddings that are tied to the head lie in the last stage as well, for the head alone.
    """
    if world.degrees.pipeline == 1:
        return
    own = stages_of(model, world.degrees.pipeline)[world.index("pipeline")]
    for index in set(range(len(model.blocks))) - set(own):
        model.blocks[index] = Elsewhere()
    if 0 not in own:
        is_shared = model.config.tie_word_embeddings and own.stop == len(model.blocks)
        _replace(model, model.embeddings, Elsewhere(model.embeddings.weight if is_shared else None))
    if own.stop < len(model.blocks):
        _replace(model, model.final_norm, Elsewhere())
        _replace(model, model.lm_head, Elsewhere())


def stages_of(model: CausalLM, stages: int) -> list[range]:
    """The layers of each of `stages`, from the shapes of the whole `model`, which may lie on the meta device."""
    return split(_work(model), stages)


def describe_stages(config: NemotronHConfig | LlamaConfig, stages: int) -> str:
    """A line for each stage: its layers, and its share of the weights that a token meets in the whole model of `config`."""
    work = _work(build_model(config))
    lines = []
    for number, layers in enumerate(split(work, stages), 1):
        share = sum(work[layer] for layer in layers) / sum(work)
        held = ["embeddings"] * (number == 1) + [f"layers {layers.start}-{layers[-1]}"] + ["head"] * (number == stages)
        lines.append(f"pipeline stage {number} of {stages}: {', '.join(held)}; {share:.1%} of the work")
    return "\n".join(lines)


def split(work: Sequence[int], stages: int) -> list[range]:
    """Consecutive layers, at least one a stage, such that the most work of a stage is least; of such splits an even one, always the same."""
    before = [0, *accumulate(work)]

    @cache
    def best(stop: int, count: int) -> tuple[int, int, tuple[int, ...]]:
        """The most work, the sum of squares, and where stages begin, of the layers before `stop` in `count` stages."""
        if count == 1:
            return before[stop], before[stop] ** 2, (0,)
        found = []
        for start in range(count - 1, stop):
            most, squares, starts = best(start, count - 1)
            mine = before[stop] - before[start]
            found.append((max(most, mine), squares + mine**2, (*starts, start)))
        return min(found)

    return [range(*borders) for borders in pairwise((*best(len(work), stages)[2], len(work)))]


def _work(model: CausalLM) -> list[int]:
    """Of each layer, the weights that a token meets there; the head's are the last layer's."""
    work = [_met_weights(block, model) for block in model.blocks]
    work[-1] += _met_weights(model.lm_head, model)
    return work


def _met_weights(module: nn.Module, model: CausalLM) -> int:
    met = 0
    for part in module.modules():
        weights = sum(parameter.numel() for parameter in part.parameters(recurse=False))
        if isinstance(part, GroupedLinear):
            assert isinstance(model.config, NemotronHConfig)
            weights = weights * model.config.num_experts_per_tok // part.num_experts
        met += weights
    return met


def _replace(model: CausalLM, module: nn.Module, stand_in: Elsewhere) -> None:
    name = next(name for name, found in model.named_modules() if found is module)
    owner, _, last = name.rpartition(".")
    setattr(model.get_submodule(owner), last, stand_in)
