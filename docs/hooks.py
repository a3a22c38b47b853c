"""What mkdocs does here beside its plugins: it runs the chapters and the how-to guides, and shows what they print.

- ``examples/*.py`` become the pages ``tutorials/*.md``. A ``# %% [markdown]`` cell becomes text. A code cell becomes a
  block of code, then what it printed, then the figures that it saved.
- A page of ``docs/`` with ``run: true`` at its head is treated alike: its ``python`` blocks are run in one process, and
  so are the lines of its ``console`` blocks that begin with ``$``. Nothing else on such a page changes.
- Files that live elsewhere in the repository (``INCLUDED``) become pages.

A cell that fails, fails the build. Nothing is downloaded, and random numbers have fixed seeds, so that a page says the
same each time. What ran is kept in ``.cache/docs`` and run again only if the page or the package has changed.
"""

import contextlib
import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from textwrap import indent

ROOT = Path(__file__).parents[1]
CACHE = ROOT / ".cache" / "docs"
RESULTS = ".results.json"
CHAPTERS: dict[str, list[str] | None] = {  # options of each script; None: shown, and not run
    "toy": [],
    "images": [],
    "language": [],
    "decomposition": [],
    "training": None,
}
INCLUDED = {
    "changelog.md": "CHANGELOG.md",
    "contributing.md": "CONTRIBUTING.md",
    "ts-nano.md": "bilinear_jax/pretrained/ts-nano/card.md",
}
Cells = list[tuple[str, str]]  # (kind, source); kinds: markdown, python, folded (python that few read), console


def cells_of_script(source: str) -> Cells:
    """The cells of a script in the percent format; a code cell with a title is folded below it."""
    cells = []
    for part in re.split(r"^# %%", source, flags=re.MULTILINE)[1:]:
        title, _, body = part.partition("\n")
        if title.strip() == "[markdown]":
            cells.append(("markdown", re.sub(r"^# ?", "", body, flags=re.MULTILINE).strip()))
        else:
            cells.append(("folded", f"#{title}\n{body.strip()}") if title.strip() else ("python", body.strip()))
    return cells


def cells_of_page(text: str) -> Cells:
    """The cells of a Markdown page: its ``python`` and ``console`` blocks, and what stands between them."""
    parts = re.split(r"^```(python|console)\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
    cells = [("markdown", parts[0].strip())]
    for kind, source, after in zip(parts[1::3], parts[2::3], parts[3::3], strict=True):
        cells += [(kind, source.strip()), ("markdown", after.strip())]
    return cells


def page_of(cells: Cells, results: list[dict] | None, stem: str) -> str:
    """The Markdown of some cells, with what they printed and saved; figures are named ``stem-figure``."""
    blocks = []
    for (kind, source), result in zip(cells, results or [{}] * len(cells), strict=True):
        if kind == "markdown":
            blocks.append(source)
            continue
        if kind == "folded":
            title, _, code = source.partition("\n")
            blocks.append(f'??? note "{title.strip("# ")}"\n\n' + indent(f"``` python\n{code}\n```", "    "))
        else:
            blocks.append(f"``` {kind}\n{source}\n```")
        if printed := result.get("printed"):
            wrap = " .wrap" if max(map(len, printed.splitlines())) > 150 else ""  # text, and no table
            blocks.append(f"~~~~ {{ .text .output .no-copy{wrap} }}\n{printed}\n~~~~")
        blocks += [f"![The figure {name}, made by the code above]({stem}-{name})" for name in result.get("figures", [])]
    return "\n\n".join(blocks) + "\n"


def run_cells(cells: Cells, script: str, options: list[str]) -> list[dict]:
    """Run the cells here, one after another: what each printed, and which ``*.png`` of this folder it wrote."""
    sys.argv = [script, *options]
    names: dict = {"__name__": "__main__"}
    results, seen = [], {}
    for number, (kind, source) in enumerate(cells):
        printed = io.StringIO()
        if kind in ("python", "folded"):
            with contextlib.redirect_stdout(printed):
                exec(compile(source, f"{script}, cell {number}", "exec"), names)
        elif kind == "console":
            for command in re.findall(r"^\$ ((?:.*\\\n)*.*)", source, flags=re.MULTILINE):
                command = re.sub(r"^bilinear-jax\b", f"{sys.executable} -m bilinear_jax", command)
                done = subprocess.run(command, shell=True, text=True, capture_output=True)
                if done.returncode:
                    raise RuntimeError(f"$ {command}\n{done.stderr}")
                printed.write(done.stdout)
        now = {path.name: path.stat().st_mtime_ns for path in Path().glob("*.png")}
        figures = sorted((name for name in now if now[name] != seen.get(name)), key=lambda name: now[name])
        seen, text = now, printed.getvalue().replace(f"{Path.cwd()}/", "")
        results.append({"printed": "\n".join(map(str.rstrip, text.rstrip().splitlines())), "figures": figures})
    return results


def run_cached(name: str, cells: Cells, options: list[str]) -> tuple[list[dict], Path]:
    """``run_cells`` in a process and a folder of its own, or what it gave before; and the folder of the figures."""
    sources = sorted(path for room in ("bilinear_jax", "weights_convert") for path in (ROOT / room).rglob("*.*"))
    digest = hashlib.sha256(json.dumps([cells, options]).encode())
    for path in [Path(__file__), *sources]:
        if path.is_file() and path.suffix != ".pyc":
            digest.update(path.read_bytes())
    folder = CACHE / f"{name}-{digest.hexdigest()[:16]}"
    if not (folder / RESULTS).exists():
        print(f"running {name}", file=sys.stderr, flush=True)
        offline = {"JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1", "MPLBACKEND": "Agg", "COLUMNS": "96"}
        with tempfile.TemporaryDirectory() as work:
            task, given = json.dumps([cells, f"{name}.py", options]), os.environ.get("PYTHONPATH")
            env = os.environ | offline | {"PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), given]))}
            command = [sys.executable, __file__]
            done = subprocess.run(command, input=task, text=True, capture_output=True, cwd=work, env=env)
            if done.returncode:
                raise RuntimeError(f"{name} does not run:\n{done.stderr}")
            for old in CACHE.glob(f"{name}-*"):
                shutil.rmtree(old)
            folder.mkdir(parents=True)
            for made in [*Path(work).glob("*.png"), Path(work) / RESULTS]:
                shutil.copy(made, folder)
    return json.loads((folder / RESULTS).read_text()), folder


def chapter(name: str, options: list[str] | None) -> tuple[str, list[tuple[str, Path]]]:
    """The Markdown of an example, and its figures: their names and files."""
    script = ROOT / "examples" / f"{name}.py"
    cells = cells_of_script(script.read_text())
    results, files, made = None, [(f"{name}.py", script)], "It was not run for this page"
    if options is not None:
        results, folder = run_cached(name, cells, options)
        files += [(f"{name}-{path.name}", path) for path in folder.glob("*.png")]
        made = f"The output is that of `{' '.join(['python', f'examples/{name}.py', *options])}`"
    heading, _, rest = cells[0][1].partition("\n")
    made = f"*The code is [`examples/{name}.py`]({name}.py). {made}.*{{ .made-by }}"
    cells[0] = ("markdown", f"{heading}\n\n{made}\n{rest}")
    return page_of(cells, results, name), files


def included(path: Path) -> str:
    """The text of a file of the repository, with its links as seen from ``docs/``; those that lead out are cut."""

    def link(match: re.Match) -> str:
        label, target = match.groups()
        if re.match(r"[a-z]+:|#", target):
            return match.group()
        inside = os.path.relpath((path.parent / target).resolve(), ROOT / "docs")
        return label if inside.startswith("..") else f"[{label}]({inside})"

    return re.sub(r"(?<![\w\])])\[([^]]*)\]\(([^)\s]+)\)", link, path.read_text())


def on_files(files, config):
    """Add the pages that are made here (mkdocs calls this)."""
    from mkdocs.exceptions import PluginError
    from mkdocs.structure.files import File

    pages = {}
    for file in files.documentation_pages():
        head, _, text = file.content_string.partition("\n---\n")
        if head.startswith("---\n") and "\nrun: true" in head:
            pages[file.src_uri] = (head, cells_of_page(text))

    def guide(uri: str) -> tuple[str, list[tuple[str, Path]]]:
        head, cells = pages[uri]
        stem = Path(uri).stem
        results, folder = run_cached(stem, cells, [])
        text = f"{head}\n---\n{page_of(cells, results, stem)}"
        return text, [(f"{stem}-{path.name}", path) for path in folder.glob("*.png")]

    try:
        with ThreadPoolExecutor(2) as pool:  # most of the time is compilation, which keeps one core busy
            chapters = {f"tutorials/{name}.md": pool.submit(chapter, name, CHAPTERS[name]) for name in CHAPTERS}
            guides = {uri: pool.submit(guide, uri) for uri in pages}
        made = {uri: task.result() for uri, task in (chapters | guides).items()}
    except RuntimeError as error:
        raise PluginError(str(error)) from error
    made |= {uri: (included(ROOT / path), []) for uri, path in INCLUDED.items()}
    for uri, (text, extra) in made.items():
        if uri in pages:
            files.remove(files.src_uris[uri])
        files.append(File.generated(config, uri, content=text))
        for name, path in extra:
            files.append(File.generated(config, f"{Path(uri).parent}/{name}", abs_src_path=str(path)))
    return files


if __name__ == "__main__":
    Path(RESULTS).write_text(json.dumps(run_cells(*json.loads(sys.stdin.read()))))
