"""The list of slow tests names tests that exist: a renamed one would be back in the fast run unnoticed."""

import ast
import functools
import importlib.util
from pathlib import Path

from slow import LIST

TESTS = Path(__file__).parent
PACKAGES = [Path(importlib.util.find_spec(name).origin).parent for name in ("bilinear_jax", "weights_convert")]


@functools.cache
def definitions(path: Path) -> set[str]:
    """The names of all functions and classes of a file."""
    kinds = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
    return {node.name for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, kinds)}


def test_every_entry_is_a_test_that_exists():
    files = [path for folder in (TESTS, *PACKAGES) for path in folder.rglob("*.py")]
    entries = LIST.read_text(encoding="utf-8").splitlines()
    assert entries == sorted(set(entries)) and entries
    unknown = []
    for entry in entries:
        file, *_, name = entry.replace("::", " ").split()
        found = [path for path in files if path.name == file]
        if not any(name.rpartition(".")[2] in definitions(path) for path in found):
            unknown.append(entry)
    assert unknown == []
