"""Rewards of runs that other machines compute: judges behind OpenAI-compatible servers, and reward servers.

Whatever is asked later is tried once before a run starts, so that a wrong address is one line and no run.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from experiments.judge import KEY_VARIABLE
from pdtr.run_settings import MAY_CHANGE

if TYPE_CHECKING:
    from rewards.base import Reward
    from rewards.judges.client import JudgeClient
    from rewards.judges.judge import VLMJudge
    from rewards.judges.settings import ClientSettings, JudgeSettings
    from rewards.judges.templates import Template
    from rewards.judges.viescore import VIEScore

TEMPLATES = Path(__file__).parent / "templates"
URL_VARIABLE, MODEL_VARIABLE = "PDTR_JUDGE_URL", "PDTR_JUDGE_MODEL"
DEFAULT_URL = "http://127.0.0.1:8000/v1"
# How long a reward server is waited for when a run starts; a run that is under way waits longer.
_CHECK_SECONDS = 10.0


@dataclass(frozen=True)
class EditJudge:
    """A judge of edits behind one or several OpenAI-compatible servers, such as vLLM's, see ``rewards.judges.judge``.

    A key of PDTR_JUDGE_KEY in the environment is sent along, and recorded nowhere.

    Attributes:
        urls: base URLs of servers that all serve this judge; those of PDTR_JUDGE_URL in the environment, with commas
            between them, or this machine's unless given.
        model: its name there; PDTR_JUDGE_MODEL's in the environment, or the first server's first.
        templates: what it is asked: one of ``experiments/templates``, of the library's or a path; two are VIEScore's,
            sqrt(SC * PQ): what the edit did, then how well the image is made.
        max_in_flight: most calls at a time over all servers, of each process of the run.
        read: from label probabilities, or from the answer's text, for servers without log-probabilities.
        min_label_mass: least probability of all labels together; below it a judgement is not available.
        disable_thinking: for models that think unless told not to.
    """

    urls: tuple[str, ...] = field(default_factory=lambda: default_urls(), metadata=MAY_CHANGE)
    model: str = field(default_factory=lambda: os.environ.get(MODEL_VARIABLE, ""))
    templates: tuple[str, ...] = ("edit_overall.v1",)
    max_in_flight: int = field(default=64, metadata=MAY_CHANGE)
    read: Literal["probabilities", "answer"] = "probabilities"
    min_label_mass: float = 0.5
    disable_thinking: bool = False

    def __post_init__(self) -> None:
        if len(self.templates) not in (1, 2):
            raise ValueError(f"templates: expected one, or two for VIEScore, got {list(self.templates)}")
        self._client_settings()
        self._judge_settings()

    def make(self) -> Reward:
        """The judge, once each of its servers has given a real judgement.

        Raises:
            ValueError: a server does not answer or has no such model, the judge does not answer as its template asks,
                or there is no such template.
        """
        from rewards.judges.check import try_out
        from rewards.judges.judge import VLMJudge
        from rewards.judges.viescore import VIEScore

        templates = [find_template(name) for name in self.templates]
        client = connect(self.urls, self._client_settings())
        try:
            model = agreed_model(client, self.model)
            judges = [VLMJudge(client, model, template, self._judge_settings()) for template in templates]
            for judge in judges:
                try_out(judge)
        except ValueError as error:
            client.close()
            raise ValueError(
                f"{error} (other servers: --rewards.judge.urls URL [URL ...], or {URL_VARIABLE}; another reward: "
                "--rewards.edit-by weights, or remote; --tasks.edit-reward MODULE:REWARD)"
            ) from error
        reward: VLMJudge | VIEScore = judges[0] if len(judges) == 1 else VIEScore(*judges)
        return reward

    def _client_settings(self) -> ClientSettings:
        return client_settings(self.max_in_flight)

    def _judge_settings(self) -> JudgeSettings:
        from rewards.judges.settings import JudgeSettings

        return JudgeSettings(read=self.read, min_label_mass=self.min_label_mass, disable_thinking=self.disable_thinking)


@dataclass(frozen=True)
class RemoteScorer:
    """A reward that ``pdtr reward serve`` serves, see ``rewards.remote.RemoteReward``.

    A token of PDTR_REWARD_TOKEN in the environment is sent along, and recorded nowhere.

    Attributes:
        url: where its server is, such as http://10.0.0.7:8765.
        deadline_seconds: most time of a call with all its tries, after which its images have no reward.
    """

    url: str = field(default="", metadata=MAY_CHANGE)
    deadline_seconds: float = field(default=120.0, metadata=MAY_CHANGE)

    def __post_init__(self) -> None:
        if not 0 < self.deadline_seconds < float("inf"):
            raise ValueError(f"deadline_seconds: expected a number above 0, got {self.deadline_seconds}")

    def make(self, flag: str) -> Reward:
        """The reward, once its server has said what it is.

        Args:
            flag: what the URL is called on the command line, for messages.

        Raises:
            ValueError: the URL is none, no reward server answers there, or it wants a token.
        """
        from rewards.remote import RemoteReward
        from rewards.remote_calls import RemoteSettings
        from rewards.server import TOKEN_VARIABLE, read_token

        settings = RemoteSettings(read_token(), self.deadline_seconds)
        brief = replace(settings, deadline_seconds=min(_CHECK_SECONDS, self.deadline_seconds))
        try:
            RemoteReward(self.url, settings=brief).close()
            return RemoteReward(self.url, settings=settings)
        except (ValueError, ModuleNotFoundError) as error:
            raise ValueError(f"{error} (another server: {flag} URL; its token: {TOKEN_VARIABLE})") from error


def default_urls() -> tuple[str, ...]:
    """The base URLs of PDTR_JUDGE_URL in the environment; this machine's where there are none."""
    return split_urls(os.environ.get(URL_VARIABLE, "")) or (DEFAULT_URL,)


def split_urls(text: str) -> tuple[str, ...]:
    """Base URLs with commas between them, as a tuple."""
    return tuple(url.strip() for url in text.split(",") if url.strip())


def client_settings(max_in_flight: int) -> ClientSettings:
    """How a run's judge is called: with the key of PDTR_JUDGE_KEY.

    Raises:
        ValueError: ``max_in_flight`` is below 1, or no header can hold the key.
    """
    from rewards.judges.settings import ClientSettings

    if max_in_flight < 1:
        raise ValueError(f"max_in_flight: expected 1 or more, got {max_in_flight}")
    return ClientSettings(max_in_flight=max_in_flight, api_key=os.environ.get(KEY_VARIABLE, "").strip())


def connect(urls: Sequence[str], settings: ClientSettings) -> JudgeClient:
    """The connections; whoever asked for them closes them, or they end with the interpreter.

    Raises:
        ValueError: a URL is none, or aiohttp is missing.
    """
    from rewards.judges.client import JudgeClient

    try:
        return JudgeClient(urls, settings)
    except ModuleNotFoundError as error:
        raise ValueError(str(error)) from error


def agreed_model(client: JudgeClient, model: str = "") -> str:
    """The model to ask, which every server has to have: the given one, or the first server's first.

    Raises:
        ValueError: a server does not answer, or does not have the model.
    """
    from rewards.judges.check import served_model

    agreed = served_model(client, model)
    first, *others = client.base_urls
    found = asyncio.run(client.served_models()) if others else {}
    for url in others:
        models = found[url]
        if isinstance(models, str):
            raise ValueError(
                f"{url}: expected a judge that answers, as {first} does, got none: {models}; start it, or leave it out"
            )
        if agreed not in models:
            raise ValueError(
                f"{url}: expected {agreed!r}, as at {first}, got a server of {', '.join(models) or 'no model'}; "
                "all servers have to serve one judge"
            )
    return agreed


def find_template(name: str) -> Template:
    """A template of ``experiments/templates``, or one of the library's, or one of a path.

    Raises:
        ValueError: there is none; the nearest is named.
    """
    from rewards.judges.templates import load_template

    own = sorted(path.name.removesuffix(".txt") for path in TEMPLATES.glob("*.txt"))
    if name in own:
        return load_template(TEMPLATES / f"{name}.txt")
    try:
        return load_template(name)
    except ValueError as error:
        if Path(name).is_file():
            raise
        raise ValueError(f"{error}; besides them there are {', '.join(own)}") from error
