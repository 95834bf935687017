"""How a run is started and resumed: what is checked first, and what ``config.json`` says then."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from agents.policies.scenes import ScenesPolicy
from pdtr.checkpoint import checkpoints
from pdtr.config import TrainConfig
from pdtr.curriculum import SingleTask, Staged
from pdtr.launch import run
from pdtr.logbook import read_metrics
from pdtr.run_settings import plain
from pdtr.stages import Stage
from rewards.base import Images, Prompt
from rewards.pixel import redness
from tests.pdtr.test_trainer import make_config, make_tasks


def recorded(config: TrainConfig) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((config.output_dir / "config.json").read_text())
    return found


def stages(*names: str) -> Staged:
    return Staged(tuple(Stage(name, {"t2i": 1}, 1) for name in names))


def test_a_run_that_starts_over_is_recorded_anew(tmp_path: Path, tiny_policy: ScenesPolicy) -> None:
    calls = []

    def interrupted(images: Images, prompts: Sequence[Prompt]) -> Any:
        calls.append(len(images))
        if len(calls) == 8:
            raise KeyboardInterrupt
        return redness(images, prompts)

    interrupted.__name__ = "redness"
    tiny_policy.save(tmp_path / "base")
    config = make_config(tmp_path, stages("one", "two"))
    with pytest.raises(KeyboardInterrupt):
        run(config, make_tasks(interrupted), recipe="tiny")
    assert not checkpoints(config.output_dir / "checkpoints")
    assert recorded(config)["config"] == plain(config)
    other = make_config(tmp_path, SingleTask("edit", 2))
    run(other, make_tasks(), resume=True, recipe="anew")
    assert (recorded(other)["recipe"], recorded(other)["config"]) == ("anew", plain(other))
    assert [row["tasks"] for row in read_metrics(other.output_dir)] == [["edit"]] * 2


def test_a_resumed_run_is_recorded_as_it_goes_on(tmp_path: Path, tiny_policy: ScenesPolicy) -> None:
    tiny_policy.save(tmp_path / "base")
    config = make_config(tmp_path, SingleTask("t2i", 1), checkpoint_every=1)
    run(config, make_tasks(), recipe="tiny")
    started = recorded(config)
    assert started["rewards"]["edit"] == {"reward": {"name": "redness", "fingerprint": ""}}
    longer = make_config(tmp_path, SingleTask("t2i", 2), checkpoint_every=2)
    run(longer, make_tasks(), resume=True, recipe="tiny")
    assert recorded(longer) == {**started, "config": plain(longer)}


def test_what_a_checkpoint_refuses_is_not_recorded(tmp_path: Path, tiny_policy: ScenesPolicy) -> None:
    tiny_policy.save(tmp_path / "base")
    config = make_config(tmp_path, stages("one"), checkpoint_every=1)
    run(config, make_tasks(), recipe="tiny")
    before = (config.output_dir / "config.json").read_bytes()
    with pytest.raises(ValueError, match="curriculum"):
        run(make_config(tmp_path, stages("other"), checkpoint_every=1), make_tasks(), resume=True)
    assert (config.output_dir / "config.json").read_bytes() == before


def test_another_reward_is_refused_before_the_logs_are_touched(tmp_path: Path, tiny_policy: ScenesPolicy) -> None:
    tiny_policy.save(tmp_path / "base")
    config = make_config(tmp_path, SingleTask("t2i", 1))
    run(config, make_tasks(), recipe="tiny")
    before = {path: path.read_bytes() for path in config.output_dir.rglob("*") if path.is_file()}

    def blueness(images: Images, prompts: Sequence[Prompt]) -> Any:
        return -redness(images, prompts)

    with pytest.raises(ValueError, match=r"expected the reward of task 'edit' .* redness, got blueness"):
        run(config, make_tasks(blueness), resume=True)
    assert {path: path.read_bytes() for path in config.output_dir.rglob("*") if path.is_file()} == before
