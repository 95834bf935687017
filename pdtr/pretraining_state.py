"""A stage of pre-training on disk: checkpoints from which it goes on to the same bits, and the policy at its end."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from agents.policies.sharding import cut_like, gathered
from agents.processes import as_bytes
from pdtr import checkpoint
from pdtr.optimizers import optimizers_state, restore_optimizers
from pdtr.pretraining_objective import set_size
from pdtr.pretraining_run import StageRun


def save_stage(run: StageRun) -> Path:
    """Write everything that the run's continuation depends on, whole; by the first process."""
    tensors = {f"{name}.{k}": v for name, module in run.modules.items() for k, v in module.state_dict().items()}
    state, content = optimizers_state(run.optimizers)
    places = run.processes.gather({"json": as_bytes(json.dumps(run.source.state_dict()).encode())}, True)
    content |= {
        "kind": "pretraining",
        "stage": run.config.stage,
        "settings": run.config.settings(),
        "step": run.step,
        "seconds": run.seconds,
        "num_skipped": run.num_skipped,
        "loss_scale": run.loss_scale.state_dict(),
        "data": [json.loads(place["json"].numpy().tobytes()) for place in places],
    }
    path = run.config.output_dir / checkpoint.checkpoint_name(run.step)
    whole = gathered(tensors | state, run.processes.is_first)
    if run.processes.is_first:
        checkpoint.save_state(path, whole, content)
        checkpoint.prune(run.config.output_dir, run.config.keep_checkpoints)
    return path


def restore_stage(run: StageRun, path: Path) -> None:
    """Go on from a checkpoint, which as many processes have saved or another number of them.

    Raises:
        ValueError: it is another stage's, of other settings, of another model or of other data.
    """
    tensors, meta = checkpoint.load_state(path)
    if meta.get("stage") != run.config.stage:
        raise ValueError(f"{path}: expected stage {run.config.stage}'s checkpoint, got {meta.get('stage')}'s")
    recorded, own = meta.get("settings", {}), run.config.settings()
    other = next((name for name in own if recorded.get(name) != own[name]), None)
    if other is not None:
        raise ValueError(
            f"{path}: expected the settings that the run was started with, got {other} = {own[other]} where the "
            f"run has {recorded.get(other)}; give its own value, or start another run"
        )
    for name, module in run.modules.items():
        _load(module, _under(tensors, f"{name}."), f"{path}: expected the weights of this policy's {name}")
    restore_optimizers(run.optimizers, tensors, meta)
    for group in run.optimizers[-1].param_groups:
        group["foreach"] = run.foreach
    places = meta["data"]
    if len(places) == run.processes.count:
        run.source.load_state_dict(places[run.processes.rank])
    else:
        run.source.load_shares(places)
    run.loss_scale.load_state_dict(meta["loss_scale"])
    run.step, run.seconds, run.num_skipped = int(meta["step"]), float(meta["seconds"]), int(meta["num_skipped"])


def save_policy(run: StageRun, folder: Path) -> None:
    """Write the policy, whole, at the image's size that it came with; by the first process."""
    set_size(run.policy, run.image_size)
    transformer: Any = run.policy.transformer
    weights = gathered(transformer.state_dict(), run.processes.is_first) if run.is_cut else None
    if not run.processes.is_first:
        return
    if weights is not None:
        # A network that was cut up stays so; another one, on the CPU, takes its whole weights.
        run.policy.transformer = type(transformer).from_config(transformer.config)
        run.policy.transformer.load_state_dict(weights)
    try:
        run.policy.save(folder)
    finally:
        run.policy.transformer = transformer


def _load(module: nn.Module, tensors: Mapping[str, Tensor], expected: str) -> None:
    """Whole tensors into a module that may be cut up."""
    own = module.state_dict()
    if {key: tensor.shape for key, tensor in tensors.items()} != {key: tensor.shape for key, tensor in own.items()}:
        raise ValueError(f"{expected}, got others; go on with the model that the run was started with")
    module.load_state_dict({key: cut_like(tensor, own[key]) for key, tensor in tensors.items()})


def _under(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
