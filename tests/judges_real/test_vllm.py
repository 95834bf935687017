"""All readouts through VLMJudge on a real vLLM, its probabilities beside transformers', load, and restarts."""

import json
import math
import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from experiments.cli import main
from rewards.base import Images, Prompt, Scores
from rewards.judges.check import pictures
from rewards.judges.client import JudgeClient
from rewards.judges.judge import VLMJudge
from rewards.judges.messages import remembering
from rewards.judges.settings import ClientSettings, JudgeSettings
from rewards.scoring import score
from tests.judges_real.conftest import NAME, Serving

pytestmark = [pytest.mark.judge, pytest.mark.timeout(900)]

SIDE = 48
DIGITS = "012345"
SETTINGS = JudgeSettings(token_ids=True, min_label_mass=0.02)


@pytest.fixture
def client(serving: Serving) -> Iterator[JudgeClient]:
    with JudgeClient(serving.url) as client:
        yield client


def prompt(seed: int = 99) -> Prompt:
    return Prompt("make the red circle blue", (pictures(1, SIDE, seed)[0],))


def judged(client: JudgeClient, template: str, images: Images, settings: JudgeSettings = SETTINGS) -> Scores:
    return score(VLMJudge(client, NAME, template, settings), images, [prompt()] * len(images))


def reference(python: Path, checkpoint: Path, bodies: Sequence[Any], folder: Path) -> list[list[float]]:
    """Log-probabilities of the first token of each chat over the vocabulary, by transformers."""
    requests, answers = folder / "requests.json", folder / "answers.json"
    requests.write_text(json.dumps(bodies))
    script = Path(__file__).with_name("reference.py")
    command = [str(python), str(script), str(checkpoint), str(requests), str(answers)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    found: list[list[float]] = json.loads(answers.read_text())
    return found


def test_digits_are_those_of_transformers(
    client: JudgeClient, checkpoint: Path, judge_python: Path, tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    images = pictures(6, SIDE, seed=1)
    judge = VLMJudge(client, NAME, "edit_following.v1", SETTINGS)
    scores = judged(client, "edit_following.v1", images)
    sources = remembering(judge._encoded)
    bodies = [judge._sample_body(image, prompt(), sources) for image in images]
    expected = np.exp(reference(judge_python, checkpoint, bodies, tmp_path))
    tokenizer = AutoTokenizer.from_pretrained(str(checkpoint))
    labels = expected[:, tokenizer.convert_tokens_to_ids(list(DIGITS))]
    # Surface forms with a space are labels too, and single tokens of this tokenizer; none is among the 20 likeliest.
    np.testing.assert_allclose(scores.components["label_mass"], labels.sum(1), atol=2e-4)
    means = labels @ np.arange(len(DIGITS)) / labels.sum(1) / 5
    np.testing.assert_allclose(scores.total, means, atol=2e-4)
    # The pictures make a difference that is larger than the tolerance.
    assert np.ptp(labels.sum(1)) > 2e-3


def test_yes_no(client: JudgeClient) -> None:
    scores = judged(client, "yes_no.v1", pictures(3, SIDE, seed=2))
    assert not np.isnan(scores.total).any(), scores.reasons
    assert ((scores.total > 0) & (scores.total < 1)).all()
    assert (scores.components["label_mass"] > 0.02).all()


def test_labels_by_their_text_are_those_by_their_ids(client: JudgeClient) -> None:
    images = pictures(3, SIDE, seed=3)
    by_text = judged(client, "edit_following.v1", images, JudgeSettings(min_label_mass=0.02))
    by_id = judged(client, "edit_following.v1", images)
    np.testing.assert_allclose(by_text.total, by_id.total, atol=1e-4)


def test_a_low_label_mass_is_not_available(client: JudgeClient) -> None:
    scores = judged(client, "edit_following.v1", pictures(1, SIDE, seed=4), JudgeSettings(min_label_mass=0.95))
    assert math.isnan(scores.total[0])
    assert "label mass" in scores.reasons[0]


def test_rubrics_follow_their_schema(client: JudgeClient) -> None:
    # Random text may have control characters in it, which vLLM's grammar lets through.
    scores = judged(client, "viescore_sc.v1", pictures(4, SIDE, seed=5), JudgeSettings(max_tokens=2048))
    assert not np.isnan(scores.total).any(), scores.reasons
    for name in ("edit_success", "restraint"):
        values = scores.components[name]
        assert ((values >= 0) & (values <= 10) & (values == values.round())).all()


def test_pairs_of_three_images(client: JudgeClient) -> None:
    scores = judged(client, "pairwise_edit.v1", pictures(4, SIDE, seed=6))
    assert not np.isnan(scores.total).any(), scores.reasons
    assert scores.total.mean() == pytest.approx(0.5, abs=1e-6)
    assert (scores.components["missing_pairs"] == 0).all()


def test_a_group_shares_its_prefix(serving: Serving) -> None:
    images = pictures(8, SIDE, seed=7)
    with JudgeClient(serving.url, ClientSettings(max_in_flight=1)) as client:
        first = judged(client, "edit_following.v1", images)
        counts = client.statistics()
    # Of each prompt but the first all is read from the cache up to the judged image, in blocks of tokens.
    assert counts.cached_tokens > 0.6 * counts.prompt_tokens
    with JudgeClient(serving.url) as client:
        again = judged(client, "edit_following.v1", images[::-1])
    np.testing.assert_allclose(again.total[::-1], first.total, atol=2e-4)


@pytest.mark.parametrize("concurrency", [4, 16])
def test_many_at_a_time_answer_as_one_does(serving: Serving, concurrency: int) -> None:
    images = pictures(64, SIDE, seed=8)
    with JudgeClient(serving.url, ClientSettings(max_in_flight=1)) as client:
        alone = judged(client, "edit_following.v1", images[:8])
    with JudgeClient(serving.url, ClientSettings(max_in_flight=concurrency)) as client:
        together = judged(client, "edit_following.v1", images)
        counts = client.statistics()
    assert not np.isnan(together.total).any(), together.reasons
    np.testing.assert_allclose(together.total[:8], alone.total, atol=2e-4)
    # The labels' ids are asked for by another path and are no calls.
    assert (counts.calls, counts.retries, counts.failures) == (64, 0, {})
    assert 0 < counts.p50_seconds <= counts.p95_seconds


def test_check_says_what_works(serving: Serving, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--side", "48", "--calls", "8", "--concurrencies", "1", "4", "--min-label-mass", "0.02"]
    assert main(["judge", "check", serving.url, *flags, "--max-tokens", "2048", "--images", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{NAME} at {serving.url}"
    for line, readout in zip(lines[1:5], ("digits", "yes_no", "rubric", "pairwise"), strict=True):
        assert line.startswith(readout), line
        assert "works" in line, line
        assert "does not" not in line, line
    assert "labels by id" in lines[1]
    assert [line.split()[0] for line in lines[6:8]] == ["1", "4"]
    assert lines[-1].startswith("counters: calls ")
    assert lines[-1].endswith("no faults")


def test_check_names_what_is_wrong(serving: Serving, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, part in (
        ([serving.url.removesuffix("/v1")], "ends in /v1"),
        ([serving.url, "--model", "tyni"], f"the nearest is '{NAME}'"),
    ):
        assert main(["judge", "check", *arguments]) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        assert part in captured.err
        assert len(captured.err.splitlines()) == 1


def test_the_judge_goes_on_when_its_server_dies_and_comes_back(serving: Serving) -> None:
    images = pictures(24, SIDE, seed=9)
    before: list[Scores] = []
    after: list[Scores] = []
    with JudgeClient(serving.url, ClientSettings(call_seconds=600, max_in_flight=4)) as client:
        before.append(judged(client, "edit_following.v1", images))
        os.kill(serving.engine(), signal.SIGKILL)
        # One line that says so, exit code 2, and no process left.
        assert serving.wait() == 2, serving.said()
        last = serving.said().splitlines()[-1]
        assert last.startswith("pdtr: vLLM ended"), last
        assert "EngineDeadError" in last
        assert str(serving.log) in last
        assert serving.workers() == []
        waits = threading.Thread(target=lambda: after.append(judged(client, "edit_following.v1", images)))
        waits.start()
        serving.ensure()
        waits.join(300)
        counts = client.statistics()
    assert after
    assert not np.isnan(after[0].total).any(), after[0].reasons
    np.testing.assert_allclose(after[0].total, before[0].total, atol=2e-4)
    assert counts.faults["connection"] > 0
    assert counts.failures == {}


def test_a_second_server_of_the_same_port_is_refused(serving: Serving, capsys: pytest.CaptureFixture[str]) -> None:
    port = serving.url.removesuffix("/v1").rpartition(":")[2]
    assert main(["judge", "serve", str(serving.checkpoint), "--port", port]) == 2
    assert f"port {port}" in capsys.readouterr().err


def test_sigterm_stops_every_process(serving: Serving) -> None:
    assert len(serving.workers()) >= 2
    started = time.monotonic()
    serving.stop()
    assert time.monotonic() - started < 30
    assert serving.wait() == 128 + signal.SIGTERM
    assert serving.workers() == []


def test_a_flag_that_vllm_refuses_is_one_line(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--port", "0", "--log", str(tmp_path / "log"), "--", "--no-such-flag"]
    assert main(["judge", "serve", str(checkpoint), *flags]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert "unrecognized arguments: --no-such-flag" in lines[0]
