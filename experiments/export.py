"""``pdtr export``: the policy of a checkpoint or of a stage's end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from experiments.flags import Usage, parse


@dataclass(frozen=True)
class ExportOptions:
    """Write the policy of one of a run's checkpoints or of a stage's end; the run may have finished, or go on.

    What is written loads wherever the folder of a finished run does: in pdtr sample, pdtr eval and --base.

    Attributes:
        run_folder: the run's output directory.
        step: iterations that were done; the last that the run has kept weights of, when left out.
        stage: name of the stage whose end it is, in place of a step.
        output_dir: a new folder; RUN/exports/NAME, after the checkpoint, when left out.
    """

    run_folder: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    step: int | None = None
    stage: str | None = None
    output_dir: Path | None = None


def export(arguments: Sequence[str]) -> None:
    """``pdtr export RUN [--step N | --stage NAME] [--output-dir DIR]``: write a policy, print where it is.

    Raises:
        ValueError: the folder is not a run's, or has no such checkpoint or stage.
        OSError: a file cannot be read or written.
    """
    options = parse(ExportOptions(tyro.MISSING), Usage("pdtr export"), arguments)
    from pdtr.export import export_policy

    print(f"policy: {export_policy(options.run_folder, options.step, options.stage, options.output_dir) / 'policy'}")
