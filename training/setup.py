"""What a run is made of, as one: nearly everything that a step does needs these."""

from dataclasses import dataclass, field

from training.precision import LossScale
from training.progress import Stopwatch


@dataclass(frozen=True)
class Setup:
    """Models and settings of a run. Weights move; which objects these are does not."""

    policy: object  # a transformers model
    tokenizer: object
    task: object  # a tasks.Task
    args: object  # the flags
    accelerator: object  # accelerate's: device, autocast, processes
    reference: object = None  # what the KL term compares with, if anything
    stopwatch: Stopwatch = field(default_factory=Stopwatch)  # seconds of a step, by stage
    loss_scale: LossScale = field(default_factory=LossScale)  # moves in fp16
    referees: dict = field(default_factory=dict)  # {"referee": whom rewards ask, "eval_referee": }
    engine: object = None  # sampling/engine.py's, with --sampler vllm
