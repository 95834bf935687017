"""The documentation's code runs, its links and paths lead somewhere, its commands parse, its tables are the code's."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
import tyro

from agents.algorithms.base import Algorithm
from agents.algorithms.diffusion_nft import DiffusionNFT
from agents.algorithms.flow_grpo import FlowGRPO
from agents.learner import Learner, LearnerSettings
from agents.policies.scenes import ScenesPolicy
from agents.policies.weights import FullWeights
from agents.rollout import Draw, collect
from agents.samplers import ODE, FlowSDE
from envs import ENTRY_POINTS
from envs.prompts import FixedPool
from experiments.cli import COMMANDS
from experiments.commands import ReportOptions, SampleOptions
from experiments.edit_reward import CheckOptions
from experiments.edit_reward_data import EditDataConfig
from experiments.eval import CompareOptions
from experiments.eval_options import OPTIONS
from experiments.export import ExportOptions
from experiments.flags import Usage, parse, parse_run
from experiments.held_out import EvalOptions
from experiments.judge_check import JudgeCheckOptions
from experiments.judge_serve import JudgeServeOptions
from experiments.metaquery_scenes import MetaQueryScenesConfig
from experiments.pretrain_stage import STAGES, StageOptions
from experiments.prompts import GenEvalPromptsOptions
from experiments.recipes import find_recipe
from experiments.reward import ServeOptions
from experiments.scenes_judge import ScenesJudgeConfig
from pdtr.metrics import rollout_metrics
from pdtr.panel import panel_metrics
from pdtr.pretraining import PretrainConfig
from pdtr.pretraining_stages import PUBLISHED
from rewards.base import Prompt
from rewards.edit_reward_training import TrainingConfig
from rewards.geneval import GenEvalRule
from rewards.pixel import redness

ROOT = Path(__file__).parents[2]
PAGES = {str(path.relative_to(ROOT)): path.read_text() for path in sorted((ROOT / "docs").rglob("*.md"))}
FOLDERS = ("pdtr", "envs", "rewards", "agents", "experiments", "tests", "docs")
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
BLOCKS = {
    f"{page}:{text[: match.start()].count(chr(10)) + 1}": match[2]
    for page, text in PAGES.items()
    for match in FENCE.finditer(text)
    if match[1] == "python"
}
PROSE = {page: FENCE.sub("", text) for page, text in PAGES.items()}
LINK = re.compile(r"\]\(([^)\s]+)\)")
CODE = re.compile(r"`([^`\n]+)`")


def commands() -> list[str]:
    """Every ``pdtr ...`` that a page shows, in a block of shell or in the text."""
    found = []
    for page, text in PAGES.items():
        shell = [block.replace("\\\n", "") for kind, block in FENCE.findall(text) if kind == "sh"]
        lines = [line for block in shell for line in block.splitlines()]
        found += [line for line in [*lines, *CODE.findall(PROSE[page])] if line.startswith("pdtr ")]
    return sorted(set(found))


def paths() -> list[tuple[str, str]]:
    """(page, path) of every path into the repository that stands in backticks."""
    return [
        (page, code)
        for page, text in PROSE.items()
        for code in CODE.findall(text)
        if re.fullmatch(r"[\w./-]+/[\w./-]*", code) and code.split("/")[0] in FOLDERS and code not in ENTRY_POINTS
    ]


def anchors(text: str) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def first_columns(text: str, heading: str) -> dict[str, str]:
    """The first cell of each row of the table under a heading, with its second, backticks taken off."""
    section = text.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| `([^`]+)` \| ([^|]*?) \|", section, re.MULTILINE)
    return {name: cell.strip("`") for name, cell in rows}


@pytest.mark.parametrize("block", list(BLOCKS))
def test_python_runs_as_it_stands(block: str, tmp_path: Path) -> None:
    (tmp_path / "example.py").write_text(BLOCKS[block])
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "example.py"], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip(), "an example shows what it does"


@pytest.mark.parametrize("page", list(PAGES))
def test_links_lead_somewhere(page: str) -> None:
    for link in LINK.findall(PROSE[page]):
        if re.match(r"[a-z]+:", link):
            assert link.startswith("https://"), link
            continue
        name, _, anchor = link.partition("#")
        target = ((ROOT / page).parent / name).resolve() if name else ROOT / page
        assert target.exists(), f"{page}: {link}"
        assert not anchor or anchor in anchors(target.read_text()), f"{page}: no heading for {link}"


def test_the_index_links_to_every_page() -> None:
    linked = {str(Path("docs") / link.partition("#")[0]) for link in LINK.findall(PAGES["docs/index.md"])}
    assert set(PAGES) - {"docs/index.md"} <= linked


def test_paths_in_backticks_exist() -> None:
    named = paths()
    assert len(named) > 30
    assert [entry for entry in named if not (ROOT / entry[1]).exists()] == []


def test_tests_in_backticks_exist() -> None:
    written = "\n".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    named = [code for text in PROSE.values() for code in CODE.findall(text) if re.fullmatch(r"test_\w+", code)]
    assert named
    assert [name for name in named if f"def {name}(" not in written] == []


def parse_eval(arguments: list[str], usage: Usage) -> None:
    benchmark = arguments[0] if arguments else ""
    if "--compare" in arguments:
        parse(CompareOptions(tyro.MISSING), usage, arguments)
    elif benchmark in OPTIONS:
        parse(OPTIONS[benchmark](), usage, arguments[1:])
    else:
        parse(EvalOptions(), usage, arguments[benchmark == "scenes" :])


@pytest.mark.parametrize("command", commands())
def test_commands_parse(command: str) -> None:
    _, name, *arguments = shlex.split(command, comments=True)
    assert name in COMMANDS
    arguments = [argument for argument in arguments if argument != "--help"]
    usage = Usage(f"pdtr {name}")
    if name == "train":
        parse_run(find_recipe(arguments[0])(), usage, arguments[1:])
    elif name == "pretrain":
        stage = STAGES.get(arguments[0])
        assert stage or arguments[0] == "scenes"
        parse_run(StageOptions(stage=PUBLISHED[stage]) if stage else PretrainConfig(), usage, arguments[1:])
    elif name == "recipes":
        assert arguments == []
    elif name in ("judge", "reward"):
        served: dict[str, Any] = {
            "judge serve": JudgeServeOptions(tyro.MISSING),
            "judge check": JudgeCheckOptions(tyro.MISSING),
            "reward serve": ServeOptions(tyro.MISSING),
        }
        options_of_step = served[f"{name} {arguments[0]}"]
        # What stands behind a lone -- is vLLM's.
        own = arguments[1 : arguments.index("--") if "--" in arguments else None]
        if own:
            parse(options_of_step, usage, own)
    elif name == "edit-reward":
        steps: dict[str, Any] = {"data": EditDataConfig(), "train": TrainingConfig()}
        steps["check"] = CheckOptions(tyro.MISSING)
        assert not arguments or arguments[0] in steps
        if arguments[1:]:
            parse(steps[arguments[0]], usage, arguments[1:])
    elif name == "eval":
        parse_eval(arguments, usage)
    elif arguments:
        options: dict[str, Any] = {
            "sample": SampleOptions(tyro.MISSING),
            "report": ReportOptions(tyro.MISSING),
            "export": ExportOptions(tyro.MISSING),
            "scenes-judge": ScenesJudgeConfig(),
            "metaquery-scenes": MetaQueryScenesConfig(),
            "prompts": GenEvalPromptsOptions(),
        }
        # The kind of prompts is no flag.
        parse(options[name], usage, arguments[name == "prompts" :])


@pytest.mark.parametrize(
    ("page", "heading", "kind"),
    [
        ("docs/algorithms/flow_grpo.md", "Fields", FlowGRPO),
        ("docs/algorithms/diffusion_nft.md", "Fields", DiffusionNFT),
        ("docs/rewards.md", "The GenEval rule", GenEvalRule),
    ],
)
def test_tables_of_fields_are_the_codes(page: str, heading: str, kind: Any) -> None:
    expected = {}
    for field in fields(kind):
        default = field.default if field.default is not MISSING else field.default_factory()  # type: ignore[misc]
        if is_dataclass(default):
            assert default == type(default)()
            expected[field.name] = f"{type(default).__name__}()"
        else:
            expected[field.name] = repr(default)
    assert first_columns(PAGES[page], heading) == expected


@pytest.mark.parametrize(
    ("page", "algorithm"),
    [
        ("docs/algorithms/flow_grpo.md", FlowGRPO(FlowSDE(3))),
        ("docs/algorithms/diffusion_nft.md", DiffusionNFT(ODE(3))),
    ],
)
def test_every_logged_metric_is_explained(page: str, algorithm: Algorithm, tiny_policy: ScenesPolicy) -> None:
    prompts = [Prompt("a red circle", id="0"), Prompt("two squares", id="1")]
    weights = FullWeights(tiny_policy)
    optimizer = torch.optim.AdamW(weights.parameters(), lr=1e-4)
    learner = Learner(tiny_policy, weights, algorithm, optimizer, LearnerSettings(num_minibatches=1))
    env = gymnasium.make_vec(
        "pdtr/TextToImage-v0",
        num_envs=4,
        vectorization_mode=gymnasium.VectorizeMode.VECTOR_ENTRY_POINT,
        reward=redness,
        prompts=FixedPool(prompts),
    )
    with torch.no_grad(), weights.use(algorithm.acting_version):
        rollout = collect(tiny_policy, [env], prompts, Draw(2, seed=0), algorithm.sampler())
    rollout = rollout.with_advantages(algorithm.advantages(rollout))
    assert set(learner.update([rollout])) == set(first_columns(PAGES[page], "Metrics"))
    explained = {name.replace("TASK", "t2i") for name in first_columns(PAGES["docs/runs.md"], "Metrics")}
    # Of components, of images, of missing rewards and of what a reward counts there is more than one name, or none.
    others = {"reward/t2i/COMPONENT", "image/STATISTIC/t2i", "missing_reason/t2i", "statistics/t2i/NAME"}
    assert set(rollout_metrics("t2i", rollout, 2)) == explained - others


def test_every_statistic_of_the_images_is_explained() -> None:
    image = np.zeros((2, 8, 8, 3), np.uint8)
    explained = {name.replace("TASK", "edit") for name in first_columns(PAGES["docs/hacking_panel.md"], "Pictures")}
    assert set(panel_metrics("edit", image, 2, list(image))) == explained
