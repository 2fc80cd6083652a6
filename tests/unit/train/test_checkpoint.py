"""What a checkpoint of a run holds."""

from __future__ import annotations

from torch.distributed.checkpoint import FileSystemReader
from toy_split import ToySplit

from nemotune.data.loader import Loader
from nemotune.lora import apply_lora, lora_modules
from nemotune.models import load_model
from nemotune.recipe import Lora, Train
from nemotune.train.checkpoint import Checkpoints, Progress
from nemotune.train.optim import make_optimizer
from nemotune.train.step import accumulate


def test_a_checkpoint_of_lora_holds_the_adapters_and_their_moments_alone(hybrid_dir, tmp_path):
    model = load_model(hybrid_dir, dtype="float32").train()
    keys = apply_lora(model, Lora(rank=2))
    optimizer = make_optimizer({name: p for name, p in model.named_parameters() if p.requires_grad}, Train())
    accumulate(model, Loader(ToySplit([9]), global_batch_size=1, micro_batch_size=1, seed=0).step(0), keys=keys, seed=0, step=0)
    optimizer.step()
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(model, optimizer, Progress(step=1))
    held = FileSystemReader(checkpoints.latest()).read_metadata().state_dict_metadata
    adapters = {f"{name}.{which}" for name, _ in lora_modules(model) for which in ("lora_A", "lora_B")}
    assert {key.removeprefix("model.") for key in held if key.startswith("model.")} == adapters
    moments = {key.removeprefix("optimizer.state.") for key in held if key.startswith("optimizer.state.")}
    assert moments == {f"{name}.{moment}" for name in adapters for moment in ("exp_avg", "exp_avg_sq", "step")}
