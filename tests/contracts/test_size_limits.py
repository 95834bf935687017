"""The limits on size, over the five packages: what does not fit is split."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60  # Without the docstring.
MAX_NESTING = 4
MAX_PARAMETERS = 6  # Without self or cls.

Function = ast.FunctionDef | ast.AsyncFunctionDef
NESTS = (ast.For, ast.AsyncFor, ast.While, ast.If, ast.With, ast.AsyncWith, ast.Try, ast.TryStar, ast.Match)


def docstring_lines(function: Function) -> int:
    if ast.get_docstring(function, clean=False) is None:
        return 0
    first = function.body[0]
    return (first.end_lineno or first.lineno) - first.lineno + 1


def function_lines(function: Function) -> int:
    return (function.end_lineno or function.lineno) - function.lineno + 1 - docstring_lines(function)


def parameters(function: Function, in_class: bool) -> int:
    arguments = function.args
    count = len(arguments.posonlyargs) + len(arguments.args) + len(arguments.kwonlyargs)
    count += (arguments.vararg is not None) + (arguments.kwarg is not None)
    is_static = any(ast.unparse(decorator) == "staticmethod" for decorator in function.decorator_list)
    return count - (in_class and not is_static)


def is_elif(child: ast.AST, parent: ast.AST) -> bool:
    """An elif is stored as an if inside the else branch, at its parent's column; it reads as one level."""
    return (
        isinstance(child, ast.If)
        and isinstance(parent, ast.If)
        and child in parent.orelse
        and child.col_offset == parent.col_offset
    )


def deep_blocks(node: ast.AST, depth: int = 0) -> Iterator[tuple[int, int]]:
    """Line and depth of every block that opens deeper than the limit; a function or a class starts again from 0."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, Function | ast.ClassDef):
            yield from deep_blocks(child)
            continue
        below = depth + (isinstance(child, NESTS) and not is_elif(child, node))
        if below > max(depth, MAX_NESTING):
            yield child.lineno, below
        yield from deep_blocks(child, below)


def function_offenders(tree: ast.Module, path: Path) -> Iterator[str]:
    methods = {id(child) for node in ast.walk(tree) if isinstance(node, ast.ClassDef) for child in node.body}
    for function in (node for node in ast.walk(tree) if isinstance(node, Function)):
        where = f"{path}:{function.lineno} {function.name}"
        lines, count = function_lines(function), parameters(function, id(function) in methods)
        if lines > MAX_FUNCTION_LINES:
            yield f"{where}: {lines} lines without its docstring, at most {MAX_FUNCTION_LINES}"
        if count > MAX_PARAMETERS:
            yield f"{where}: {count} parameters, at most {MAX_PARAMETERS}; group them in a dataclass"


def offenders(source: str, path: Path) -> list[str]:
    tree = ast.parse(source)
    lines = len(source.splitlines())
    too_long = [f"{path}:1 {lines} lines, at most {MAX_FILE_LINES}"] if lines > MAX_FILE_LINES else []
    too_deep = [f"{path}:{line} nests {depth} deep, at most {MAX_NESTING}" for line, depth in deep_blocks(tree)]
    return [*too_long, *function_offenders(tree, path), *too_deep]


def test_sizes_are_within_the_limits(root: Path, source_files: list[Path]) -> None:
    found = [line for path in source_files for line in offenders((root / path).read_text("utf-8"), path)]
    assert not found, "\n" + "\n".join(found)


def nested(depth: int) -> str:
    """A function whose blocks nest `depth` deep."""
    lines = [f"{'    ' * (level + 1)}if value > {level}:" for level in range(depth)]
    return "\n".join(["def f(value):", *lines, "    " * (depth + 1) + "pass"])


ELIFS = "def f(value):\n    if value == 0:\n        pass\n" + "".join(
    f"    elif value == {number}:\n        pass\n" for number in range(1, 9)
)
DOCSTRING = '    """One.\n' + "\n" * 90 + '    """\n'


@pytest.mark.parametrize(
    ("source", "count"),
    [
        ("x = 1\n" * 400, 0),
        ("x = 1\n" * 401, 1),
        ("def f():\n" + "    x = 1\n" * 59, 0),
        ("def f():\n" + "    x = 1\n" * 60, 1),
        ("def f():\n" + DOCSTRING + "    x = 1\n" * 59, 0),
        ("async def f():\n" + DOCSTRING + "    x = 1\n" * 60, 1),
        ("def f(a, b, /, c, d, *, e, g): pass", 0),
        ("def f(a, b, /, c, d, *, e, g, h): pass", 1),
        ("def f(a, b, c, d, e, *rest, **more): pass", 1),
        ("class A:\n    def f(self, a, b, c, d, e, g): pass", 0),
        ("class A:\n    @staticmethod\n    def f(a, b, c, d, e, g, h): pass", 1),
        (nested(4), 0),
        (nested(5), 1),
        (ELIFS, 0),
        (nested(4).replace("pass", "try:\n" + " " * 24 + "pass\n" + " " * 20 + "finally:\n" + " " * 24 + "pass"), 1),
    ],
)
def test_the_limits_bite_where_they_say(source: str, count: int) -> None:
    assert len(offenders(source, Path("pdtr/example.py"))) == count
