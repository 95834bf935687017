"""What was wrong with rows: counted by reason, the first ones kept, written as JSON lines."""

from __future__ import annotations

import json
import os
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path

from envs.data.pictures import BadRowError

MOST_KEPT = 200


@dataclass(frozen=True)
class RowProblem:
    """A row that was passed over.

    Attributes:
        file: its file.
        row: its number there, from 0.
        expected: what was looked for.
        got: what was there.
    """

    file: str
    row: int
    expected: str
    got: str

    def __str__(self) -> str:
        return f"{self.file}, row {self.row}: expected {self.expected}, got {self.got}"


@dataclass
class Problems:
    """The bad rows of a sitting.

    Attributes:
        num_rows: rows that were looked at, good and bad.
        reasons: bad rows by what was expected.
        first: the first of them, ``MOST_KEPT`` at most.
    """

    num_rows: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    first: list[RowProblem] = field(default_factory=list)

    @property
    def num_bad(self) -> int:
        """Bad rows in all."""
        return self.reasons.total()

    def add(self, file: Path, row: int, error: BadRowError) -> None:
        """Count a bad row."""
        self.reasons[error.expected] += 1
        if len(self.first) < MOST_KEPT:
            self.first.append(RowProblem(str(file), row, error.expected, error.got[:300]))

    def commonest(self) -> str:
        """The commonest reason with how often it came; empty where nothing was wrong."""
        ranked = self.reasons.most_common(1)
        return f"expected {ranked[0][0]} ({ranked[0][1]} rows)" if ranked else ""

    def write(self, path: Path) -> None:
        """Write a line of counts and a line for each problem that was kept; the file appears whole or not at all."""
        counts = {"rows": self.num_rows, "bad": self.num_bad, "reasons": dict(self.reasons.most_common())}
        lines = [json.dumps(counts), *(json.dumps(asdict(problem)) for problem in self.first)]
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(path.name + ".tmp")
        temporary.write_text("".join(f"{line}\n" for line in lines))
        os.replace(temporary, path)
