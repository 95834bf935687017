"""A learnt edit reward behind `pdtr reward serve`, as a process: what it answers is what it says here."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from envs.scenes.pretraining import vocabulary
from experiments.cli import main
from rewards.base import Prompt, reward_name
from rewards.edit_reward import EditReward
from rewards.edit_reward_calibration import Curve, save_curves
from rewards.remote import RemoteReward
from rewards.remote_calls import RemoteSettings
from rewards.scoring import score
from rewards.tiny.edit_reward import make_tiny_edit_reward

NAME = "rewards.edit_reward:EditReward"
# The first request waits until torch is imported and the weights are read.
PATIENT = RemoteSettings(deadline_seconds=200)
TEXTS = ("remove the red circle", "make the square blue", "turn the cross green", "", "move it to the left")
PICTURES = np.random.default_rng(0).integers(0, 256, (2 * len(TEXTS), 48, 48, 3), np.uint8)
IMAGES, SOURCES = PICTURES[: len(TEXTS)], PICTURES[len(TEXTS) :]
PROMPTS = [Prompt(text, (source,)) for text, source in zip(TEXTS, SOURCES, strict=True)]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny edit reward with a calibration, as training leaves one."""
    folder = make_tiny_edit_reward(tmp_path_factory.mktemp("edit_reward"), vocabulary())
    save_curves({"total": Curve((-2.0, 0.0, 2.0), (0.0, 0.3, 1.0))}, folder, 3)
    return folder


@pytest.fixture
def url(checkpoint: Path, root: Path) -> Iterator[str]:
    command = [sys.executable, "-m", "experiments.cli", "reward", "serve", f"{NAME}={checkpoint}", "--port", "0"]
    # The model of the comparison is on the CPU.
    environment = {**os.environ, "PYTHONPATH": str(root), "CUDA_VISIBLE_DEVICES": ""}
    with subprocess.Popen(command, cwd=checkpoint, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith("serving EditReward at http://127.0.0.1:")
        yield line.split()[-1]
        process.terminate()
        assert process.wait(120) == 143


def test_a_served_edit_reward_says_what_it_says_here(checkpoint: Path, url: str) -> None:
    here = EditReward(checkpoint, device="cpu")
    expected = score(here, IMAGES, PROMPTS)
    with RemoteReward(url, settings=PATIENT) as remote:
        found = score(remote, IMAGES, PROMPTS)
        # A cache has one key for both.
        assert (reward_name(remote), remote.traits.fingerprint) == ("EditReward", here.traits.fingerprint)
        assert remote.traits.batch_size == here.traits.batch_size
        # The prompts' pictures are told apart, and in their order.
        turned = score(remote, IMAGES[::-1], PROMPTS[::-1])
    assert np.isnan(expected.total).tolist() == [not text for text in TEXTS]
    assert np.nanstd(expected.total) > 1e-3, "scores that are all alike compare nothing"
    for there in (found, turned):
        order = slice(None, None, 1 if there is found else -1)
        np.testing.assert_allclose(there.total[order], expected.total, rtol=0, atol=1e-5)
        assert list(there.components) == list(expected.components) == ["success", "preservation"]
        for name, values in expected.components.items():
            np.testing.assert_allclose(there.components[name][order], values, rtol=0, atol=1e-5)
    assert found.reasons == expected.reasons == {3: "text: expected an instruction, got none"}


def test_a_folder_without_a_checkpoint_is_not_served(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["reward", "serve", f"{NAME}={tmp_path}", "--port", "0"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == f"pdtr: {tmp_path}: expected a checkpoint, got a folder without config.json"
