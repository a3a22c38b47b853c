"""The rooms of the package: imports go one way, and there are few of them. Files are parsed; none is imported."""

import ast
import graphlib
import importlib.util
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

PACKAGE = "bilinear_jax"
ROOT = Path(importlib.util.find_spec(PACKAGE).origin).parent

ORDER = (
    "errors",
    "linalg",
    "tensor",
    "nn",
    "store",
    "language",
    "explain",
    "measure",
    "show",
    "pages",
    "images",
    "training",
    "facade",
    "__init__",
    "commands",
    "__main__",
)
"""Low to high. A room is a folder or a module of the package; ``__init__`` is the package itself, as in ``import
bilinear_jax``: what stands below it may not import the facade, and commands may."""


def read_package() -> dict[str, str]:
    """The source of every file, by its path in the package."""
    return {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in sorted(ROOT.rglob("*.py"))}


def room_of(path: str) -> str:
    """Of ``linalg/lanczos.py`` linalg, of ``tensor.py`` tensor."""
    return path.split("/")[0].removesuffix(".py")


def module_of(path: str) -> str:
    """The dotted name of a file: of ``linalg/__init__.py`` bilinear_jax.linalg."""
    return ".".join([PACKAGE, *path.removesuffix(".py").split("/")]).removesuffix(".__init__")


def imported(path: str, source: str) -> Iterator[tuple[str, tuple[str, ...]]]:
    """What a file imports from the package, wherever in the file: a module, and the names taken from it."""
    package = module_of(path) if path.endswith("__init__.py") else module_of(path).rpartition(".")[0]
    for node in ast.walk(ast.parse(source, path)):
        found: list[tuple[str, tuple[str, ...]]] = []
        match node:
            case ast.Import():
                found = [(one.name, ()) for one in node.names]
            case ast.ImportFrom():
                parts = package.split(".")
                base = parts[: len(parts) - node.level + 1] if node.level else []
                module = ".".join([*base, *([node.module] if node.module else [])])
                found = [(module, tuple(one.name for one in node.names))]
            case ast.Call(func=ast.Attribute(attr="import_module") | ast.Name(id="import_module" | "__import__")):
                found = [(one.value, ()) for one in node.args[:1] if isinstance(one, ast.Constant)]
        yield from ((module, names) for module, names in found if module.split(".")[0] == PACKAGE)


def rooms_imported(path: str, source: str) -> set[str]:
    """The rooms that a file imports from. A public name, as in ``from bilinear_jax import load``, is the facade's."""
    found = set()
    for module, names in imported(path, source):
        _, *below = module.split(".")
        if below:
            found.add(below[0])
        else:
            found |= {name if name in ORDER else "__init__" for name in names or ("__init__",)}
    return found


def against_the_order(sources: Mapping[str, str]) -> list[str]:
    """Every import from a room that isn't below the file's own; and every file of a room that has no place."""
    wrong = []
    for path, source in sources.items():
        room = room_of(path)
        if room not in ORDER:
            wrong.append(f"{path}: the room {room} has no place in ORDER")
            continue
        for other in sorted(rooms_imported(path, source) - {room}):
            if other not in ORDER:
                wrong.append(f"{path} imports {other}, which has no place in ORDER")
            elif ORDER.index(other) > ORDER.index(room):
                wrong.append(f"{path} imports {other}, which is above {room}")
    return wrong


def cycle(sources: Mapping[str, str]) -> list[str]:
    """Files that import each other in a circle, by their dotted names, the first once more at the end; else nothing."""
    modules = {module_of(path) for path in sources}
    graph: dict[str, set[str]] = {}
    for path, source in sources.items():
        needs = graph.setdefault(module_of(path), set())
        for module, names in imported(path, source):
            files = {name if name in modules else module for name in (f"{module}.{name}" for name in names)}
            needs |= (files or {module}) & modules
        needs.discard(module_of(path))
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return error.args[1]
    return []


def functions(source: str) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """The functions and methods of a file."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def with_both(source: str, first: str = "tracer", second: str = "lm") -> list[str]:
    """The public functions that have parameters of both names."""
    found = []
    for function in functions(source):
        arguments = function.args
        names = {one.arg for one in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)}
        if {first, second} <= names and (not function.name.startswith("_") or function.name.startswith("__")):
            found.append(function.name)
    return found


# The package


def test_imports_go_one_way():
    assert against_the_order(read_package()) == []


def test_no_files_import_each_other_in_a_circle():
    assert cycle(read_package()) == []


def test_the_package_is_few_rooms_and_few_modules():
    folders = {path.name for path in ROOT.iterdir() if path.is_dir()} - {"pretrained", "__pycache__"}
    modules = {path.stem for path in ROOT.glob("*.py")}
    assert len(folders) <= 12 and len(modules) <= 6
    assert folders | modules == set(ORDER)  # and none that ORDER names is gone


def test_every_room_says_what_it_holds():
    rooms = {path: source for path, source in read_package().items() if path.endswith("__init__.py")}
    assert {room_of(path) for path in rooms} >= {path.name for path in ROOT.iterdir() if path.name in ORDER}
    assert [path for path, source in rooms.items() if not (ast.get_docstring(ast.parse(source)) or "").strip()] == []


def test_a_function_takes_a_tracer_or_a_model_and_not_both():
    found = {path: with_both(source) for path, source in read_package().items()}
    assert {path: names for path, names in found.items() if names} == {}


# The checkers, on what they must find


@pytest.mark.parametrize(
    ("path", "line"),
    [
        ("linalg/lanczos.py", "from bilinear_jax.measure import evaluation"),
        ("linalg/lanczos.py", "from bilinear_jax.measure.evaluation import evaluate_saes"),
        ("linalg/lanczos.py", "from bilinear_jax import measure"),
        ("linalg/lanczos.py", "import bilinear_jax.measure.evaluation"),
        ("linalg/lanczos.py", "import jax, bilinear_jax.measure.evaluation as evaluation"),
        ("linalg/lanczos.py", "from ..measure import evaluation"),
        ("linalg/lanczos.py", "from .. import measure"),
        ("linalg/lanczos.py", "from ..measure.evaluation import evaluate_saes"),
        ("linalg/__init__.py", "from ..measure import evaluation"),
        ("training/recipes/__init__.py", "from ...commands import main"),
        ("linalg/lanczos.py", "def f():\n    from bilinear_jax.measure import evaluation"),
        ("linalg/lanczos.py", "def f():\n    import importlib\n    importlib.import_module('bilinear_jax.measure')"),
        ("linalg/lanczos.py", "if TYPE_CHECKING:\n    from bilinear_jax.measure import evaluation"),
        ("linalg/lanczos.py", "try:\n    from ..measure import evaluation\nexcept ImportError:\n    pass"),
        ("linalg/lanczos.py", "class A:\n    from ..measure import evaluation"),
        ("errors.py", "from bilinear_jax.tensor import BilinearTensor"),
        ("errors.py", "from .tensor import BilinearTensor"),
        ("language.py", "from bilinear_jax.explain import tracer"),
        ("store/convert.py", "from bilinear_jax import language"),
        ("training/runs.py", "import bilinear_jax as bj"),
        ("training/runs.py", "from bilinear_jax import load"),
        ("training/runs.py", "from .. import facade"),
        ("facade.py", "from bilinear_jax.commands import main"),
        ("facade.py", "import bilinear_jax"),
        ("linalg/lanczos.py", "from bilinear_jax.brand_new import something"),
    ],
)
def test_an_import_against_the_order_is_found(path, line):
    clean = {"linalg/lanczos.py": "", "measure/evaluation.py": "from bilinear_jax.linalg import lanczos", path: ""}
    assert against_the_order(clean) == []
    found = against_the_order(clean | {path: line})
    assert len(found) == 1 and found[0].startswith(f"{path} imports ")


@pytest.mark.parametrize(
    ("path", "line"),
    [
        ("linalg/lanczos.py", "from .ritz import values"),
        ("linalg/lanczos.py", "from bilinear_jax.linalg import ritz"),
        ("linalg/lanczos.py", "from . import ritz"),
        ("explain/spectra.py", "from .. import tensor"),
        ("linalg/lanczos.py", "import jax\nfrom jax import measure\nfrom measure import nothing"),
        ("linalg/lanczos.py", "'from bilinear_jax.measure import evaluation'  # from bilinear_jax import measure"),
        ("language.py", "from bilinear_jax.store.fields import SEED"),
        ("measure/evaluation.py", "import bilinear_jax.linalg.lanczos"),
        ("commands/trace.py", "import bilinear_jax as bj\nfrom bilinear_jax import load"),
        ("__init__.py", "from .facade import *"),
        ("__main__.py", "from bilinear_jax.commands.main import run"),
    ],
)
def test_an_import_down_the_order_is_none_of_them(path, line):
    assert against_the_order({path: line}) == []


def test_an_import_planted_in_the_package_itself_is_found():
    sources = read_package()
    path = next(path for path in sources if path.startswith("linalg/") and not path.endswith("__init__.py"))
    sources[path] += "\n\ndef planted():\n    from bilinear_jax.measure import evaluation\n"
    assert against_the_order(sources) == [f"{path} imports measure, which is above linalg"]


def test_a_room_without_a_place_is_found():
    assert against_the_order({"attic/box.py": ""}) == ["attic/box.py: the room attic has no place in ORDER"]


@pytest.mark.parametrize(
    "lines",
    [
        ("from bilinear_jax.nn import b", "from bilinear_jax.nn.c import f", "from bilinear_jax.nn import a"),
        ("from . import b", "from .c import f", "from .a import f"),
        ("import bilinear_jax.nn.b", "def f():\n    from bilinear_jax.nn import c", "from ..nn import a"),
        ("from . import b", "from . import c", "if TYPE_CHECKING:\n    from . import a"),
    ],
)
def test_a_circle_is_found(lines):
    sources = {f"nn/{name}.py": line for name, line in zip("abc", lines, strict=True)}
    found = cycle(sources | {"nn/__init__.py": "", "linalg/a.py": "from . import b", "linalg/b.py": ""})
    assert found[0] == found[-1] and set(found) == {f"bilinear_jax.nn.{name}" for name in "abc"}
    for path in sources:
        assert cycle(sources | {path: ""}) == []


def test_a_circle_through_a_folder_s_own_file_is_found():
    sources = {"nn/__init__.py": "from bilinear_jax.nn.a import f", "nn/a.py": "from bilinear_jax.nn import g"}
    assert set(cycle(sources)) == {"bilinear_jax.nn", "bilinear_jax.nn.a"}
    assert cycle(sources | {"nn/a.py": ""}) == []


def test_a_function_with_both_is_found():
    source = """
def account(tracer, tokens, feature): ...
def positional(lm, /, tracer): ...
def by_name(lm, *, tracer=None): ...
def _private(tracer, lm): ...
class Measurer:
    def __init__(self, tracer, lm): ...
    async def method(self, tracer, tokens, lm): ...
"""
    assert sorted(with_both(source)) == ["__init__", "by_name", "method", "positional"]
