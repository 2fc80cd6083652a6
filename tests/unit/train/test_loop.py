"""What one step does to the weights, what validation leaves alone, and what the health gate sees over steps."""

from __future__ import annotations

import math
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from toy_split import ToySplit

from nemotune.data.loader import Loader, batches
from nemotune.distributed import World
from nemotune.distributed.gradients import gradient_norm
from nemotune.errors import UnsupportedError
from nemotune.lora import apply_lora, lora_modules
from nemotune.models import load_model
from nemotune.recipe import Lora, Train, load
from nemotune.train.activation import set_activation_checkpointing
from nemotune.train.checkpoint import Checkpoints, Progress
from nemotune.train.optim import describe, make_optimizer
from nemotune.train.step import accumulate, update, validation_loss
from nemotune.train.validation import Validation

SPLIT = ToySplit([30, 20, 25])
TARGETS = ("attention", "mamba", "mlp", "shared_experts", "experts")


@pytest.fixture
def adapted(hybrid_dir):
    model = load_model(hybrid_dir, dtype="float32")
    return model, apply_lora(model, Lora(rank=4, alpha=8, dropout=0.4, targets=TARGETS))


def backward(model, keys, *, step=0):
    model.train()
    return accumulate(model, Loader(SPLIT, global_batch_size=3, micro_batch_size=3, seed=0).step(0), keys=keys, seed=0, step=step)


def trainable(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("limit, moved", [(1.0, 1.0), (20.0, 10.0), (0.0, 10.0)])
def test_gradients_over_the_limit_are_scaled_to_it(limit, moved):
    parameters = [torch.nn.Parameter(torch.zeros(3)), torch.nn.Parameter(torch.zeros(1))]
    parameters[0].grad, parameters[1].grad = torch.tensor([6.0, 0.0, 0.0]), torch.tensor([8.0])
    norm = gradient_norm(parameters)
    assert norm == 10.0
    update(parameters, torch.optim.SGD(parameters, lr=99.0), learning_rate=1.0, grad_norm=norm, max_grad_norm=limit)
    assert torch.cat([p.detach() for p in parameters]).norm().item() == pytest.approx(moved, rel=1e-5)
    assert all(p.grad is None for p in parameters)


def test_validation_is_the_token_mean_without_dropout_and_leaves_the_mode(adapted):
    model, _ = adapted
    with torch.no_grad():
        for _, layer in lora_modules(model):
            layer.lora_B.normal_(0, 0.2, generator=torch.Generator().manual_seed(1))
    model.train()
    alone = validation_loss(model, batches(SPLIT, max_tokens=1))
    together = validation_loss(model, batches(SPLIT, max_tokens=1000))
    assert model.training and together == pytest.approx(alone, rel=1e-5)
    model.eval()
    total = sum(model.loss(model(b.tokens_T, b.cu_seqlens), b.targets_T).item() for b in batches(SPLIT, max_tokens=1000))
    assert together == pytest.approx(total / sum(b.num_supervised for b in batches(SPLIT, max_tokens=1000)), rel=1e-6)
    assert validation_loss(model, batches(SPLIT, max_tokens=1000)) == together and not model.training


def test_only_matrices_are_decayed_and_the_betas_are_the_recipes(hybrid_dir):
    model = load_model(hybrid_dir, dtype="float32", trainable=True)
    optimizer = make_optimizer(trainable(model), Train(weight_decay=0.1, betas=(0.8, 0.95)))
    names = {id(p): name for name, p in model.named_parameters()}
    decay = {names[id(p)]: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert decay.keys() == trainable(model).keys()
    for name, value in decay.items():
        plain = name.endswith(("norm.weight", "norm_f.weight", "A_log", ".D", "dt_bias", "conv1d.weight", "bias"))
        assert value == (0.0 if plain else 0.1), name
    assert all(group["betas"] == (0.8, 0.95) for group in optimizer.param_groups)


def test_8_bit_adamw_without_its_libraries_says_what_to_install(adapted, monkeypatch):
    model, _ = adapted
    monkeypatch.setitem(sys.modules, "torchao.optim", None)
    with pytest.raises(UnsupportedError, match=r"train\.optimizer: adamw_8bit needs torchao on a CPU, and it is not installed"):
        make_optimizer(trainable(model), Train(optimizer="adamw_8bit"))


def library(monkeypatch, name):
    """A stand-in for `name`'s 8-bit AdamW: the choice is tested here, the arithmetic in tests/parity."""
    stand_in = type("AdamW8bit", (torch.optim.AdamW,), {"__module__": f"{name}.optim.adam"})
    monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, f"{name}.optim", SimpleNamespace(AdamW8bit=stand_in))
    return stand_in


def test_8_bit_adamw_on_a_cpu_is_torchaos_and_says_so(adapted, monkeypatch):
    library(monkeypatch, "bitsandbytes")
    stand_in = library(monkeypatch, "torchao")
    optimizer = make_optimizer(trainable(adapted[0]), Train(optimizer="adamw_8bit"))
    assert type(optimizer) is stand_in
    told = describe(optimizer)
    assert "torchao's 8-bit AdamW" in told and "bitsandbytes needs CUDA" in told and "first step compiles" in told
    assert describe(make_optimizer(trainable(adapted[0]), Train())) is None


def test_8_bit_adamw_on_a_gpu_is_bitsandbytes_where_it_is_installed(adapted, monkeypatch):
    parameters = {name: OnCuda(p) for name, p in trainable(adapted[0]).items()}
    library(monkeypatch, "torchao")
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    assert "bitsandbytes is not installed" in describe(make_optimizer(parameters, Train(optimizer="adamw_8bit")))
    stand_in = library(monkeypatch, "bitsandbytes")
    optimizer = make_optimizer(parameters, Train(optimizer="adamw_8bit"))
    assert type(optimizer) is stand_in and "bitsandbytes' 8-bit AdamW" in describe(optimizer)


class OnCuda(torch.nn.Parameter):
    is_cuda = True


def test_8_bit_adamw_without_a_compiler_is_refused_before_training(adapted, monkeypatch):
    library(monkeypatch, "torchao")
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(UnsupportedError, match=r"train\.optimizer: .*no-such-compiler.*train\.optimizer=adamw"):
        make_optimizer(trainable(adapted[0]), Train(optimizer="adamw_8bit"))


class Products(TorchDispatchMode):
    """Counts the products of linear layers, in the forward, the backward and what is computed again."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function == torch.ops.aten.mm.default
        return function(*args, **(kwargs or {}))


def test_checkpointing_computes_again_what_it_says(adapted):
    model, keys = adapted
    products, norms = {}, {}
    for mode in ("none", "selective", "full"):
        set_activation_checkpointing(model, mode)
        calls = []
        hook = model.backbone.layers[0].norm.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        model.zero_grad()
        with Products() as counter:
            backward(model, keys)
        hook.remove()
        products[mode], norms[mode] = counter.count, len(calls)
    assert norms == {"none": 1, "selective": 2, "full": 2}
    assert 0 < products["none"] == products["selective"] < products["full"]


def test_only_supervised_positions_reach_the_head(adapted):
    model, _ = adapted
    rows = []
    model.lm_head.register_forward_hook(lambda module, inputs, output: rows.append(len(inputs[0])))
    batch = next(batches(SPLIT, max_tokens=1000))
    model.loss(model(batch.tokens_T, batch.cu_seqlens), batch.targets_T)
    assert sum(rows) == batch.num_supervised < batch.num_tokens


def test_the_best_checkpoint_is_kept_and_the_oldest_go(adapted, tmp_path):
    model, keys = adapted
    optimizer = make_optimizer(trainable(model), Train())
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step in range(1, 5):
        backward(model, keys, step=step)
        update(trainable(model).values(), optimizer, learning_rate=0.01, grad_norm=1.0, max_grad_norm=0.0)
        checkpoints.save(model, optimizer, Progress(step=step, best_loss=2.0, best_step=1))
    checkpoints.wait()
    assert sorted(p.name for p in (tmp_path / "checkpoints").glob("step_*")) == ["step_000001", "step_000003", "step_000004"]
    first = checkpoints.best(Progress(best_step=1))
    assert first.name == "step_000001" and checkpoints.latest().name == "step_000004"
    now = {name: p.detach().clone() for name, p in trainable(model).items()}
    assert checkpoints.load(first, model, optimizer) == Progress(step=1, best_loss=2.0, best_step=1)
    assert any(not torch.equal(p, now[name]) for name, p in trainable(model).items())
    checkpoints.load(checkpoints.latest(), model, optimizer)
    assert all(torch.equal(p, now[name]) for name, p in trainable(model).items())


def test_patience_counts_evaluations_since_the_best():
    progress = Progress(step=4).after_evaluation(2.0, better=True).after_evaluation(3.0, better=False)
    assert (progress.best_loss, progress.best_step) == (2.0, 4) and not progress.has_waited(2) and not progress.has_waited(None)
    assert progress.after_evaluation(2.5, better=False).has_waited(2)
    assert math.isclose(progress.after_evaluation(1.0, better=True).best_loss, 1.0)


class Second(World):
    """A process that hears from the first one."""

    def agree(self, value):
        return 1.25

    def gather(self, value):
        return [value]


def test_what_a_validation_measured_is_said_by_the_first_process(adapted):
    """Whether it is the best is decided in all, which would part if the last bits of theirs differed."""
    metrics = SimpleNamespace(rows=list, write=lambda *_, **__: None)
    held_out = Validation(adapted[0], SPLIT, load("quickstart"), metrics=metrics, last_step=1, world=Second())
    assert held_out.measure(1) == 1.25
