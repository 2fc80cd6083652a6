"""Training: from a model with trainable parameters and prepared batches to metrics, checkpoints and tuned weights.

Read `run.py` from top to bottom, then `loop.py` and `step.py`. It knows no recipe method but by which parameters are trainable; evaluation
beyond the validation loss is elsewhere.
"""

from nemotune.train.deadline import Deadline
from nemotune.train.run import TrainResult, run

__all__ = ["Deadline", "TrainResult", "run"]
