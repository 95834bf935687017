"""``pdtr eval`` of several processes: the files of one, to the byte, and all else done and said once."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from agents.policies.scenes import ScenesPolicy
from agents.processes import Processes
from envs.scenes.suite import t2i_prompts
from experiments.benchmarks.world_size_runs import environment
from experiments.cli import main
from experiments.eval_sharing import WAY_ON
from pdtr.benchmarks.drawing import _windows
from pdtr.benchmarks.geneval import load_geneval, save_metadata
from pdtr.processes import ProcessLost, ProcessSettings, losses_explained
from tests.experiments.eval_jobs import evaluate
from tests.pdtr.launched import launch

Run = Callable[..., str]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "pdtr"]
DEADLINE = 280.0
# Processes come up slowly on a machine that is busy.
pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("eval")


@pytest.fixture
def policy(folder: Path, tiny_policy: ScenesPolicy) -> Path:
    if not (folder / "policy").exists():
        tiny_policy.save(folder / "policy")
        save_metadata(folder / "metadata.jsonl", t2i_prompts("held_out", 5, 11))
    return folder / "policy"


def scenes(policy: Path, output: Path, num_prompts: int = 5) -> list[str]:
    """Three batches a task: one process has two of them."""
    flags = ["--num-prompts", str(num_prompts), "--chunk-size", "2", "--num-inference-steps", "2"]
    return ["scenes", str(policy), *flags, "--num-threads", "1", "--output", str(output)]


def geneval(policy: Path, output: Path) -> list[str]:
    flags = ["--data", str(policy.parent / "metadata.jsonl"), "--detector", "scenes", "--samples", "2"]
    flags += ["--chunk-size", "4", "--num-inference-steps", "2", "--num-threads", "1"]
    return ["geneval", "--policy", str(policy), *flags, "--output", str(output)]


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def torchrun(arguments: Sequence[str]) -> subprocess.CompletedProcess[str]:
    command = [*TORCHRUN, "eval", *arguments]
    return subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=DEADLINE, check=False)


def test_two_processes_write_the_files_of_one_and_say_it_once(policy: Path, tmp_path: Path, pdtr_eval: Run) -> None:
    printed = pdtr_eval(*scenes(policy, tmp_path / "one"))
    done = torchrun(scenes(policy, tmp_path / "two"))
    assert done.returncode == 0, done.stderr
    assert done.stdout == printed.replace(str(tmp_path / "one"), str(tmp_path / "two"))
    expected = files(tmp_path / "one")
    assert files(tmp_path / "two") == expected
    assert len([name for name in expected if name.endswith(".png")]) == 10
    # Three batches: the first and the last of them are the first process's.
    assert "note: t2i: process 1 of 2 has drawn 3 of 3 images" in done.stderr
    assert "process 2" not in done.stderr

    refused = torchrun([*scenes(policy, tmp_path / "two"), "--guidance-scale", "7"])
    assert refused.returncode == 1
    (line,) = [line for line in refused.stderr.splitlines() if line.startswith("pdtr: ")]
    assert "and not 7.0" in line
    assert refused.stdout == ""
    assert files(tmp_path / "two") == expected


def test_they_go_on_and_have_less_to_draw_than_they_are(policy: Path, tmp_path: Path, pdtr_eval: Run) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    pdtr_eval(*scenes(policy, one / "scenes"))
    pdtr_eval(*geneval(policy, one / "geneval"))
    shutil.copytree(one / "scenes", two / "scenes")
    # Whole batches, so that what is drawn again is drawn in the same company.
    for index in (0, 1, 4):
        (two / "scenes" / "edit" / "images" / f"{index:05d}.png").unlink()
    (two / "scenes" / "t2i" / "scores.jsonl").unlink()
    launch(evaluate, scenes(policy, two / "scenes"), 2)
    launch(evaluate, geneval(policy, two / "geneval"), 2)
    assert files(two) == files(one)
    assert len(list((two / "geneval").rglob("*.png"))) == 10
    # One image, and without --output a folder of the first process's, which is gone in the end.
    launch(evaluate, scenes(policy, two, num_prompts=1)[:-2], 2)


def test_a_window_is_of_one_size_and_of_whole_batches(policy: Path) -> None:
    (item, *_) = load_geneval(policy.parent / "metadata.jsonl").items
    batch = [(item, [0])] * 25
    share = [((48, 48), batch)] * 3 + [((32, 64), batch)] + [((48, 48), batch)]
    sizes = [(size, [len(part) for part in window]) for size, window in _windows(share)]
    assert sizes == [((48, 48), [25, 25]), ((48, 48), [25]), ((32, 64), [25]), ((48, 48), [25])]
    assert list(_windows([])) == []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["eval", "--compare", "a", "b"], "compare: expected one process, for nothing is drawn"),
        (["eval", "geneval", "--data", "{data}", "--detector", "scenes", "--images", "a"], "images: expected one"),
        (
            ["sample", "a circle"],
            "sample: expected one process, got 2; processes share train, pretrain, eval, edit-rew",
        ),
        (["export", "run"], "export: expected one process, got 2"),
    ],
)
def test_where_nothing_is_drawn_one_process_is_asked_for(
    arguments: list[str], said: str, policy: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    assert main([argument.format(data=policy.parent / "metadata.jsonl") for argument in arguments]) == 2
    assert f"pdtr: {said}" in capsys.readouterr().err


def test_a_lost_process_leaves_word_how_an_evaluation_goes_on() -> None:
    with (
        pytest.raises(ProcessLost, match=r"what it said is above, go on with the same command: what is done is kept$"),
        losses_explained(Processes(0, 2), ProcessSettings(), WAY_ON),
    ):
        raise RuntimeError("gloo: Connection closed by peer")
