"""The phases of ``pdtr metaquery-scenes``: language model, stage A, stage C, PDTR, and what each came to."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from agents.policies.backbone import BackboneSettings
from agents.policies.base import FlowPolicy
from agents.policies.connector import Connector, ConnectorConfig
from agents.policies.metaquery import MetaQueryPolicy
from agents.policies.metaquery_parts import MetaQueryPipeline, MetaQueryTraits
from agents.policies.query_reader import QueryReader
from agents.policies.scenes import ScenesPolicy
from agents.samplers import ODE
from envs.scenes.pretraining import SupervisedBatch
from envs.scenes.world import CANVAS
from experiments.metaquery_scenes import MetaQueryScenesConfig
from experiments.metaquery_vlm import held_out_answers, new_vlm, reading_of_scenes, train_vlm, vlm_shape
from experiments.scenes_judge_schedule import Rates
from pdtr.launch import BASE
from pdtr.pretraining_data import ScenesSource
from pdtr.pretraining_loop import pretrain_stage
from pdtr.pretraining_run import StageRun
from pdtr.pretraining_stages import PUBLISHED, Stage, StageConfig
from pdtr.tasks import Task

Say = Callable[[str], None]
RESULTS = "results.json"
# How the base was trained and is drawn: see pdtr.pretraining and the recipe pdtr_scenes.
_SHIFT = 4.0
_SAMPLER = ODE(num_inference_steps=8, guidance_scale=2.5, shift=_SHIFT)
SETTINGS = BackboneSettings(height=CANVAS, width=CANVAS, dtype="float32", offload_encoders=False, slice_vae=False)
# The base's own share of wrong pairs: what reinforcement is to mend.
_MISLABELLED = 0.15
_HEAD = 32


def run_phases(config: MetaQueryScenesConfig, say: Say) -> dict[str, Any]:
    """Do what is not done yet; -> what was measured, which is also in ``results.json``."""
    torch.set_num_threads(config.num_threads)
    config.output_dir.mkdir(parents=True, exist_ok=True)
    path = config.output_dir / RESULTS
    results: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    results["config"] = json.loads(json.dumps(asdict(config), default=str))
    phases: dict[str, Callable[[], dict[str, Any]]] = {
        "base": lambda: measure_base(config),
        "lmm": lambda: make_lmm(config, say),
        "align": lambda: _stage(config, "A", say),
        "unify": lambda: _stage(config, "C", say),
    }
    if config.rl_iterations:
        phases["rl"] = lambda: practise(config, say)
    for name, phase in phases.items():
        if name in results:
            say(f"{name}: done before")
            continue
        started = time.monotonic()
        results[name] = {**phase(), "seconds": round(time.monotonic() - started, 1)}
        path.write_text(json.dumps(results, indent=1) + "\n")
        say(f"{name}: {json.dumps(results[name])}")
    return results


def measure_base(config: MetaQueryScenesConfig) -> dict[str, Any]:
    """What the same transformer reaches with the words' own encoder, which stage A is to replace."""
    policy = ScenesPolicy.load(config.base or BASE)
    settings = replace(stage_config(config, "C"), stage="B")
    run = StageRun(settings, policy, ScenesSource({"t2i": 1}), _held_out(settings.cycle))
    return {"held_out": run.held_out_losses(), **measure(config, policy)}


def make_lmm(config: MetaQueryScenesConfig, say: Say) -> dict[str, Any]:
    """Make and train the language model, and put it into a folder with an untrained connector."""
    shape = vlm_shape(config.width, config.num_layers, config.seed)
    lmm, tokenizer, pictures = new_vlm(shape)
    reader = QueryReader(lmm, tokenizer, pictures, reading_of_scenes())
    if config.language_steps or config.vision_steps:
        rates = Rates(learning_rate=4e-3, batch_size=config.language_batch_size, seed=config.seed)
        train_vlm(reader, shape, (config.vision_steps, config.language_steps), rates, say)
    lmm.train(False)
    policy = assemble(config, lmm, tokenizer, pictures)
    policy.save(config.output_dir / "lmm" / "policy")
    return {"held_out_words_right": held_out_answers(reader)}


def assemble(config: MetaQueryScenesConfig, lmm: Any, tokenizer: Any, pictures: Any) -> MetaQueryPolicy:
    """The base's transformer and codec, prompted by a language model through a new connector."""
    base = ScenesPolicy.load(config.base or BASE)
    sizes = ConnectorConfig(
        num_queries=config.num_queries,
        llm_hidden_size=config.width,
        hidden_size=base.config.width,
        intermediate_size=4 * base.config.width,
        num_hidden_layers=config.connector_layers,
        num_attention_heads=base.config.width // _HEAD,
        joint_attention_dim=base.config.width,
        pooled_projection_dim=base.config.width,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        connector = Connector(sizes)
    build: Any = FlowMatchEulerDiscreteScheduler
    traits = MetaQueryTraits(reading_of_scenes())
    parts = (base.transformer, base.codec, build(shift=_SHIFT), lmm, tokenizer, pictures, connector, traits)
    return MetaQueryPolicy(MetaQueryPipeline(*parts), SETTINGS)


def stage_config(config: MetaQueryScenesConfig, stage: Stage) -> StageConfig:
    """A published stage with the embedded world's sizes: fewer steps, smaller batches, higher rates, its own sigmas."""
    is_a = stage == "A"
    return replace(
        PUBLISHED[stage],
        output_dir=config.output_dir / ("align" if is_a else "unify"),
        num_steps=config.align_steps if is_a else config.unify_steps,
        learning_rate=config.align_learning_rate if is_a else config.unify_learning_rate,
        muon_learning_rate=config.align_muon_learning_rate if is_a else config.unify_muon_learning_rate,
        global_batch_size=config.t2i_batch_size + (0 if is_a else config.edit_batch_size),
        warmup_share=0.03,
        sigma_law="logit_normal",
        sigma_shift=_SHIFT,
        # Guidance has the empty instruction here, so it has to be known.
        edit_text_dropout=0.1,
        checkpoint_every=200,
        evaluate_every=100,
        seed=config.seed,
    )


def _stage(config: MetaQueryScenesConfig, stage: Stage, say: Say) -> dict[str, Any]:
    """Train a stage on the policy of the phase before, and measure it."""
    settings = stage_config(config, stage)
    before = config.output_dir / ("lmm" if stage == "A" else "align") / "policy"
    policy = MetaQueryPolicy.load(before, SETTINGS)
    sizes = {"edit": config.edit_batch_size, "t2i": config.t2i_batch_size}
    source = ScenesSource(sizes, seed=config.seed + ord(stage), mislabelled=_MISLABELLED)
    run = StageRun(settings, policy, source, _held_out(settings.cycle))
    started = time.monotonic()
    pretrain_stage(run, resume=True, report=say)
    trained = time.monotonic() - started
    return {"seconds_training": round(trained, 1), "held_out": run.held_out_losses(), **measure(config, policy)}


def _held_out(cycle: tuple[str, ...]) -> Mapping[str, SupervisedBatch]:
    source = ScenesSource({"edit": 256, "t2i": 256}, seed=7, split="held_out")
    return {task: source.next_batch(task) for task in dict.fromkeys(cycle)}


def measure(config: MetaQueryScenesConfig, policy: FlowPolicy) -> dict[str, Any]:
    """Strict success on held-out prompts, and told another prompt's text, a task."""
    from pdtr.tasks import scenes_tasks

    tasks = scenes_tasks(120, config.num_measured)
    return {
        name: {"strict": _success(policy, task), "told_another_text": _success(policy, _shuffled(task))}
        for name, task in tasks.items()
    }


def _success(policy: FlowPolicy, task: Task) -> float:
    from pdtr.evaluate import evaluate

    envs = task.make_envs(min(60, len(task.final)), is_evaluation=True)
    with torch.no_grad():
        return round(evaluate(policy, envs, task.final, _SAMPLER).score, 4)


def _shuffled(task: Task) -> Task:
    """The task's held-out prompts, each with the text of another; what counts as success stays."""
    order = np.random.default_rng(0).permutation(len(task.final))
    texts = [task.final[index].text for index in order]
    return replace(task, final=[replace(p, text=text) for p, text in zip(task.final, texts, strict=True)])


def practise(config: MetaQueryScenesConfig, say: Say) -> dict[str, Any]:
    """PDTR on the finished policy: editing, then text-to-image; the connector is frozen from now on."""
    from experiments.recipes.scenes import pdtr_scenes
    from pdtr.curriculum import pdtr_curriculum
    from pdtr.launch import train
    from pdtr.report import format_table, interference_table

    recipe = pdtr_scenes()
    run = replace(
        recipe,
        output_dir=config.output_dir / "rl",
        base=config.output_dir / "unify" / "policy",
        curriculum=pdtr_curriculum(config.rl_iterations, config.rl_iterations, rehearsal=0.25),
        evaluation=replace(
            recipe.evaluation,
            num_prompts=min(recipe.evaluation.num_prompts, config.num_measured),
            num_final_prompts=config.num_measured,
        ),
        num_threads=config.num_threads,
        seed=config.seed,
    )
    report: Path = train(run, recipe="metaquery_scenes")
    table = interference_table(run.output_dir)
    say(format_table(table))
    return {"report": str(report), "table": format_table(table).splitlines()}
