"""The policy of a checkpoint, or of a stage's end: of a run that has finished, was stopped or is still going on."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pdtr.checkpoint import CheckpointError, checkpoints, load_state
from pdtr.run_settings import FILE
from pdtr.stage_ends import folder_part, stage_ends

if TYPE_CHECKING:
    from torch import Tensor

    from agents.policies.backbone import BackboneSettings
    from agents.policies.base import FlowPolicy
    from agents.policies.weights import LoraSettings, PolicyWeights


class Kept(NamedTuple):
    """What a policy can be had from.

    Attributes:
        iteration: after which the weights were so.
        stage: the name of the stage that ended there; empty for a checkpoint.
        folder: that has the weights.
    """

    iteration: int
    stage: str
    folder: Path


@dataclass(frozen=True)
class _Recorded:
    """What a run's ``config.json`` says of its weights."""

    base: Path | None
    backbone: BackboneSettings | None
    lora: LoraSettings | None
    is_averaged: bool
    content: Mapping[str, Any]


def export_policy(
    run_folder: Path, step: int | None = None, stage: str | None = None, output_dir: Path | None = None
) -> Path:
    """Write the policy that a run evaluated, as its end does: adapters merged, averaged where an average is kept.

    Args:
        run_folder: of the run, which may be going on.
        step: iterations done; the last that weights are kept of, where neither this nor ``stage`` is given.
        stage: the policy of this stage's end.
        output_dir: a new folder; in the run's own, under ``exports``, where left out.

    Returns:
        The output's folder, which is one of a finished run to whatever loads policies: ``policy/``, ``lora/`` of a
        published model trained with adapters, and ``config.json``, which tells how the run was evaluated.

    Raises:
        ValueError: the folder is not a run's, there is no such step or stage, what is kept of it is damaged, the
            output exists, or the run's base is not found or is another one by now.
    """
    recorded = _recorded(run_folder / FILE)
    chosen = choose(kept(run_folder), step, stage, run_folder)
    output = output_dir or run_folder / "exports" / chosen.folder.name
    if output.exists():
        raise ValueError(f"{output}: expected a new folder, got one that is there; use it, or choose --output-dir")
    tensors = _evaluated(chosen, recorded.is_averaged, run_folder)
    policy = _base_policy(recorded, run_folder)
    weights = _weights(policy, tensors, recorded, chosen)
    # Whoever stops in between leaves no half of a policy under its name.
    partial = output.with_name(f".writing-{output.name}")
    shutil.rmtree(partial, ignore_errors=True)
    _write(policy, weights, partial, {**recorded.content, "exported": {**chosen._asdict(), "run": run_folder}})
    partial.rename(output)
    return output


def kept(run_folder: Path) -> list[Kept]:
    """What policies can be had from, by rising iteration; of one iteration the stage's end comes last."""
    folder = run_folder / "checkpoints"
    found = [Kept(int(path.name.removeprefix("step-")), "", path) for path in checkpoints(folder)]
    return sorted(found + [Kept(end.iteration, end.stage, end.folder) for end in stage_ends(folder)])


def choose(found: Sequence[Kept], step: int | None, stage: str | None, run_folder: Path) -> Kept:
    """The weights that are asked for; of several ends of stages of one name the last.

    Raises:
        ValueError: both a step and a stage are asked for, or there is none such; the message lists what there is.
    """
    if step is not None and stage is not None:
        raise ValueError(f"expected --step or --stage, got both, {step} and {stage!r}; drop one")
    asked = [
        entry
        for entry in found
        if step in (None, entry.iteration) and (stage is None or entry.stage == folder_part(stage))
    ]
    if asked:
        return asked[-1]
    if not found:
        raise ValueError(
            f"{run_folder}: expected a run that has kept weights, got one without checkpoints and ended stages; wait "
            "for them, or start runs with a lower --checkpoint-every"
        )
    wanted = f"--step {step}" if step is not None else f"--stage {stage}"
    raise ValueError(f"{run_folder}: expected one of {_told(found)}, got {wanted}; a run keeps its last checkpoints")


def _told(found: Sequence[Kept]) -> str:
    """What there is, as one would ask for it."""
    steps = " ".join(str(entry.iteration) for entry in found if not entry.stage)
    ends = [f"--stage {entry.stage} (iteration {entry.iteration})" for entry in found if entry.stage]
    return ", ".join([*([f"--step {steps}"] if steps else []), *ends])


def _recorded(path: Path) -> _Recorded:
    from agents.policies.backbone import BackboneSettings
    from agents.policies.weights import LoraSettings

    if not path.is_file():
        raise ValueError(f"{path.parent}: expected the folder of a run of pdtr train, got one without {path.name}")
    try:
        content = json.loads(path.read_text())
        config = content["config"]
        lora = _fields(config["lora"])
        return _Recorded(
            base=Path(config["base"]) if config["base"] else None,
            backbone=None if config["backbone"] is None else BackboneSettings(**_fields(config["backbone"])),
            lora=None if config["lora"] is None else LoraSettings(**lora),
            is_averaged=float(config["learner"]["ema_decay"]) > 0,
            content=content,
        )
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"{path}: expected the configuration of a run of pdtr train, got another or a damaged one ({error!r})"
        ) from error


def _fields(recorded: Mapping[str, Any] | None) -> dict[str, Any]:
    """A dataclass's fields as they were recorded, its lists as the tuples that they were."""
    values = {name: value for name, value in (recorded or {}).items() if name != "class"}
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}


def _evaluated(chosen: Kept, is_averaged: bool, run_folder: Path) -> dict[str, Tensor]:
    """The weights that the run evaluates, by their names within a version."""
    prefix = f"weights.{'ema' if is_averaged else 'current'}."
    try:
        tensors = load_state(chosen.folder, prefix).tensors
    except CheckpointError as error:
        others = [entry for entry in kept(run_folder) if entry.folder != chosen.folder]
        ending = f"take another one: {_told(others)}" if others else "there is no other one"
        raise CheckpointError(chosen.folder, error.problem, error.previous, ending) from error
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}


def _base_policy(recorded: _Recorded, run_folder: Path) -> FlowPolicy:
    """The policy that the run has started from."""
    from pdtr.sampling import load_policy, policy_folder

    try:
        return load_policy(policy_folder(recorded.base), recorded.backbone)
    except ValueError as error:
        raise ValueError(
            f"base of {run_folder}: {error} (a relative path is meant from where the run was started: go there)"
        ) from error


def _weights(policy: FlowPolicy, tensors: Mapping[str, Tensor], recorded: _Recorded, chosen: Kept) -> PolicyWeights:
    """The policy's weights, of which the current ones are those that were evaluated.

    Raises:
        ValueError: the policy has others.
    """
    from agents.policies.weights import FullWeights, LoraWeights

    weights = FullWeights(policy, ()) if recorded.lora is None else LoraWeights(policy, recorded.lora, ())
    try:
        weights.load_state({f"current.{name}": tensor for name, tensor in tensors.items()})
    except (RuntimeError, KeyError) as error:
        base = recorded.base or "the one that ships with the package"
        raise ValueError(
            f"{chosen.folder}: expected the weights of the run's base {base}, got those of another model; "
            "put the base back that the run was started with"
        ) from error
    return weights


def _write(policy: FlowPolicy, weights: PolicyWeights, folder: Path, content: Mapping[str, Any]) -> None:
    from pdtr.launch import save_policy

    folder.mkdir(parents=True)
    save_policy(policy, weights, "current", folder)
    (folder / FILE).write_text(json.dumps(content, indent=1, default=str) + "\n")
