"""``pdtr prompts geneval``: files of prompts that published runs train on and that can be made again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from experiments.flags import Usage, parse


@dataclass(frozen=True)
class GenEvalPromptsOptions:
    """Write training prompts of GenEval's form in Flow-GRPO's mixture (arXiv:2505.05470), one JSON row a line.

    Attributes:
        output: the file; one that is there stays.
        num: how many; Flow-GRPO trains on 50,000.
        without: rows of GenEval's metadata to keep out, such as its evaluation_metadata.jsonl; leave it out only where
            GenEval is not what the run is measured by.
        seed: of the draw.
    """

    output: Path = Path("data/geneval/train.jsonl")
    num: int = 50_000
    without: Path | None = None
    seed: int = 0


def prompts(arguments: Sequence[str]) -> None:
    """``pdtr prompts geneval [--flags]``: write the file, print where it is.

    Raises:
        ValueError: another kind than geneval, a bad value, a file that is there, or rows that are not GenEval's.
        OSError: a file cannot be read or written.
    """
    name, flags = (arguments[0], list(arguments[1:])) if arguments else ("", [])
    if name in ("-h", "--help"):
        name, flags = "geneval", ["--help"]
    if name != "geneval":
        raise ValueError(f"expected a kind of prompts, geneval, got {name or 'none'}; type: pdtr prompts geneval")
    options = parse(GenEvalPromptsOptions(), Usage("pdtr prompts geneval"), flags)
    if options.output.exists():
        raise ValueError(f"{options.output}: expected a new file, got one that is there; choose another --output")
    from envs.geneval_prompts import load_rows, save_rows, training_prompts

    excluded = load_rows(options.without) if options.without else []
    rows = training_prompts(options.num, options.seed, excluded)
    save_rows(options.output, rows)
    note = f", none of the {len(excluded)} of {options.without}" if options.without else ""
    print(f"{options.output}: {len(rows)} prompts{note}")
