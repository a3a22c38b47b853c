"""What mkdocs does for the API reference: the table of public names, and a check that no module is missing from it."""

import ast
import logging
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
MARK = "<!-- public names -->"
LEFT_OUT = r"bilinear_jax\.(commands|facade|__main__)\b|weights_convert\.__main__"  # the command line has its own page
log = logging.getLogger("mkdocs.plugins.reference")  # a warning fails `mkdocs build --strict`


def file_of(module: str) -> Path:
    """The file of a module or a package."""
    path = ROOT / module.replace(".", "/")
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def first_sentence(module: str, name: str | None) -> str:
    """The first line of the docstring of a module, or of a class or function that it defines."""
    node: ast.AST = ast.parse(file_of(module).read_text())
    if name is not None:
        found = [each for each in ast.iter_child_nodes(node) if getattr(each, "name", None) == name]
        if not found:
            return ""
        node = found[0]
    lines = (ast.get_docstring(node) or "").split("\n\n")[0].splitlines()
    return " ".join(line.strip() for line in lines).replace("|", "\\|")


def public_names() -> str:
    """A table of what ``bilinear_jax.facade`` imports: each name, a link to it, and what it is."""
    rows = []
    for node in ast.parse((ROOT / "bilinear_jax" / "facade.py").read_text()).body:
        if isinstance(node, ast.ImportFrom) and node.module is not None:
            for name in (alias.name for alias in node.names):
                is_module = file_of(f"{node.module}.{name}").exists()
                said = first_sentence(*((f"{node.module}.{name}", None) if is_module else (node.module, name)))
                said = re.sub(r"``([^`]*)``", r"`\1`", said)
                link = (
                    f"[{node.module}.{name}]" if node.module != "bilinear_jax" else f"({name}.md)"
                )  # a room: its page
                rows.append((name.lower(), f"| [`bj.{name}`]{link} | {said} |"))
    return "\n".join(["| name | what it is |", "|---|---|", *(row for _, row in sorted(rows))])


def on_page_markdown(markdown, page, config, files):
    """Put the table in its place (mkdocs calls this)."""
    return markdown.replace(MARK, public_names()) if MARK in markdown else markdown


def on_files(files, config):
    """Warn of modules that no page shows (mkdocs calls this)."""
    shown = set()
    for file in files.documentation_pages():
        if file.src_uri.startswith("api/"):
            shown |= set(re.findall(r"^::: (\S+)$", file.content_string, flags=re.MULTILINE))
    for package in ("bilinear_jax", "weights_convert"):
        for path in (ROOT / package).rglob("*.py"):
            module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            if path.name != "__init__.py" and not re.match(LEFT_OUT, module) and module not in shown:
                log.warning(f"no page of docs/api shows {module}")
    return files
