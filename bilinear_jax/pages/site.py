"""A site of feature pages as a folder of files that open without a network."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from bilinear_jax.pages import render
from bilinear_jax.pages.facts import Site
from bilinear_jax.show.html import static, style
from bilinear_jax.store.files import Kind, Place, atomic_folder, check_place

FORMAT = "bilinear_jax pages/1"
RECORD = "site.json"
KIND = Kind(RECORD, FORMAT)


def write_site(site: Site, out: Path | str | Place, *, force: bool = False) -> Path:
    """Write a site to a folder. The folder appears only when it is complete. The same site gives the same bytes.

        index.html, inputs.html          the tables of output and of input features
        output/7.html, input/12.html     one page per feature
        data/output-7.json, ...          the facts of a page, and where they are from
        site.json                        where the site is from, and which features it holds
        static/                          one style sheet and one script

    The pages need nothing from outside the folder. A progress bar shows on a terminal.

    Args:
        site: what ``gather`` returns.
        out: the folder; it must not exist, or it must be empty. Or a place that ``check_place`` returned earlier.
        force: replace an older site.

    Returns:
        The absolute path of the site's ``index.html``.

    Raises:
        FileExistsError: if the folder is not empty and ``force`` is off, or if it holds something else than a site; or
            if it changed meanwhile, as ``atomic_folder``.

    Example:
        >>> from bilinear_jax.pages.facts import Provenance
        >>> origin = Provenance("bilinear-jax pages", "0.1.0", "m", "", 2, "a", "", "b", "", "", "corpus", "", 1, 255)
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     index = write_site(Site([], [], origin), Path(folder) / "site")
        ...     sorted(path.name for path in index.parent.iterdir())
        ['data', 'index.html', 'input', 'inputs.html', 'output', 'site.json', 'static']
    """
    from tqdm.auto import tqdm

    target = check_place(out, replace=KIND if force else None)
    with atomic_folder(target) as folder:
        for name in ("output", "input", "data", "static"):
            (folder / name).mkdir()
        _write(folder / "static" / "style.css", style(static("parts.css"), static("style.css", render.ROOM)))
        _write(folder / "static" / "script.js", static("script.js", render.ROOM))
        _write(folder / "index.html", render.index_page(site))
        _write(folder / "inputs.html", render.inputs_page(site))
        origin = dataclasses.asdict(site.provenance)
        kinds = (("output", site.outputs, render.output_page), ("input", site.inputs, render.input_page))
        with tqdm(total=len(site.outputs) + len(site.inputs), desc="pages", disable=None) as progress:
            for kind, pages, page_of in kinds:
                for place, page in enumerate(pages):
                    feature = page.activity.feature
                    _write(folder / kind / f"{feature}.html", page_of(site, place))
                    facts = {"provenance": origin, kind: dataclasses.asdict(page)}
                    _write_json(folder / "data" / f"{kind}-{feature}.json", facts)
                    progress.update()
        held = {f"{kind}s": [page.activity.feature for page in pages] for kind, pages, _ in kinds}
        _write_json(folder / RECORD, {"format": FORMAT, "provenance": origin, **held})
    return target.path / "index.html"


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8", newline="\n")


def _write_json(path: Path, facts: Any) -> None:
    _write(path, json.dumps(facts, separators=(",", ":"), allow_nan=False) + "\n")
