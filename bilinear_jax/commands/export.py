"""``bilinear-jax export``: checkpoints of this library, or published ones, in the published torch layout."""

import argparse
import dataclasses
from pathlib import Path
from typing import Any

from bilinear_jax.commands import common

HELP = "write a model, and its SAEs, in the published layout, which the original's torch code reads"
EXAMPLES = """examples:
  bilinear-jax export runs/mine/model mine
      mine/config.json and mine/model.safetensors, in float32; bilinear-jax convert is the way back, bit for bit
  bilinear-jax export runs/mine/model mine --scope runs/mine-saes --repo someone/mine
      the SAEs too, in mine-scope, one folder each, as on the hub
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    common.add_conversion(
        parser,
        source="a model: a built-in name, a folder or a hub name",
        out="the folder to write; SAEs go to OUT-scope",
        scope="export SAEs too",
    )
    parser.add_argument("--repo", metavar="OWNER/NAME", help="the name under which the model will be published")
    common.add_json(parser)


def run(options: argparse.Namespace) -> dict[str, Any]:
    scope = common.scope_source(options)
    names = export(options.source, options.out, scope, repo=options.repo, attn_scale=options.attn_scale)
    return {"out": str(options.out), "saes": names}


def text(result: dict[str, Any]) -> str:
    names = result["saes"]
    return f"{result['out']}: the model" + (f"; {result['out']}-scope: {', '.join(names)}" if names else "")


def export(
    source: str | Path,
    out: str | Path,
    scope: str | Path | None = None,
    *,
    repo: str | None = None,
    attn_scale: float | None = None,
) -> list[str]:
    """Write a model, and the SAEs of ``scope``, in the published layout; returns the SAEs' names.

    ``out`` gets the model and the tokenizer that lies beside it, ``<out>-scope`` a folder for each SAE. Neither may
    exist, and each appears when it is whole.

    Raises:
        FileExistsError: if there is something at either place.
        ValueError: for what the layout can't say: see ``weights_convert.write_transformer`` and ``write_sae``.
    """
    import jax
    import numpy as np

    import weights_convert
    from bilinear_jax import checkpoint, folders

    out = Path(out).expanduser()
    places = [out] if scope is None else [out, out.with_name(f"{out.name}-scope")]
    for place in places:
        if place.exists() and not (place.is_dir() and not any(place.iterdir())):
            raise FileExistsError(f"{place} exists: name another OUT, or move it away")
        folders.check_place(place)
    files = checkpoint.load_model(source, attn_scale=attn_scale)
    named = [] if scope is None else checkpoint.list_saes(scope)
    if scope is not None and not named:
        raise FileNotFoundError(f"{scope} holds no SAEs: give --scope the folder or the hub name that does")
    names = []
    with folders.atomic_folder(out) as partial:
        config = dataclasses.asdict(files.config)
        weights_convert.write_transformer(partial, config, jax.tree.map(np.asarray, files.params), repo=repo)
        if files.tokenizer_source is not None:
            checkpoint.copy_tokenizer(Path(files.tokenizer_source), partial)
        if scope is not None:
            with folders.atomic_folder(places[1]) as partial_scope:
                for name in named:
                    sae = checkpoint.load_sae(scope, **name._asdict())
                    (partial_scope / sae.name).mkdir()
                    values = dataclasses.asdict(sae.config)
                    weights_convert.write_sae(partial_scope / sae.name, values, jax.tree.map(np.asarray, sae.params))
                    names.append(sae.name)
    return names
