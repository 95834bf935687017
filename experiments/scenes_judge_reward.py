"""The digit judge of the embedded world as the reward of a run: a server of it, asked for edits."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from experiments.served_rewards import (
    DEFAULT_URL,
    MODEL_VARIABLE,
    URL_VARIABLE,
    agreed_model,
    client_settings,
    connect,
    find_template,
    split_urls,
)
from pdtr.run_settings import MAY_CHANGE

if TYPE_CHECKING:
    from rewards.base import Reward
    from rewards.judges.client import JudgeClient
    from rewards.judges.judge import VLMJudge

TEMPLATE = "scenes_edit.v1"


@dataclass(frozen=True)
class JudgeRewards:
    """Edits are rewarded by a judge behind an OpenAI-compatible server; text-to-image keeps the ground truth.

    A key of PDTR_JUDGE_KEY in the environment is sent along, and recorded nowhere.

    Attributes:
        url: base URL of the server, or several with commas between them; PDTR_JUDGE_URL's in the environment unless
            given.
        model: the name of the judge there; PDTR_JUDGE_MODEL's in the environment, or the server's first.
        template: what it is asked: the embedded world's, one of the library's, or a path.
        max_in_flight: most calls at a time over all servers.
        min_label_mass: below it a judgement is not available.
    """

    url: str = field(default_factory=lambda: os.environ.get(URL_VARIABLE, "") or DEFAULT_URL, metadata=MAY_CHANGE)
    model: str = field(default_factory=lambda: os.environ.get(MODEL_VARIABLE, ""))
    template: str = TEMPLATE
    max_in_flight: int = field(default=16, metadata=MAY_CHANGE)
    min_label_mass: float = 0.5

    def __post_init__(self) -> None:
        if self.max_in_flight < 1:
            raise ValueError(f"max_in_flight: expected 1 or more, got {self.max_in_flight}")
        if not 0 <= self.min_label_mass <= 1:
            raise ValueError(f"min_label_mass: expected a number in [0, 1], got {self.min_label_mass}")

    def make_rewards(self) -> Mapping[str, Reward]:
        """The judge, for editing, once each of its servers has given a real judgement.

        Raises:
            ValueError: no server answers, it has no such model, or the judge does not answer in its labels.
        """
        return {"edit": self.make_judge(self.make_client())}

    def make_client(self) -> JudgeClient:
        """The connections; whoever asked for them closes them, or they end with the interpreter.

        Raises:
            ValueError: a URL is none, or aiohttp is missing.
        """
        return connect(split_urls(self.url), client_settings(self.max_in_flight))

    def make_judge(self, client: JudgeClient) -> VLMJudge:
        """The judge of a client, tried out.

        Raises:
            ValueError: no server answers, it has no such model, or the judge does not answer in its labels.
        """
        from rewards.judges.check import try_out
        from rewards.judges.judge import VLMJudge
        from rewards.judges.settings import JudgeSettings

        try:
            model = agreed_model(client, self.model)
        except ValueError as error:
            raise ValueError(
                f"{error} (for the embedded world's: pdtr scenes-judge, then pdtr judge serve runs/scenes_judge/judge; "
                f"another address: --rewards.url, or {URL_VARIABLE})"
            ) from error
        judge = VLMJudge(client, model, find_template(self.template), JudgeSettings(min_label_mass=self.min_label_mass))
        try_out(judge)
        return judge
