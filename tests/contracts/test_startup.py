"""`import pdtr` and `pdtr --help` answer in half a second, because heavy imports wait until they are used."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

LIMIT_SECONDS = 0.5
HEAVY = ("torch", "diffusers", "transformers", "gymnasium", "matplotlib", "accelerate")


def run_python(root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=60, check=False)


def seconds(root: Path, *arguments: str) -> float:
    start = time.perf_counter()
    finished = run_python(root, *arguments)
    elapsed = time.perf_counter() - start
    assert finished.returncode == 0, finished.stderr
    return elapsed


@pytest.mark.parametrize(
    "arguments", [("-c", "import pdtr"), ("-m", "experiments.cli", "--help")], ids=["import", "help"]
)
def test_start_up_is_within_half_a_second(root: Path, arguments: tuple[str, ...]) -> None:
    seconds(root, *arguments)  # Writes the bytecode, which a user pays for once.
    best = min(seconds(root, *arguments) for _ in range(3))
    assert best <= LIMIT_SECONDS, f"python {' '.join(arguments)} took {best:.2f} s at best, at most {LIMIT_SECONDS} s"


def test_help_says_what_the_program_does(root: Path) -> None:
    finished = run_python(root, "-m", "experiments.cli", "--help")
    assert "train" in finished.stdout, finished.stderr


def loaded_after(root: Path, statement: str, names: tuple[str, ...]) -> list[str]:
    """Which of the packages a fresh interpreter has loaded after the statement."""
    program = f"import sys; {statement}; print(*(name for name in {names!r} if name in sys.modules))"
    finished = run_python(root, "-c", program)
    assert finished.returncode == 0, finished.stderr
    return finished.stdout.split()


@pytest.mark.parametrize("module", ["pdtr", "experiments.cli"])
def test_nothing_heavy_is_loaded_indirectly(root: Path, module: str) -> None:
    assert loaded_after(root, f"import {module}", HEAVY) == []


def test_the_packages_do_not_load_torchvision(root: Path) -> None:
    packages = "import pdtr, envs, envs.scenes, rewards, agents, agents.policies, agents.algorithms, experiments"
    assert loaded_after(root, packages, ("torchvision",)) == []


def test_a_loaded_package_is_seen(root: Path) -> None:
    assert loaded_after(root, "import numpy", (*HEAVY, "numpy")) == ["numpy"]
