"""How much of a judge server's throughput comes through ``VLMJudge``: the same requests by a bare load generator.

Type ``python -m experiments.benchmarks.judge_throughput --url http://127.0.0.1:8000/v1``, with a judge served there.
The bare generator holds as many connections, sends bodies that are ready and only reads the answers to their ends; the
judge encodes the images, makes the bodies, counts, checks and reads. No image is sent twice: a server that has seen one
before answers from its caches, in a fraction of the time that a new one takes. Where the server computes on processors
too, give each side its own (``taskset -c 0`` before the server's command, ``-c 1`` before this one): otherwise what a
client needs is taken from the server. The figures go to ``judge_throughput.csv``.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from experiments.benchmarks.entry import run_benchmark
from experiments.benchmarks.machine import describe_machine
from experiments.benchmarks.tables import RESULTS, write_csv
from experiments.benchmarks.timing import Measurement, cases_table, interleaved, median_interval
from experiments.flags import Usage, parse

if TYPE_CHECKING:
    from rewards.base import Images, Prompt
    from rewards.judges.client import JudgeClient
    from rewards.judges.judge import VLMJudge

TABLE = "judge_throughput.csv"
_SECONDS = 600.0
_JSON = {"Content-Type": "application/json"}
_SIDE = 48


@dataclass(frozen=True)
class Options:
    """Time a judge and a bare load generator in turn, against one server, with the same requests.

    Attributes:
        url: base URL of the server.
        model: the name of the judge there; the first one served when left out.
        template: of the judge; one that scores single edits.
        concurrency: calls in flight, one case each.
        num_calls: of a repeat.
        repeats: of each case; one more, which warms up, is not counted.
        results: folder of the CSV file.
    """

    url: str = "http://127.0.0.1:8000/v1"
    model: str | None = None
    template: str = "edit_following.v1"
    concurrency: tuple[int, ...] = (1, 4, 16)
    num_calls: int = 64
    repeats: int = 9
    results: Path = RESULTS


@dataclass(frozen=True)
class Requests:
    """What is asked: images uint8 [B, H, W, 3] with their prompts, and the same as bodies of calls."""

    images: Images
    prompts: tuple[Prompt, ...]
    bodies: tuple[bytes, ...]


def benchmark(arguments: Sequence[str]) -> int:
    """Measure, write the CSV file, print the table."""
    options = parse(Options(), Usage("python -m experiments.benchmarks.judge_throughput"), arguments)
    found = list(measure(options))
    write_csv(options.results / TABLE, found)
    print(f"Machine: {found[0].machine}\n\nMedians of {options.repeats} repeats with 95 % bootstrap intervals")
    print(cases_table(found))
    return 0


def measure(options: Options) -> Iterator[Measurement]:
    """Calls a second of both and their ratio, at each concurrency."""
    from rewards.judges.client import JudgeClient
    from rewards.judges.judge import VLMJudge
    from rewards.judges.settings import ClientSettings

    machine = describe_machine()
    for concurrency in options.concurrency:
        settings = ClientSettings(max_in_flight=concurrency, batch_seconds=_SECONDS)
        with JudgeClient(options.url, settings) as client:
            judge = VLMJudge(client, options.model or _served(client), options.template)
            seconds = interleaved(_calls(judge, options, concurrency), options.repeats)
            failures = client.statistics().failures
        if failures:
            raise ValueError(f"{options.url}: expected an answer to every call, got {dict(failures)}")
        case = f"{concurrency} in flight"
        values = {f"{name} calls": (options.num_calls / s, "calls/s") for name, s in seconds.items()}
        values["judge / bare"] = (seconds["bare"] / seconds["judge"], "ratio")
        for name, (value, unit) in values.items():
            yield Measurement(name, case, *median_interval(value), options.repeats, unit, machine)


def _calls(judge: VLMJudge, options: Options, concurrency: int) -> dict[str, Callable[[], object]]:
    """Both sides' calls; each takes the next of the requests that are made here, before any is timed."""
    from rewards.scoring import score

    # Without a seed: a second run would send a server images that it knows.
    rng = np.random.default_rng()
    mine, bare = (
        iter([make_requests(judge, options.num_calls, rng) for _ in range(options.repeats + 1)]) for _ in range(2)
    )

    def ask_judge() -> None:
        asked = next(mine)
        score(judge, asked.images, asked.prompts)

    return {"judge": ask_judge, "bare": lambda: asyncio.run(load(options.url, next(bare).bodies, concurrency))}


def make_requests(judge: VLMJudge, num_calls: int, rng: np.random.Generator) -> Requests:
    """Noise to be judged as edits of noise."""
    from rewards.base import Prompt
    from rewards.judges.messages import content_parts, data_url, request_body

    images, sources = (rng.integers(0, 256, (num_calls, _SIDE, _SIDE, 3), np.uint8) for _ in range(2))
    prompts = tuple(Prompt(f"Make number {i} brighter.", (source,)) for i, source in enumerate(sources))
    bodies = []
    for image, prompt in zip(images, prompts, strict=True):
        side = judge.settings.long_side
        urls = {"source": [data_url(prompt.source_images[0], side)], "image": [data_url(image, side)]}
        parts = content_parts(judge.template, prompt, urls)
        bodies.append(json.dumps(request_body(judge.model, judge.template.readout, judge.settings, parts)).encode())
    return Requests(images, prompts, tuple(bodies))


async def load(url: str, bodies: Sequence[bytes], concurrency: int) -> None:
    """Send all bodies, so many at a time, and read the answers.

    Raises:
        ValueError: an answer that is none.
    """
    import aiohttp

    waiting = iter(bodies)
    connector, timeout = aiohttp.TCPConnector(limit=concurrency), aiohttp.ClientTimeout(total=_SECONDS)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout, headers=_JSON) as http:

        async def send() -> None:
            for body in waiting:
                async with http.post(f"{url.rstrip('/')}/chat/completions", data=body) as answer:
                    said = await answer.read()
                if answer.status != HTTPStatus.OK:
                    raise ValueError(f"{url}: expected an answer, got status {answer.status}: {said[:200]!r}")

        await asyncio.gather(*(send() for _ in range(concurrency)))


def _served(client: JudgeClient) -> str:
    (names,) = asyncio.run(client.served_models()).values()
    if isinstance(names, str) or not names:
        raise ValueError(f"{client.base_urls[0]}: expected a server with a model, got {names or 'none'}")
    return names[0]


if __name__ == "__main__":
    sys.exit(run_benchmark(benchmark))
