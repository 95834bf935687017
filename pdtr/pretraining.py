"""Joint pre-training by flow matching: editing and text-to-image batches in turn, one policy (UniPic 2.0, stage B).

The loss is ``|v(x_sigma, sigma, c) - (noise - x_0)|^2`` with logit-normal sigma. An optimiser step sees one batch of
each task. Every draw is seeded by (seed, step), so a resumed run repeats the one that was never stopped.

Differs: Muon (https://kellerjordan.github.io/posts/muon/) for the blocks' matrices in place of AdamW alone, and a
linear decay over the last steps in place of a cosine, so that a run can be made longer before it decays. CPU only.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from pdtr.optimizers import muon_and_adamw, optimizers_state, restore_optimizers, step_all

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from agents.policies.scenes import ScenesPolicy
    from envs.scenes.pretraining import SupervisedBatch


@dataclass(frozen=True)
class PretrainConfig:
    """Pre-training of the embedded world's policy.

    Attributes:
        output_dir: where checkpoints and the final policy go.
        num_steps: optimiser steps.
        t2i_batch_size: text-to-image examples a step.
        edit_batch_size: edits a step.
        muon_learning_rate: peak, for the matrices of the transformer's blocks (scaled to AdamW's root mean square).
        learning_rate: AdamW's peak, for everything else.
        warmup_steps: of linear warm-up.
        decay_share: last share of the steps, over which the learning rates fall linearly to 0.
        text_dropout: chance of an empty text, for guidance.
        mislabelled: share of the pairs whose text and picture differ in one thing, as in mined data: what is left for
            reinforcement to mend.
        sigma_shift: SD3's shift of the logit-normal sigmas. Objects stand out of these latents at far more than unit
            variance, so that what is where is decided above sigma 0.8; without a shift little is learnt there.
        ema_decay: of the averaged weights, which are the ones that are saved.
        max_grad_norm: gradients are clipped to it.
        checkpoint_every: steps between checkpoints.
        evaluate_every: steps between held-out losses in the log.
        num_evaluated: held-out examples a task in them.
        num_threads: torch threads; a tiny model gains nothing from more.
        seed: of everything.
    """

    output_dir: Path = Path("runs/pretrain_scenes")
    num_steps: int = 14000
    t2i_batch_size: int = 36
    edit_batch_size: int = 16
    muon_learning_rate: float = 8e-3
    learning_rate: float = 1.5e-3
    warmup_steps: int = 50
    decay_share: float = 0.4
    text_dropout: float = 0.1
    mislabelled: float = 0.15
    sigma_shift: float = 4.0
    ema_decay: float = 0.998
    max_grad_norm: float = 1.0
    checkpoint_every: int = 400
    evaluate_every: int = 200
    num_evaluated: int = 256
    num_threads: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        if self.num_steps < 1 or self.t2i_batch_size < 1 or self.edit_batch_size < 1:
            raise ValueError("num_steps and both batch sizes: expected 1 or more")
        if not 0 <= self.decay_share <= 1 or not 0 <= self.text_dropout < 1 or not 0 <= self.mislabelled <= 1:
            raise ValueError("decay_share, text_dropout and mislabelled: expected a share between 0 and 1")


def learning_rate_scale(config: PretrainConfig, step: int) -> float:
    """Warm-up, constant, linear decay to 0: in [0, 1]."""
    warmup = (step + 1) / max(config.warmup_steps, 1)
    decay = (config.num_steps - step) / max(config.decay_share * config.num_steps, 1)
    return min(1.0, warmup, decay)


def make_policy(config: PretrainConfig) -> ScenesPolicy:
    """A fresh policy with the world's vocabulary and a codec fitted on its pictures."""
    import numpy as np
    import torch

    from agents.policies.scenes import ScenesPolicy, ScenesPolicyConfig
    from agents.policies.scenes_parts import PatchCodec
    from envs.scenes.pretraining import supervised_batch, vocabulary

    policy = ScenesPolicy(ScenesPolicyConfig(vocabulary()), seed=config.seed)
    rng = np.random.default_rng([config.seed, 0])
    images = np.concatenate([supervised_batch(task, rng, 2000).targets for task in ("t2i", "edit")])
    assert isinstance(policy.codec, PatchCodec)
    policy.codec.fit(torch.from_numpy(images))
    return policy


def flow_matching_loss(
    config: PretrainConfig, policy: ScenesPolicy, batch: SupervisedBatch, generator: torch.Generator
) -> Tensor:
    """Mean squared error of the velocity on a supervised batch; a scalar that reaches the word encoder too."""
    import torch

    from agents.flow import interpolate, logit_normal_sigmas, velocity_target
    from agents.types import Condition

    kept = (torch.rand(len(batch.texts), generator=generator) >= config.text_dropout).tolist()
    texts = [text if keep else "" for text, keep in zip(batch.texts, kept, strict=True)]
    references = None if batch.sources is None else policy.codec.encode(torch.from_numpy(batch.sources))
    x_0 = policy.codec.encode(torch.from_numpy(batch.targets))
    sigma = logit_normal_sigmas(len(x_0), generator, shift=config.sigma_shift)
    noise = torch.randn(x_0.shape, generator=generator)
    condition = Condition(policy.embed(texts, references))
    velocity = policy.conditional_velocity(interpolate(x_0, noise, sigma), sigma, condition)
    return (velocity - velocity_target(x_0, noise)).square().mean()


def make_optimizers(config: PretrainConfig, policy: ScenesPolicy) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the transformer's blocks, AdamW for the rest; peak learning rates."""
    named = policy.parts.named_parameters()
    return muon_and_adamw(
        named, config.muon_learning_rate, lr=config.learning_rate, betas=(0.9, 0.99), weight_decay=0.0
    )


def train_steps(
    config: PretrainConfig, policy: ScenesPolicy, optimizers: list[torch.optim.Optimizer], first_step: int
) -> Iterator[tuple[int, float]]:
    """Optimise in place from ``first_step`` on; yields (steps done, loss)."""
    import numpy as np
    import torch

    from agents.samplers import derive_seed
    from envs.scenes.pretraining import supervised_batch

    parameters = list(policy.parts.parameters())
    peaks = [optimizer.param_groups[0]["lr"] for optimizer in make_optimizers(config, policy)]
    sizes = {"t2i": config.t2i_batch_size, "edit": config.edit_batch_size}
    for step in range(first_step, config.num_steps):
        rng = np.random.default_rng([config.seed, 1, step])
        generator = torch.Generator().manual_seed(derive_seed(config.seed, "pretrain", step))
        total = 0.0
        for task, size in sizes.items():
            batch = supervised_batch(task, rng, size, mislabelled=config.mislabelled)
            loss = flow_matching_loss(config, policy, batch, generator) / len(sizes)
            loss.backward()  # type: ignore[no-untyped-call]
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)
        step_all(optimizers, peaks, learning_rate_scale(config, step))
        yield step + 1, total


def held_out_losses(config: PretrainConfig, policy: ScenesPolicy) -> dict[str, float]:
    """The loss of both tasks on a fixed draw from the held-out split, without text dropout."""
    import numpy as np
    import torch

    from envs.scenes.pretraining import supervised_batch

    losses = {}
    with torch.no_grad():
        for index, task in enumerate(("t2i", "edit")):
            batch = supervised_batch(task, np.random.default_rng([7, index]), config.num_evaluated, "held_out")
            generator = torch.Generator().manual_seed(index)
            losses[task] = flow_matching_loss(replace(config, text_dropout=0.0), policy, batch, generator).item()
    return losses


def pretrain(
    config: PretrainConfig,
    resume: bool = False,
    report: Callable[[str], None] = print,
    on_step: Callable[[int, float], None] = lambda steps_done, loss: None,
) -> Path:
    """Pre-train, checkpoint as it goes, and save the averaged policy, in float16, under ``output_dir / "policy"``.

    Args:
        config: see :class:`PretrainConfig`.
        resume: go on from the last checkpoint under ``output_dir``, if there is one.
        report: where lines of progress go.
        on_step: told the steps done and the loss after each, for a progress bar.

    Returns:
        The folder of the policy.

    Raises:
        ValueError: the folder holds a run and ``resume`` is not asked for.
    """
    import torch

    from agents.policies.averaging import average_into
    from pdtr import checkpoint

    torch.set_num_threads(config.num_threads)
    policy = make_policy(config)
    average = copy.deepcopy(policy)
    optimizers = make_optimizers(config, policy)
    first = 0
    last = checkpoint.latest(config.output_dir)
    if last is not None and not resume:
        raise ValueError(
            f"{config.output_dir}: expected a new folder, got one with {last.name}; pass --resume, or another one"
        )
    if last is not None:
        first = _restore(last, policy, average, optimizers)
        report(f"resumed at step {first} from {last}")
    started = time.monotonic()
    for steps_done, loss in train_steps(config, policy, optimizers, first):
        # The average's window grows with the run, so that early weights do not linger in a short one.
        average_into(average.parts, policy.parts, min(config.ema_decay, steps_done / (steps_done + 10)))
        on_step(steps_done, loss)
        if steps_done % config.evaluate_every == 0 or steps_done == config.num_steps:
            seconds = (time.monotonic() - started) / (steps_done - first)
            losses = "  ".join(f"{task} {value:.4f}" for task, value in held_out_losses(config, average).items())
            left = (config.num_steps - steps_done) * seconds / 60
            report(
                f"step {steps_done}  loss {loss:.4f}  held-out {losses}  {seconds:.2f} s a step, {left:.0f} min left"
            )
        if steps_done % config.checkpoint_every == 0:
            _checkpoint(config.output_dir, steps_done, policy, average, optimizers)
            average.save(config.output_dir / "policy")
    average.save(config.output_dir / "policy", torch.float16)
    return config.output_dir / "policy"


def _checkpoint(
    folder: Path, step: int, policy: ScenesPolicy, average: ScenesPolicy, optimizers: list[torch.optim.Optimizer]
) -> None:
    from pdtr import checkpoint

    tensors = {f"policy.{k}": v for k, v in policy.parts.state_dict().items()}
    tensors |= {f"average.{k}": v for k, v in average.parts.state_dict().items()}
    state, meta = optimizers_state(optimizers)
    meta |= {"kind": "pretrain", "step": step}
    checkpoint.save_state(folder / checkpoint.checkpoint_name(step), tensors | state, meta)
    checkpoint.prune(folder, keep=2)


def _restore(folder: Path, policy: ScenesPolicy, average: ScenesPolicy, optimizers: list[torch.optim.Optimizer]) -> int:
    from pdtr import checkpoint

    tensors, meta = checkpoint.load_state(folder)

    def part(prefix: str) -> dict[str, Tensor]:
        return {k.removeprefix(f"{prefix}."): v for k, v in tensors.items() if k.startswith(f"{prefix}.")}

    policy.parts.load_state_dict(part("policy"))
    average.parts.load_state_dict(part("average"))
    restore_optimizers(optimizers, tensors, meta)
    return int(meta["step"])
