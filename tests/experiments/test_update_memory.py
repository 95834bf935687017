"""Published recipes hold no more than a GPU of 80 GB has, by count: nothing is run."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import pytest

from experiments.benchmarks import update_memory
from experiments.benchmarks.entry import run_benchmark
from experiments.benchmarks.memory_networks import Network, network_of
from experiments.benchmarks.update_memory import GIB, RECIPES, Update, _count, count_update, table
from experiments.recipes import find_recipe, recipes
from pdtr.config import TrainConfig

# Of the 74.5 GiB that 80 GB are, an edit reward takes 15.4 and a detector 3; the rest is the device's and fragments.
MOST = 50 * GIB


def config_of(name: str, **changes: Any) -> TrainConfig:
    config = find_recipe(name)()
    assert config.backbone is not None
    return replace(config, backbone=replace(config.backbone, **changes)) if changes else config


@cache
def counted(*parts: Any) -> Update:
    """Recipes that differ in nothing that is held are counted once."""
    base, backbone, lora, chunk_size, algorithm, task = parts
    config = config_of("flow_grpo_sd3_geneval")
    others = {"base": base, "backbone": backbone, "lora": lora, "chunk_size": chunk_size, "algorithm": algorithm}
    return count_update(replace(config, **others), task)


def update_of(name: str, task: str) -> Update:
    config = find_recipe(name)()
    algorithm: Any = config.algorithm
    return counted(config.base, config.backbone, config.lora, config.chunk_size, replace(algorithm, kl_coef=0.04), task)


def test_every_published_recipe_is_counted() -> None:
    modules = {f"experiments.recipes.{name}" for name in ("sd3", "unipic2", "editing")}
    assert set(RECIPES) == {name for name, recipe in recipes().items() if recipe.__module__ in modules}


@pytest.mark.parametrize("name", [name for name in RECIPES if "flux" not in name and "qwen" not in name])
def test_an_update_pass_fits_beside_the_rewards(name: str) -> None:
    update = update_of(name, RECIPES[name][0])
    assert 4 * GIB < update.weights < 6 * GIB
    assert update.saved < update.peak
    assert update.weights + update.peak < MOST


def small(task: str = "edit", **changes: Any) -> tuple[TrainConfig, Network]:
    config = replace(config_of("unipic2_pdtr", height=64, width=64, **changes), chunk_size=1)
    return config, network_of(config, task)


@pytest.mark.parametrize("is_recomputed", [False, True])
def test_what_is_multiplied_is_what_all_blocks_hold(is_recomputed: bool) -> None:
    config, network = small(gradient_checkpointing=is_recomputed)
    base = _count(network, network.few, config)
    more = {kind: _count(network, {**network.few, kind: number + 1}, config) for kind, number in network.few.items()}
    total = base.plus(more["dual"], base, 2).plus(more["single"], base, 3)
    whole = _count(network, {"dual": 4, "single": 5}, config)
    assert (total.weights, total.saved, total.gradients) == (whole.weights, whole.saved, whole.gradients)
    assert whole.peak <= total.peak < 1.2 * whole.peak


def test_guidance_references_and_checkpointing_count() -> None:
    """Both branches learn in Flow-GRPO; a reference is as many tokens again; a block's input is all that is kept."""
    (edit, with_reference), (t2i, without) = small(), small("t2i")
    assert with_reference.sequences == 2
    assert (
        _count(with_reference, {"dual": 1, "single": 1}, edit).saved
        > _count(without, {"dual": 1, "single": 1}, t2i).saved
    )
    config, network = small(gradient_checkpointing=True)
    blocks = {"dual": 2, "single": 2}
    assert _count(network, blocks, config).saved < _count(with_reference, blocks, edit).saved / 5


def test_a_table_has_a_row_each_and_gib() -> None:
    rows = table([("a", "edit", Update(8, 5 * GIB, 29 * GIB, 30 * GIB))]).splitlines()
    assert rows[-1] == "| `a` | edit | 8 | 5.0 | 29.0 | 35.0 |"


def test_another_model_is_refused_with_those_that_are_known() -> None:
    config = replace(config_of("unipic2_pdtr"), lora=None)
    with pytest.raises(
        ValueError, match=r"expected adapters on one of stabilityai/.*, got Skywork/.* with full training"
    ):
        network_of(config, "edit")


def test_another_chunk_is_counted_and_a_wrong_name_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--recipes", "unipic2_metaquery_pdtr", "--chunk-size", "1", "--gradient-checkpointing"]
    assert run_benchmark(update_memory.benchmark, flags) == 0
    assert "| `unipic2_metaquery_pdtr` | edit | 2 |" in capsys.readouterr().out
    assert run_benchmark(update_memory.benchmark, ["--recipes", "unipic3"]) == 2
    assert "expected some of unipic2_pdtr" in capsys.readouterr().err
