"""``pdtr judge check URL``: which readouts work on a server, and how fast it answers."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from experiments.judge import read_key

if TYPE_CHECKING:
    from rewards.judges.check import Load, ReadoutReport
    from rewards.judges.settings import ClientSettings, JudgeSettings

_CALLS_A_WORKER = 4
"""Least calls for each that is in flight: with fewer the start and the end are most of it."""
_SHOWN_KINDS = ("faults/", "failures/")


@dataclass(frozen=True)
class JudgeCheckOptions:
    """Say what a judge can do, and how fast it is: model, label mass, readouts, latency, throughput, counters.

    Its pictures are of coloured squares, so what it says of them is of no interest, and that it answers is. A key of
    PDTR_JUDGE_KEY in the environment, or of a file, is sent along.

    Attributes:
        url: base URL of an OpenAI-compatible server, such as http://127.0.0.1:8000/v1.
        model: the model to ask; the server's first unless given.
        concurrencies: calls in flight, one measurement each.
        calls: judgements of a measurement, at least four for each that is in flight.
        side: of the pictures, in pixels.
        images: pictures of each readout; a pairwise one asks for each ordered pair.
        min_label_mass: below it a judgement is not available.
        max_tokens: most tokens of a rubric.
        disable_thinking: for models that think by default.
        call_seconds: most time of a call.
        key_file: file with the key.
    """

    url: Annotated[str, tyro.conf.Positional]
    model: str = ""
    concurrencies: tuple[int, ...] = (1, 4, 16)
    calls: int = 32
    side: int = 256
    images: int = 4
    min_label_mass: float = 0.5
    max_tokens: int = 1024
    disable_thinking: bool = False
    call_seconds: float = 180.0
    key_file: Path | None = None

    def __post_init__(self) -> None:
        for name in ("calls", "side"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected 1 or more, got {getattr(self, name)}")
        if self.images < 2:
            raise ValueError(f"images: expected 2 or more, which make a pair, got {self.images}")
        if not self.concurrencies or min(self.concurrencies) < 1:
            raise ValueError(f"concurrencies: expected numbers of 1 or more, got {list(self.concurrencies)}")


def check(options: JudgeCheckOptions) -> None:
    """Print the report, line by line as it is found.

    Raises:
        ValueError: no such server, it does not answer, has no such model, or refuses what judges ask.
    """
    from rewards.judges.check import TEMPLATES, check_readout, measure, pictures, served_model, summed
    from rewards.judges.client import JudgeClient

    settings = _client_settings(options, max(options.concurrencies))
    try:
        client = JudgeClient(options.url, settings)
    except ModuleNotFoundError as error:
        raise ValueError(str(error)) from error
    with client:
        model = served_model(client, options.model)
        print(f"{model} at {client.base_urls[0]}", flush=True)
        images = pictures(options.images, options.side, seed=0)
        for readout in TEMPLATES:
            judge_settings = _judge_settings(options, readout)
            print(_readout_line(check_readout(client, model, readout, judge_settings, images)), flush=True)
        statistics = [client.statistics()]
    print("concurrency  calls/s  p50 ms  p95 ms  not answered", flush=True)
    for concurrency in options.concurrencies:
        count = max(options.calls, _CALLS_A_WORKER * concurrency)
        # Other pictures than before: those that it has seen it answers from its caches.
        batch = pictures(count, options.side, seed=concurrency)
        load = measure(
            options.url, model, _client_settings(options, concurrency), _judge_settings(options, "digits"), batch
        )
        print(_load_line(load), flush=True)
        statistics.append(load.statistics)
    print(_counter_lines(summed(statistics)), flush=True)


def _client_settings(options: JudgeCheckOptions, concurrency: int) -> ClientSettings:
    from rewards.judges.settings import ClientSettings

    return ClientSettings(
        max_in_flight=concurrency,
        attempt_seconds=options.call_seconds,
        call_seconds=options.call_seconds,
        api_key=read_key(options.key_file),
    )


def _judge_settings(options: JudgeCheckOptions, readout: str) -> JudgeSettings:
    from rewards.judges.settings import JudgeSettings

    return JudgeSettings(
        min_label_mass=options.min_label_mass,
        max_tokens=options.max_tokens if readout == "rubric" else None,
        disable_thinking=options.disable_thinking,
    )


def _readout_line(report: ReadoutReport) -> str:
    if report.works:
        verdict = "works"
    else:
        verdict = "does not work" if report.available == 0 else f"works for {report.available:.0%} of the pictures"
    details = [] if math.isnan(report.label_mass) else [f"label mass {report.label_mass:.3f}"]
    details += [f"labels {report.labels}"] if report.labels else []
    details += [report.reason] if report.reason else []
    return f"{report.readout:<10}{verdict}{': ' if details else ''}{'; '.join(details)}"


def _load_line(load: Load) -> str:
    counts = load.statistics
    p50, p95 = 1000 * counts.p50_seconds, 1000 * counts.p95_seconds
    failed = sum(counts.failures.values())
    return f"{load.concurrency:>11}  {load.calls_per_second:>7.1f}  {p50:>6.0f}  {p95:>6.0f}  {failed:>12}"


def _counter_lines(counters: dict[str, float]) -> str:
    names = ("calls", "retries", "prompt_tokens", "cached_tokens", "completion_tokens")
    parts = [f"{name} {counters[name]:.0f}" for name in names]
    kinds = [f"{name} {count:.0f}" for name, count in sorted(counters.items()) if name.startswith(_SHOWN_KINDS)]
    return "counters: " + ", ".join([*parts, *(kinds or ["no faults"])])
