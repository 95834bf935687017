"""The reference's weights are kept where something is compared with them, and a checkpoint is checked once."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from agents.algorithms.diffusion_nft import DiffusionNFT
from agents.algorithms.flow_grpo import FlowGRPO
from agents.policies.scenes import ScenesPolicy
from agents.policies.weights import LoraSettings
from agents.samplers import ODE, FlowSDE
from pdtr.adaptive import Adaptive
from pdtr.checkpoint import check_state, checkpoint_name, load_state, save_state
from pdtr.curriculum import Curriculum, Plan, SingleTask, Staged
from pdtr.stages import Stage
from pdtr.trainer import needs_reference
from tests.pdtr.test_trainer import make_config, make_trainer, same, versions

WITHOUT, WITH = FlowGRPO(FlowSDE(2), kl_coef=0.0), FlowGRPO(FlowSDE(2), kl_coef=0.1)


def stages(*kl_coefs: float | None, **changes: Any) -> Staged:
    """One stage an entry; None leaves the algorithm as it is."""
    return Staged(
        tuple(
            Stage(f"stage {i}", {"t2i": 1}, 1, algorithm={} if kl is None else {"kl_coef": kl}, **changes)
            for i, kl in enumerate(kl_coefs)
        )
    )


class Unknown:
    """A curriculum of a user's, of which nothing is known but its methods."""

    def propose(self, *arguments: Any) -> Plan | None:
        return None

    def observe(self, plan: Plan, rewards: Mapping[str, Any]) -> None:
        pass

    def observe_evaluation(self, scores: Mapping[str, float]) -> None:
        pass

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        pass


@dataclass(frozen=True)
class Own(FlowGRPO):
    """A user's algorithm that compares with the reference in its own way."""

    @property
    def needs_reference(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("algorithm", "curriculum", "expected"),
    [
        (WITHOUT, SingleTask("t2i", 1), False),
        (WITH, SingleTask("t2i", 1), True),
        (DiffusionNFT(ODE(2), kl_coef=0.0), SingleTask("t2i", 1), False),
        (DiffusionNFT(ODE(2), kl_coef=0.1), SingleTask("t2i", 1), True),
        (WITHOUT, stages(None, 0.1), True),
        (WITHOUT, Adaptive(stages(None, 0.1)), True),
        (WITHOUT, Adaptive(stages(None, None)), False),
        (WITH, stages(0.0, 0.0), False),
        (WITHOUT, Unknown(), True),
        (Own(FlowSDE(2), kl_coef=0.0), SingleTask("t2i", 1), True),
    ],
)
def test_a_reference_is_kept_where_a_stage_is_compared_with_it(
    tmp_path: Path, algorithm: Any, curriculum: Curriculum, expected: bool
) -> None:
    assert needs_reference(make_config(tmp_path, curriculum, algorithm=algorithm)) == expected


@pytest.mark.parametrize("lora", [None, LoraSettings(2, 4)])
def test_without_a_kl_there_is_no_third_network(
    tmp_path: Path, tiny_policy: ScenesPolicy, lora: LoraSettings | None
) -> None:
    """Resetting it when a stage starts, the default, is then nothing to do."""
    trainer = make_trainer(make_config(tmp_path, stages(None, None), algorithm=WITHOUT, lora=lora), tiny_policy)
    trainer.train()
    assert trainer.run.iteration == 2
    assert {name.split(".")[0] for name in trainer.weights.state()} == {"current", "ema"}


def test_a_checkpoint_that_has_a_reference_goes_on_without_it(tmp_path: Path, tiny_policy: ScenesPolicy) -> None:
    """As those of earlier versions do, which always kept one."""
    tiny_policy.save(tmp_path / "base")
    config = make_config(tmp_path, SingleTask("t2i", 2), algorithm=WITH, checkpoint_every=1)
    trainer = make_trainer(config, tiny_policy)
    trainer.train()
    path = config.output_dir / "checkpoints" / checkpoint_name(1)
    expected = load_state(path).tensors
    again = make_trainer(replace(config, algorithm=WITHOUT), ScenesPolicy.load(tmp_path / "base"))
    again.restore(path)
    assert not versions(again, "reference")
    for version in ("current", "ema"):
        own = {f"weights.{version}.{name}": tensor for name, tensor in versions(again, version).items()}
        assert same(own, {name: expected[name] for name in own})


def test_a_kl_to_a_reference_that_was_not_kept_is_refused(tmp_path: Path, tiny_policy: ScenesPolicy) -> None:
    tiny_policy.save(tmp_path / "base")
    config = make_config(tmp_path, SingleTask("t2i", 1), algorithm=WITHOUT, checkpoint_every=1)
    make_trainer(config, tiny_policy).train()
    other = make_trainer(replace(config, algorithm=WITH), ScenesPolicy.load(tmp_path / "base"))
    with pytest.raises(ValueError, match=r"step-000001: expected the reference's weights.*leave kl_coef at 0"):
        other.restore(config.output_dir / "checkpoints" / checkpoint_name(1))


def test_a_resumed_run_reads_its_checkpoint_once_and_for_all_processes(
    tmp_path: Path, tiny_policy: ScenesPolicy, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(tmp_path, SingleTask("t2i", 1), algorithm=WITHOUT, checkpoint_every=1)
    trainer = make_trainer(config, tiny_policy)
    trainer.train()
    path = config.output_dir / "checkpoints" / checkpoint_name(1)
    read: list[str] = []
    digest = hashlib.file_digest

    def noted(file: Any, name: str) -> Any:
        read.append(Path(file.name).name)
        return digest(file, name)

    monkeypatch.setattr(hashlib, "file_digest", noted)
    files = ["tensors.safetensors", "meta.json"]
    trainer.restore(path)
    assert read == files
    # What another process has checked is not looked at.
    monkeypatch.setattr(trainer, "processes", Second())
    trainer.restore(path)
    assert read == files


class Second:
    """The second of two processes, which is told what the first one finds."""

    def agree(self, choose: Any) -> None:
        pass


def test_what_is_written_into_a_read_tensor_does_not_reach_the_file(tmp_path: Path) -> None:
    """Tensors are mapped, which is no copy until then."""
    folder = tmp_path / checkpoint_name(1)
    save_state(folder, {"a": torch.arange(6.0)}, {})
    check_state(folder)
    load_state(folder, is_checked=True).tensors["a"].zero_()
    assert load_state(folder).tensors["a"].tolist() == list(range(6))
