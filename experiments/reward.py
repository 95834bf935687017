"""``pdtr reward serve``: any reward of a module behind HTTP."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from experiments.flags import Usage, parse
from pdtr.named_reward import load_reward

if TYPE_CHECKING:
    from rewards.server import ServerSettings


@dataclass(frozen=True)
class ServeOptions:
    """Answer for a reward over HTTP until Ctrl-C or SIGTERM; rewards.remote:RemoteReward asks it.

    The module is looked for in the current folder too. Whoever asks needs a token where there is one: a file's, or that
    of PDTR_REWARD_TOKEN in the environment. Other machines are only let in with one.

    Attributes:
        reward: module and name of a reward, such as rewards.pixel:redness, or a class and a text to make it of, such as
            rewards.edit_reward:EditReward=runs/edit_reward/model.
        host: address to listen at; 0.0.0.0 is all of this machine's.
        port: 0 takes a free one.
        token_file: file with the token.
        max_body_mib: most MiB of a request.
        max_images: most images of a request.
        max_source_images: most source images of a request.
        max_pixels: most pixels of an image.
        max_request_pixels: most pixels of a request, source images included.
        max_values: most JSON values of a request.
        max_waiting_images: most images that wait; more get 503.
        shutdown_seconds: how long requests may take to end once the server stops.
    """

    reward: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODULE:REWARD")]
    host: str = "127.0.0.1"
    port: int = 8765
    token_file: Path | None = None
    max_body_mib: int = 64
    max_images: int = 512
    max_source_images: int = 512
    max_pixels: int = 2048 * 2048
    max_request_pixels: int = 2**27
    max_values: int = 2**20
    max_waiting_images: int = 4096
    shutdown_seconds: int = 30


def reward(arguments: Sequence[str]) -> None:
    """``pdtr reward serve MODULE:REWARD [--flags]``: serve, after a line with the URL.

    Raises:
        ValueError: no such reward or flag, a bad value, a port that cannot be taken, or a package that is missing.
        KeyboardInterrupt: stopped with Ctrl-C.
        SystemExit: stopped with SIGTERM, with 143.
    """
    if arguments and arguments[0] in ("-h", "--help"):
        arguments = ["serve", *arguments]
    if not arguments or arguments[0] != "serve":
        got = arguments[0] if arguments else "none"
        raise ValueError(f"reward: expected what to do, serve, got {got}; type: pdtr reward serve MODULE:REWARD")
    options = parse(ServeOptions(tyro.MISSING), Usage("pdtr reward serve"), arguments[1:])
    from rewards.base import reward_name
    from rewards.server import RewardServer

    settings = _settings(options)
    found = load_reward(options.reward)
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    try:
        server = RewardServer(found, settings)
    except ModuleNotFoundError as error:
        raise ValueError(str(error)) from error
    print(f"serving {reward_name(found)} at {server.url}", flush=True)
    server.run()


def _settings(options: ServeOptions) -> ServerSettings:
    from rewards.server import ServerSettings, read_token
    from rewards.service import ServiceSettings
    from rewards.wire_json import Limits

    limits = Limits(
        options.max_body_mib * 2**20,
        options.max_images,
        options.max_source_images,
        options.max_pixels,
        options.max_request_pixels,
        options.max_values,
    )
    service = ServiceSettings(
        token=read_token(options.token_file), limits=limits, max_waiting_images=options.max_waiting_images
    )
    return ServerSettings(options.host, options.port, service, options.shutdown_seconds)
