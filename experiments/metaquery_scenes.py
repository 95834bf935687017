"""``pdtr metaquery-scenes``: a tiny UniPic2-MetaQuery for the embedded world, through its stages and into PDTR.

The frozen language model is made first (``experiments.metaquery_vlm``). Stage A trains queries and connector onto the
base's frozen transformer, stage C both together; the base that ships is what stage B makes. Every phase is measured on
held-out prompts, beside the same policy told another prompt's text: what it reaches by chance.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from experiments.flags import Usage, parse


@dataclass(frozen=True)
class MetaQueryScenesConfig:
    """Make a tiny UniPic2-MetaQuery for the embedded world and practise PDTR with it.

    A phase whose folder is there already is not done again: call it again to go on.

    Attributes:
        output_dir: folders lmm, align, unify, rl and results.json go here.
        base: policy of the embedded world whose transformer and codec are used; the one that ships when left out.
        width: of the language model, a multiple of 32.
        num_layers: of the language model.
        vision_steps: of its vision tower alone; 0 leaves it random.
        language_steps: of the whole language model; 0 leaves it random.
        language_batch_size: questions of a step.
        num_queries: learnt tokens behind a prompt.
        connector_layers: of the connector.
        align_steps: of stage A,
        align_learning_rate: its peak rate, AdamW's,
        align_muon_learning_rate: and Muon's for the matrices of the connector's layers; 0 leaves them to AdamW.
        unify_steps: of stage C,
        unify_learning_rate: its peak rate, AdamW's,
        unify_muon_learning_rate: and Muon's for the matrices of connector and transformer; 0 leaves them to AdamW.
        t2i_batch_size: prompts of a step.
        edit_batch_size: edits of a step, in stage C.
        rl_iterations: of each of PDTR's two stages; 0 for none.
        num_measured: held-out prompts a task of each measurement.
        seed: of everything.
        num_threads: torch threads.
    """

    output_dir: Path = Path("runs/metaquery_scenes")
    base: Path | None = None
    width: int = 128
    num_layers: int = 4
    vision_steps: int = 400
    language_steps: int = 1000
    language_batch_size: int = 32
    num_queries: int = 16
    connector_layers: int = 3
    align_steps: int = 1200
    align_learning_rate: float = 2e-3
    align_muon_learning_rate: float = 8e-3
    unify_steps: int = 3000
    unify_learning_rate: float = 1e-3
    unify_muon_learning_rate: float = 4e-3
    t2i_batch_size: int = 24
    edit_batch_size: int = 24
    rl_iterations: int = 30
    num_measured: int = 300
    seed: int = 0
    num_threads: int = 1

    def __post_init__(self) -> None:
        for name in ("num_queries", "connector_layers", "align_steps", "unify_steps", "num_measured", "num_threads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected 1 or more, got {getattr(self, name)}")
        for name in ("vision_steps", "language_steps", "rl_iterations"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: expected 0 or more, got {getattr(self, name)}")


def metaquery_scenes(arguments: Sequence[str]) -> None:
    """``pdtr metaquery-scenes [--flags]``: make, measure, practise; print what was measured.

    Raises:
        ValueError: a bad flag or value.
    """
    config = parse(MetaQueryScenesConfig(), Usage("pdtr metaquery-scenes"), arguments)
    from transformers.utils.logging import disable_progress_bar

    # A bar for every folder that is read or written would drown what is said here.
    disable_progress_bar()  # type: ignore[no-untyped-call]
    from experiments.metaquery_phases import run_phases

    run_phases(config, _say)
    print(f"results: {config.output_dir / 'results.json'}")


def _say(line: str) -> None:
    print(line, flush=True)
