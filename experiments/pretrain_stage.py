"""``pdtr pretrain stage-a|stage-b|stage-c``: one of UniPic 2.0's stages on a published model and files of pictures."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from agents.policies.backbone_settings import BackboneSettings
from envs.data.batches import BatchSettings
from envs.data.buckets import FACTOR, ProgressiveResolution
from pdtr.pretraining_stages import PUBLISHED, Stage, StageConfig
from pdtr.processes import ProcessSettings

if TYPE_CHECKING:
    import torch

    from agents.policies.base import FlowPolicy
    from agents.processes import Processes
    from envs.data.stream import StreamBatches
    from envs.scenes.pretraining import SupervisedBatch

STAGES: Mapping[str, Stage] = {"stage-a": "A", "stage-b": "B", "stage-c": "C"}
# Open: ours. Whole cycles of them make up the published steps on 1, 2, 4, ... 32 processes.
BATCH_SIZES: Mapping[Stage, int] = {"A": 16, "B": 2, "C": 2}


@dataclass(frozen=True)
class StageOptions:
    """One stage of UniPic 2.0's pre-training (arXiv:2509.04548), with the published numbers, on files of pictures.

    Stage A aligns a new connector with a frozen SD3.5, B makes SD3.5 an editor, C joins A's connector and B's
    transformer and trains both.

    Attributes:
        model: what is trained, a policy's folder or one of the hub: SD3.5 in stage B, a MetaQuery policy in A and C.
        generator: in A and C in place of a model, to put one together: what has transformer, VAE and scheduler, such as
            SD3.5 or stage B's policy; a folder, or one of the hub.
        lmm: with a generator: Qwen2.5-VL; a folder, or one of the hub.
        connector: with a generator: the folder "conditioner" of stage A's policy; a new one when left out.
        t2i: files or globs with texts and pictures (jsonl, json, csv, tsv, parquet, tar), or ``.json`` files that list
            several sets, each with its files, names of fields, image_root and weight: see docs/data.md.
        edit: the same with instructions and pictures before and after.
        held_out_t2i: files that are not trained on, whose first batch is measured, at ``batches.resolution``'s first.
        held_out_edit: the same of edits.
        image_root: folder that pictures' paths start from, in sets that name none; each file's own when left out.
        stage: what is trained, and how.
        batches: how batches are made of the files. That aspect ratios are balanced is published. ``batch_size`` is of
            one process and one task: 2, and 16 in stage A, so that up to 32 processes do the published steps.
        first_size: S of the pictures that training begins with, before ``batches.resolution``. That resolutions grow is
            published; which they are, when and in which stages is ours.
        first_share: of the steps, at ``first_size``; 0: none.
        backbone: how the model is loaded and run; its size is that of the policy which is saved. Every batch has new
            texts, so the encoders stay on the device: SD3's take 11 GB in bfloat16. ``offload_encoders`` would move
            them there and back for each. Activations are recomputed (``gradient_checkpointing``).
        processes: how several processes share the stage.
    """

    model: Path | None = None
    generator: Path | None = None
    lmm: Path | None = None
    connector: Path | None = None
    t2i: tuple[str, ...] = ()
    edit: tuple[str, ...] = ()
    held_out_t2i: tuple[str, ...] = ()
    held_out_edit: tuple[str, ...] = ()
    image_root: Path | None = None
    stage: StageConfig = field(default_factory=lambda: PUBLISHED["B"])
    batches: BatchSettings = field(default_factory=lambda: BatchSettings(BATCH_SIZES["B"], balanced=True))
    first_size: int = 256
    first_share: float = 0.5
    backbone: BackboneSettings = field(
        default_factory=lambda: BackboneSettings(
            float32_weights=True, offload_encoders=False, gradient_checkpointing=True
        )
    )
    processes: ProcessSettings = field(default_factory=ProcessSettings)

    def __post_init__(self) -> None:
        parts = (self.generator, self.lmm)
        if any(parts) and (self.model is not None or None in parts):
            given = [f"--{name}" for name in ("model", "generator", "lmm") if getattr(self, name) is not None]
            raise ValueError(f"expected either --model, or --generator and --lmm, got {' and '.join(given)}")
        if self.stage.stage == "B" and any(parts):
            raise ValueError("--generator and --lmm: expected a --model in stage B, which has no connector")
        if self.connector is not None and self.generator is None:
            raise ValueError("--connector: expected a --generator with it; a --model has its own")
        if not self.backbone.float32_weights:
            raise ValueError("--backbone.float32-weights: expected True, for small updates are lost in less")
        if not 0 <= self.first_share < 1:
            raise ValueError(f"--first-share: expected a share of at least 0 and below 1, got {self.first_share}")
        following = self.batches.resolution.sizes[0]
        if self.first_share and not FACTOR <= self.first_size < following:
            raise ValueError(
                f"--first-size: expected {FACTOR} or more and less than --batches.resolution.sizes, {following}, got "
                f"{self.first_size}; --first-share 0 leaves it out"
            )

    def task_batches(self, task: str) -> BatchSettings:
        """How the batches of a task are made: ``batches``, after ``first_share`` of the steps at ``first_size``."""
        steps = round(self.first_share * self.stage.num_steps)
        if not steps:
            return self.batches
        cycle, own = self.stage.cycle, self.batches.resolution
        size = own.batch_size(0, self.batches.batch_size)
        start = steps * self.stage.global_batch_size // (size * len(cycle)) * cycle.count(task)
        schedule = ProgressiveResolution(
            (self.first_size, *own.sizes),
            (0, *(start + following for following in own.starts)),
            own.batch_sizes and (size, *own.batch_sizes),
        )
        return replace(self.batches, resolution=schedule)


def published(stage: Stage) -> StageOptions:
    """The options that a stage begins with."""
    return StageOptions(stage=PUBLISHED[stage], batches=BatchSettings(BATCH_SIZES[stage], balanced=True))


def run_stage(
    options: StageOptions,
    resume: bool,
    report: Callable[[str], None],
    on_step: Callable[[int, Mapping[str, float]], None],
) -> Path:
    """Load, train to the end, save; -> the policy's folder. All processes call it alike, on options that were checked.

    Raises:
        ValueError: a file, a model or a checkpoint is not as it should be.
        ProcessLost: another process has ended.
    """
    from pdtr.pretraining_loop import pretrain_stage
    from pdtr.pretraining_run import StageRun
    from pdtr.processes import losses_explained, start

    processes, device = start(options.processes)
    with losses_explained(processes, options.processes):
        # Files that are missing are said before billions of weights are read.
        source, held_out = _source(options, processes), _held_out(options)
        try:
            policy = _policy(options, device, processes.is_sharded)
            largest = source.largest_batches() if device.type == "cuda" else {}
            stage = StageRun(options.stage, policy, source, held_out, processes, largest=largest)
            # What is cut up came to the device block by block; the rest follows.
            policy.to(device)
            folder = pretrain_stage(stage, resume, report, on_step)
        finally:
            # Each process has read rows of its own.
            problems = options.stage.output_dir / "problems"
            source.write_problems(problems / str(processes.rank) if processes.count > 1 else problems)
            source.close()
    return folder


def _source(options: StageOptions, processes: Processes) -> StreamBatches:
    from envs.data.mixtures import record_sets
    from envs.data.stream import StreamBatches

    files = {"t2i": options.t2i, "edit": options.edit}
    sets = {task: record_sets(files[task], options.image_root) for task in dict.fromkeys(options.stage.cycle)}
    settings = {task: options.task_batches(task) for task in sets}
    return StreamBatches(sets, settings, processes.rank, processes.count)


def _held_out(options: StageOptions) -> dict[str, SupervisedBatch]:
    """The first batch of each task's held-out files, in their own order."""
    from envs.data.mixtures import record_sets
    from envs.data.stream import StreamBatches

    found = {}
    settings = replace(options.batches, balanced=False, window=0, prefetch=0, num_workers=0)
    for task, files in {"t2i": options.held_out_t2i, "edit": options.held_out_edit}.items():
        if files and task in options.stage.cycle:
            source = StreamBatches({task: record_sets(files, options.image_root)}, settings)
            found[task] = source.next_batch(task)
            source.close()
    return found


def _policy(options: StageOptions, device: torch.device, is_sharded: bool) -> FlowPolicy:
    """The policy that is trained; a new connector is the same in every process."""
    import torch

    from agents.policies.metaquery import MetaQueryPolicy
    from agents.policies.metaquery_parts import MetaQueryPipeline
    from pdtr.sampling import load_policy, policy_folder

    policy: FlowPolicy
    if options.generator is None or options.lmm is None:
        policy = load_policy(policy_folder(options.model), options.backbone)
    else:
        torch.manual_seed(options.stage.seed)
        generator = policy_folder(options.generator)
        pipeline = MetaQueryPipeline.from_parts(generator, options.lmm, options.connector, settings=options.backbone)
        policy = MetaQueryPolicy(pipeline, options.backbone)
    if not is_sharded:
        policy.to(device)
    return policy
