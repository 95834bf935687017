"""The flags of a judge for ``pdtr eval``, and the judges made of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from experiments.judge import read_key

if TYPE_CHECKING:
    from rewards.judges.judge import VLMJudge
    from rewards.judges.settings import JudgeSettings
    from rewards.judges.templates import Template


@dataclass(frozen=True)
class JudgeFlags:
    """Which judge is asked, and how.

    Attributes:
        base_url: base URLs of OpenAI-compatible servers of one model, such as http://127.0.0.1:8000/v1.
        model: the model to ask; the server's first unless given.
        max_in_flight: most calls at a time.
        call_seconds: most time of a call, its retries included.
        long_side: larger pictures are scaled down to this many pixels for the judge.
        min_label_mass: below it a yes or no is not available.
        max_tokens: most tokens of a rubric.
        disable_thinking: for models that think by default.
        key_file: file with the server's key; PDTR_JUDGE_KEY in the environment otherwise.
    """

    base_url: tuple[str, ...] = ()
    model: str = ""
    max_in_flight: int = 64
    call_seconds: float = 180.0
    long_side: int = 768
    min_label_mass: float = 0.5
    max_tokens: int = 1024
    disable_thinking: bool = False
    key_file: Path | None = None


@contextmanager
def judges(flags: JudgeFlags, templates: Sequence[str | Path | Template]) -> Iterator[list[VLMJudge]]:
    """A judge a template, on one client that is closed in the end.

    Raises:
        ValueError: no server is named or answers, it has no such model, or a template is none.
    """
    from rewards.judges.check import served_model
    from rewards.judges.client import JudgeClient
    from rewards.judges.judge import VLMJudge
    from rewards.judges.settings import ClientSettings
    from rewards.judges.templates import load_template

    loaded = [load_template(t) if isinstance(t, str | Path) else t for t in templates]
    if not flags.base_url:
        raise ValueError(
            "base_url: expected a judge's server, such as --base-url http://127.0.0.1:8000/v1, got none; "
            "start one with: pdtr judge serve MODEL, or only draw with --draw-only"
        )
    settings = ClientSettings(
        max_in_flight=flags.max_in_flight,
        attempt_seconds=flags.call_seconds,
        call_seconds=flags.call_seconds,
        # A batch waits for its turn behind all its own calls.
        batch_seconds=100 * flags.call_seconds,
        api_key=read_key(flags.key_file),
    )
    try:
        client = JudgeClient(flags.base_url, settings)
    except ModuleNotFoundError as error:
        raise ValueError(str(error)) from error
    with client:
        model = served_model(client, flags.model)
        yield [VLMJudge(client, model, template, _asked(flags, template)) for template in loaded]


def _asked(flags: JudgeFlags, template: Template) -> JudgeSettings:
    from rewards.judges.settings import JudgeSettings

    is_rubric = template.readout.kind == "rubric"
    return JudgeSettings(
        long_side=flags.long_side,
        min_label_mass=flags.min_label_mass,
        max_tokens=flags.max_tokens if is_rubric else None,
        disable_thinking=flags.disable_thinking,
    )
