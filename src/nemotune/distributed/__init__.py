"""Several processes that train one model: who does what, and how the one-process model, its data and gradients are divided.

It changes models from outside; models, ops and lora never ask how many processes there are. Start with `world.py`, then `parallelize.py`.
"""

from nemotune.distributed.gradients import Gradients
from nemotune.distributed.parallelize import arrange, connect, layouts_of, replicas
from nemotune.distributed.shard import divide
from nemotune.distributed.world import World, start

__all__ = ["Gradients", "World", "arrange", "connect", "divide", "layouts_of", "replicas", "start"]
