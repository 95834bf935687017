"""What ``experiments.benchmarks.sd3_speed`` times: rollouts and updates made as the trainer makes them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

if TYPE_CHECKING:
    from agents.learner import Learner
    from agents.policies.unipic2 import KontextPolicy
    from agents.types import Rollout
    from experiments.benchmarks.sd3_speed import Options
    from pdtr.config import TrainConfig

GUIDANCE, KL_COEF = 4.5, 0.04
"""Those of Flow-GRPO's published GenEval run."""
Training = Literal["none", "lora", "full"]


@dataclass(frozen=True)
class Case:
    """A way to draw or to learn.

    Attributes:
        training: what learns: nothing, of a base that only draws; adapters; all parameters.
        guidance_scale: 1 is none.
        kl_coef: of Flow-GRPO; 0 saves the reference and its pass.
    """

    training: Training
    guidance_scale: float
    kl_coef: float = 0.0

    @property
    def num_branches(self) -> int:
        """Forward passes of a velocity."""
        return 1 if self.guidance_scale == 1.0 else 2

    @property
    def extras(self) -> list[str]:
        """What goes with the sizes in a case's name."""
        guidance = [f"guidance {self.guidance_scale:g}"] if self.guidance_scale != 1.0 else []
        return guidance + ([f"KL {self.kl_coef:g}"] if self.kl_coef else [])

    def __str__(self) -> str:
        return ", ".join([self.training, *self.extras])


def make_rollout(options: Options, case: Case) -> Callable[[], object]:
    """A function that draws one batch."""
    import torch

    from agents.rollout import denoise
    from pdtr.trainer import make_weights

    policy, sampler = make_policy(options), _sampler(options, case)
    if case.training == "lora":
        make_weights(_config(options, case), policy)
    condition, steps = policy.encode(_prompts(options)), sampler.stochastic_steps(torch.Generator())
    return lambda: denoise(policy, condition, sampler, steps, range(options.batch_size))


def make_learner(options: Options, case: Case) -> tuple[Learner, Rollout]:
    """A learner with the trainer's weights and optimiser, and a rollout with made-up advantages for it."""
    import torch

    from agents.learner import Learner
    from agents.rollout import denoise
    from agents.types import Rollout
    from pdtr.trainer import make_optimizer, make_weights

    policy, config = make_policy(options, float32_weights=case.training == "full"), _config(options, case)
    transformer: Any = policy.transformer
    transformer.enable_gradient_checkpointing()
    weights = make_weights(config, policy)
    sampler = config.algorithm.sampler()
    steps = sampler.stochastic_steps(torch.Generator())
    trajectory = denoise(policy, policy.encode(_prompts(options)), sampler, steps, range(options.batch_size))
    values = torch.linspace(-1, 1, options.batch_size)
    rollout = Rollout((trajectory,), values, {}, torch.zeros(options.batch_size, dtype=torch.long), values)
    optimizer = make_optimizer(config, weights)
    return Learner(policy, weights, config.algorithm, optimizer, config.learner), rollout


def make_policy(options: Options, float32_weights: bool = False) -> KontextPolicy:
    """The transformer on the device; passes are in bfloat16 in any case."""
    import torch

    from experiments.benchmarks.sd3_flops import initialise, random_policy

    dtype = torch.float32 if float32_weights else torch.bfloat16
    policy = random_policy(transformer_sizes(options), options.image_size, options.device, dtype)
    initialise(policy.transformer, seed=0)
    if options.compile:
        transformer: Any = policy.transformer
        for block in transformer.transformer_blocks:
            block.compile()
    return policy


def transformer_sizes(options: Options) -> dict[str, Any]:
    """SD3.5-Medium's, with the options' layers and heads."""
    from agents.policies.sd3 import sd35_medium_config

    config = sd35_medium_config()
    dual = tuple(layer for layer in config["dual_attention_layers"] if layer < options.num_layers)
    sizes = {"num_layers": options.num_layers, "num_attention_heads": options.num_heads}
    width = options.num_heads * config["attention_head_dim"]
    return {**config, **sizes, "dual_attention_layers": dual, "caption_projection_dim": width}


def _config(options: Options, case: Case) -> TrainConfig:
    from agents.algorithms.flow_grpo import FlowGRPO
    from agents.learner import LearnerSettings
    from agents.policies.weights import LoraSettings
    from pdtr.config import TrainConfig
    from pdtr.curriculum import SingleTask

    return TrainConfig(
        algorithm=FlowGRPO(_sampler(options, case), kl_coef=case.kl_coef),
        curriculum=SingleTask("edit" if options.num_references else "t2i", 1),
        num_prompts=options.batch_size,
        group_size=1,
        chunk_size=options.batch_size,
        learning_rate=1e-6,
        learner=LearnerSettings(num_minibatches=1, ema_decay=0),
        lora=LoraSettings() if case.training == "lora" else None,
    )


def _sampler(options: Options, case: Case) -> Any:
    from agents.samplers import FlowSDE

    return FlowSDE(options.num_inference_steps, case.guidance_scale, shift=3.0)


def _prompts(options: Options) -> list[Any]:
    from agents.rollout import Ask

    source = np.zeros((options.image_size, options.image_size, 3), np.uint8)
    return [Ask("", (source,) * options.num_references) for _ in range(options.batch_size)]
