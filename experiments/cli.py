"""The console script ``pdtr``: finds the command, and turns a user's mistake into one line and exit code 2.

Exit codes: 0 done, 2 a mistake in what was asked for (``PDTR_TRACEBACK=1`` shows where it came up), 130 stopped with
Ctrl-C, 143 a server ended by SIGTERM. Anything else is a defect of ours and shows its traceback. Where a launcher has
started several processes, one line is said by one of them.
"""

from __future__ import annotations

import difflib
import errno
import os
import shlex
import sys
from collections.abc import Sequence
from importlib import import_module

from experiments.threads import set_waiting
from pdtr.processes import is_first, num_processes, speaks

# Each names the function that runs it, which is imported once it is asked for: `pdtr --help` must not wait for torch.
COMMANDS = {
    "train": ("experiments.commands:train", "[RECIPE] [--resume] [--flags]", "train a policy and write its report"),
    "pretrain": ("experiments.pretrain:pretrain", "NAME [--resume] [--flags]", "the embedded world's base, or a stage"),
    "eval": ("experiments.eval:evaluate", "[BENCHMARK] [--flags]", "held-out success, or a published benchmark"),
    "sample": ("experiments.commands:sample", "PROMPT [--source-image PATH] [--flags]", "draw images, or edit one"),
    "export": (
        "experiments.export:export",
        "RUN [--step N | --stage NAME] [--output-dir DIR]",
        "the policy of a checkpoint or of a stage",
    ),
    "report": ("experiments.commands:report", "RUN_FOLDER", "write a run's report again and print its table"),
    "reward": ("experiments.reward:reward", "serve MODULE:REWARD [--flags]", "answer for a reward over HTTP"),
    "judge": (
        "experiments.judge:judge",
        "serve MODEL | check URL [--flags]",
        "a judge behind vLLM: start it, try it out",
    ),
    "edit-reward": ("experiments.edit_reward:edit_reward", "STEP [--flags]", "make a learnt edit reward, step by step"),
    "scenes-judge": ("experiments.scenes_judge:scenes_judge", "[--flags]", "train the embedded world's digit judge"),
    "metaquery-scenes": (
        "experiments.metaquery_scenes:metaquery_scenes",
        "[--flags]",
        "make a tiny UniPic2-MetaQuery and practise with it",
    ),
    "prompts": ("experiments.prompts:prompts", "geneval [--flags]", "write the prompts that GenEval's runs train on"),
    "recipes": ("experiments.commands:recipes", "", "list what can be trained"),
}
# Those that several processes do together, where a launcher has started them.
SHARED = ("train", "pretrain", "eval", "edit-reward")
MISTAKE, STOPPED = 2, 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; -> the exit code.

    Args:
        arguments: without the program's name; ``sys.argv``'s unless given.
    """
    set_waiting()
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        _dispatch(arguments)
        sys.stdout.flush()
        return 0
    except KeyboardInterrupt as stop:
        if is_first():
            _complain(f"stopped{f'; {stop}' if str(stop) else ''}")
        return STOPPED
    except BrokenPipeError:
        # Whoever read our output has had enough (`pdtr recipes | head -1`); the flush at exit must not fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        # Asked whatever the answer is good for: once a process has spoken, the others do not say that they lost it.
        is_ours = speaks(error)
        if not is_mistake(error) or os.environ.get("PDTR_TRACEBACK", "") not in ("", "0"):
            raise
        if is_ours:
            _complain(explain(error))
        return MISTAKE


def usage() -> str:
    """What ``pdtr --help`` prints."""
    rows = [(f"pdtr {name} {arguments}".rstrip(), summary) for name, (_, arguments, summary) in COMMANDS.items()]
    width = max(len(left) for left, _ in rows) + 2
    lines = [f"  {left:<{width}}{summary}" for left, summary in rows]
    return "\n".join(
        [
            "Online reinforcement learning for image generators: curricula over editing and text-to-image.",
            "",
            *lines,
            "",
            "pdtr COMMAND --help lists a command's flags, pdtr train RECIPE --help a recipe's.",
        ]
    )


def is_mistake(error: BaseException) -> bool:
    """Whether an error is about what was asked for: a value, a path, a damaged file, a full disk."""
    safetensors = sys.modules.get("safetensors")
    # A damaged file of weights: safetensors' own exception derives from nothing but Exception.
    damaged: tuple[type[BaseException], ...] = () if safetensors is None else (safetensors.SafetensorError,)
    return isinstance(error, (ValueError, OSError, *damaged))


def explain(error: BaseException) -> str:
    """An error as one line."""
    text = " ".join(str(error).split()) or type(error).__name__
    if type(error).__name__ == "SafetensorError":
        return f"a file of weights (*.safetensors) could not be read or written: {text}"
    if not isinstance(error, OSError) or error.strerror is None:
        return text
    where = f"{os.fspath(error.filename)!s}: " if error.filename is not None else ""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"{where}the disk is full ({error.strerror}); free some space, then go on (training: with --resume)"
    if isinstance(error, PermissionError):
        return f"{where}no permission ({error.strerror}); choose another folder or change its owner"
    return f"{where}{error.strerror}"


def _dispatch(arguments: list[str]) -> None:
    if not arguments:
        raise ValueError(f"expected a command, one of {', '.join(COMMANDS)}; see pdtr --help")
    name, rest = arguments[0], arguments[1:]
    if name in ("-h", "--help", "help"):
        print(usage())
    elif name in ("-V", "--version"):
        from pdtr import __version__

        print(f"pdtr {__version__}")
    elif name in COMMANDS:
        if num_processes() > 1 and name not in SHARED:
            raise ValueError(
                f"{name}: expected one process, got {num_processes()}; processes share {', '.join(SHARED)} alone, so "
                f"type: {shlex.join(['pdtr', *arguments])}"
            )
        module, function = COMMANDS[name][0].split(":")
        getattr(import_module(module), function)(rest)
    else:
        nearest = difflib.get_close_matches(name, COMMANDS, 1, cutoff=0.0)[0]
        raise ValueError(f"expected a command, one of {', '.join(COMMANDS)}, got {name!r}; did you mean {nearest!r}?")


def _complain(line: str) -> None:
    # The terminal may be gone, which is no reason for a traceback.
    try:
        sys.stdout.flush()
        print(f"pdtr: {line}", file=sys.stderr, flush=True)
    except OSError:
        pass


if __name__ == "__main__":
    sys.exit(main())
