"""The README's code is complete and runs as it stands."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

BLOCKS = re.findall(r"```python\n(.*?)```", (Path(__file__).parents[2] / "README.md").read_text(), re.DOTALL)


def test_there_are_three_examples() -> None:
    assert len(BLOCKS) == 3


@pytest.mark.parametrize("index", range(3), ids=["reward", "curriculum", "algorithm"])
def test_example_runs_and_prints_its_report(index: int, tmp_path: Path, root: Path) -> None:
    script = tmp_path / "example.py"
    script.write_text(BLOCKS[index])
    environment = {**os.environ, "PYTHONPATH": str(root)}
    done = subprocess.run(
        [sys.executable, str(script)], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stderr
    report = Path(done.stdout.strip().splitlines()[-1])
    assert (tmp_path / report).is_file()
