"""Stands in for vLLM as a process: takes its flags, answers with digits, has a worker, and misbehaves as it is told to.

Modes, by the flag --fake: "serves"; "dies" while it starts; "ignores" SIGTERM; "refuses" what judges ask; "silent": it
listens and never answers.
"""

import os
import signal
import subprocess
import sys
import time

from tests.rewards.judges.fake_server import FOREVER, FakeServer, Reply, Request, as_json, says

DEATH = "ValueError: No model here."


def flag(name: str, default: str = "") -> str:
    return next((a.partition("=")[2] for a in sys.argv if a.startswith(f"--{name}=")), default)


def main() -> None:
    mode = flag("fake", "serves")
    print("INFO starting", sorted(os.environ.keys() & {"VLLM_API_KEY", "HF_HUB_OFFLINE", "PYTHONPATH"}), flush=True)
    if mode == "dies":
        print(
            f"(EngineCore pid=1) ERROR 11-24 [core.py:1] {DEATH}\n" * 3,
            "RuntimeError: See root cause above.",
            flush=True,
        )
        sys.exit(1)
    worker = subprocess.Popen(["sleep", "1000"])
    print("worker", worker.pid, flush=True)
    if mode == "ignores":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)

    def handler(request: Request) -> Reply:
        if request.path == "/die":
            print(DEATH, flush=True)
            os._exit(3)
        if mode == "refuses":
            return as_json({"error": {"message": "not a multimodal model"}}, status=400)
        if mode == "silent":
            return Reply(seconds=FOREVER)
        assert request.body["model"] == flag("served-model-name")
        return says({"4": 0.6, "5": 0.3, "x": 0.1})

    server = FakeServer(handler)
    server.port = int(flag("port"))
    # As vLLM: some time passes before it listens.
    time.sleep(0.3)
    server.start()
    signal.pause()


if __name__ == "__main__":
    main()
