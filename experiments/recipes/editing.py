"""Published runs of editing alone, on FLUX.1-Kontext and Qwen-Image-Edit. Each constant has its source."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from experiments.recipes.sd3 import diffusion_nft_sd3_geneval as _diffusion_nft
from experiments.recipes.sd3 import flow_grpo_sd3_geneval as _flow_grpo

if TYPE_CHECKING:
    from pdtr.config import TrainConfig

# Open: ours, as in every published run.
_NUM_ITERATIONS = 500


def flow_grpo_flux_kontext() -> TrainConfig:
    """Flow-GRPO on FLUX.1-Kontext with an edit reward: the published setting for counting edits."""
    from agents.algorithms.flow_grpo import FlowGRPO
    from agents.samplers import ODE, FlowSDE

    config = _edits(_flow_grpo())
    # Published (Flow-GRPO's code, counting_flux_kontext) but where a line says otherwise.
    return replace(
        config,
        output_dir=Path("runs/flow_grpo_flux_kontext"),
        base=Path("black-forest-labs/FLUX.1-Kontext-dev"),
        algorithm=FlowGRPO(
            # Guidance 2.5 is an input of the distilled model, and its policy's default; 1.0 is no other beside it.
            FlowSDE(num_inference_steps=6, guidance_scale=1.0, shift=None, noise_level=0.9),
            clip_range=1e-4,
            kl_coef=0.0,
            advantage_std="global",
        ),
        num_prompts=48,
        group_size=21,
        chunk_size=3,
        evaluation=replace(config.evaluation, every=30, sampler=ODE(28, 1.0, None)),
    )


def diffusion_nft_qwen_image_edit() -> TrainConfig:
    """Edit-R1: DiffusionNFT on Qwen-Image-Edit-2509, with an edit reward in its judge's place."""
    from agents.algorithms.diffusion_nft import DiffusionNFT
    from agents.samplers import ODE

    config = _edits(_diffusion_nft())
    # Published (Edit-R1's code, kontext_nft, which has the same for Kontext) but where a line says otherwise.
    return replace(
        config,
        output_dir=Path("runs/diffusion_nft_qwen_image_edit"),
        base=Path("Qwen/Qwen-Image-Edit-2509"),
        # Differs: Euler's method, not DPM-2. No guidance: inferred. The old policy's decay is DiffusionNFT's own.
        algorithm=DiffusionNFT(
            ODE(num_inference_steps=6, guidance_scale=1.0, shift=None),
            beta=1.0,
            kl_coef=1e-4,
            num_sigmas=5,  # Inferred: of six sampled steps, as for SD3.
            advantage_std="global",
        ),
        num_prompts=24,
        group_size=12,
        chunk_size=3,
        evaluation=replace(config.evaluation, every=30, sampler=ODE(15, 1.0, None)),
    )


def _edits(config: TrainConfig) -> TrainConfig:
    """The same on edits, at 512 x 512, with the activations of a large transformer recomputed.

    Differs: published rewards are half a similarity and half GenEval's rule (Flow-GRPO), and a judge of 32 billion
    parameters behind vLLM (Edit-R1).
    """
    from agents.policies.backbone import BackboneSettings
    from experiments.published_rewards import EditRewardWeights, PublishedRewards
    from experiments.published_tasks import PublishedTasks
    from pdtr.curriculum import SingleTask

    return replace(
        config,
        backbone=BackboneSettings(512, 512, dtype="bfloat16", gradient_checkpointing=True),
        curriculum=SingleTask("edit", _NUM_ITERATIONS),
        tasks=PublishedTasks(edit_prompts=Path("data/editing/train.jsonl")),  # Edit-R1's own file has this form.
        rewards=PublishedRewards(edit=EditRewardWeights()),
        evaluation=replace(config.evaluation, num_prompts=128, num_final_prompts=384),  # Open: ours.
    )
