"""Tiny twins of published recipes as several processes run them; a module of its own, which the processes import."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from experiments.recipes import find_recipe
from pdtr.launch import run
from pdtr.processes import ProcessSettings, Sharding


def run_twin(root: Path, name: str, folder: Path, sharding: Sharding) -> None:
    """A run of four prompts an iteration, which one process can do and two can share; models are under the root."""
    os.chdir(root)
    config = replace(find_recipe(name)(), num_prompts=4, output_dir=folder, processes=ProcessSettings(sharding))
    run(config)


def main(arguments: tuple[str, list[tuple[str, str]]]) -> None:
    """What each process does: every named twin in its folder, cut up."""
    root, jobs = arguments
    for name, folder in jobs:
        run_twin(Path(root), name, Path(folder), "fsdp2")
