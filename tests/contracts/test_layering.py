"""Imports point one way: experiments -> pdtr -> {envs, agents, rewards}, envs -> rewards; heavy ones wait."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

MAY_IMPORT = {
    "experiments": {"experiments", "pdtr", "envs", "agents", "rewards"},
    "pdtr": {"pdtr", "envs", "agents", "rewards"},
    "envs": {"envs", "rewards"},
    "agents": {"agents"},
    "rewards": {"rewards"},
}
OURS = {*MAY_IMPORT, "tests"}
HEAVY = {"torch", "diffusers", "transformers", "gymnasium", "matplotlib", "accelerate"}
STARTS_FAST = ("pdtr/__init__.py", "experiments/cli.py")
EXTRAS = {
    *("aiohttp", "httpx", "starlette", "uvicorn", "trl", "datasets", "pyarrow"),
    *("open_clip", "rapidocr", "onnxruntime", "vllm"),
}
NEVER = {"torchvision"}


def imported_modules(node: ast.AST, module: str) -> Iterator[str]:
    """Absolute names that one node imports; `module` is the dotted name that relative imports start from."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        parents = module.split(".")[: -node.level] if node.level else []
        yield ".".join([*parents, *([node.module] if node.module else [alias.name for alias in node.names])])
    elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
        called = ast.unparse(node.func)
        if called in {"importlib.import_module", "import_module", "__import__"}:
            yield str(node.args[0].value)


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) in {"TYPE_CHECKING", "typing.TYPE_CHECKING"}


def nodes_run_at_import(tree: ast.AST) -> Iterator[ast.AST]:
    """Nodes that run when the module is imported: not the bodies of functions, not what only a type checker reads."""
    for child in ast.iter_child_nodes(tree):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if is_type_checking(child):
            for alternative in child.orelse:
                yield alternative
                yield from nodes_run_at_import(alternative)
            continue
        yield child
        yield from nodes_run_at_import(child)


def roots_of(nodes: Iterator[ast.AST], module: str) -> Iterator[tuple[int, str]]:
    """Line and top-level package of every import among the nodes."""
    for node in nodes:
        for name in imported_modules(node, module):
            yield node.lineno, name.split(".")[0]


def module_name(path: Path) -> str:
    """Dotted name; a package's own file counts as `package.__init__`, so that one dot always means the same folder."""
    return ".".join(path.with_suffix("").parts)


def upward_imports(source: str, path: Path) -> list[str]:
    allowed = MAY_IMPORT[path.parts[0]]
    found = roots_of(ast.walk(ast.parse(source)), module_name(path))
    return [f"{path}:{line} imports {name}" for line, name in found if name in OURS - allowed]


def eager_imports(source: str, path: Path, banned: set[str]) -> list[str]:
    found = roots_of(nodes_run_at_import(ast.parse(source)), module_name(path))
    return [f"{path}:{line} imports {name} at the top" for line, name in found if name in banned]


def report(offenders: list[str]) -> None:
    assert not offenders, "\n" + "\n".join(offenders)


def test_imports_point_one_way(root: Path, source_files: list[Path]) -> None:
    report([line for path in source_files for line in upward_imports((root / path).read_text("utf-8"), path)])


def test_heavy_packages_are_imported_where_used(root: Path, source_files: list[Path]) -> None:
    start = [path for path in source_files if path.as_posix() in STARTS_FAST]
    assert len(start) == len(STARTS_FAST), f"expected {STARTS_FAST}, found {start}"
    report([line for path in start for line in eager_imports((root / path).read_text("utf-8"), path, HEAVY)])


def test_extras_are_imported_where_used(root: Path, source_files: list[Path]) -> None:
    report([line for path in source_files for line in eager_imports((root / path).read_text("utf-8"), path, EXTRAS)])


def test_torchvision_is_never_imported(root: Path, source_files: list[Path]) -> None:
    report(
        [
            f"{path}:{line} imports {name}"
            for path in source_files
            for line, name in roots_of(ast.walk(ast.parse((root / path).read_text("utf-8"))), module_name(path))
            if name in NEVER
        ]
    )


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("agents/learner.py", "import envs.spaces"),
        ("agents/learner.py", "def collect():\n    from rewards.base import Prompt"),
        ("agents/policies/sd3.py", "from ...rewards import base"),
        ("agents/__init__.py", "import importlib\nimportlib.import_module('pdtr.trainer')"),
        ("envs/prompts.py", "if TYPE_CHECKING:\n    from agents.types import Rollout"),
        ("rewards/base.py", "from tests import conftest"),
        ("pdtr/trainer.py", "try:\n    import experiments\nexcept ImportError:\n    pass"),
    ],
)
def test_an_upward_import_is_found(path: str, source: str) -> None:
    assert len(upward_imports(source, Path(path))) == 1


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("agents/policies/sd3.py", "from ..flow import interpolate\nfrom . import base\nimport torch"),
        ("envs/scenes/__init__.py", "from .grammar import Scene\nfrom rewards.base import Prompt"),
        ("experiments/cli.py", "from pdtr import config\nimport envs, agents, rewards"),
    ],
)
def test_a_downward_import_passes(path: str, source: str) -> None:
    assert upward_imports(source, Path(path)) == []


@pytest.mark.parametrize(
    ("source", "lines"),
    [
        ("import torch", [1]),
        ("try:\n    from torch import nn\nexcept ImportError:\n    raise", [2]),
        ("class Config:\n    import torch.nn", [2]),
        ("if TYPE_CHECKING:\n    import torch\nelse:\n    import torch", [4]),
        ("if TYPE_CHECKING:\n    import torch\ndef main():\n    import torch", []),
    ],
)
def test_an_eager_import_is_told_from_a_late_one(source: str, lines: list[int]) -> None:
    path = Path("pdtr/__init__.py")
    assert eager_imports(source, path, HEAVY) == [f"{path}:{line} imports torch at the top" for line in lines]
