"""``bilinear-jax convert``: convert the files of others to Orbax checkpoints."""

import argparse
from typing import Any

from bilinear_jax.commands import common

HELP = "write a published model and its SAEs, or dictionaries of other libraries, as checkpoints of this library"
EXAMPLES = """examples:
  bilinear-jax convert tdooms/fw-medium fw-medium --scope
      a model and its SAEs from the hub, bit for bit; then bilinear_jax.load("fw-medium")
  bilinear-jax convert path/to/a/folder converted --scope path/to/a/folder-scope --attn-scale 1
      from folders; OUT appears when it is complete
  bilinear-jax convert google/gemma-scope-2b-pt-res/layer_20/width_16k/average_l0_71 saes
      a dictionary of SAELens, Gemma Scope, sparsify or dictionary_learning, or a folder of them: saes/<name>
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    common.add_conversion(
        parser,
        source="a published model, or dictionaries of another library: a folder, or a hub name such as owner/name",
        out="the folder to write",
        scope="convert SAEs too, into OUT/scope",
    )
    parser.add_argument("--force", action="store_true", help="replace OUT, if it is a model of this library")
    about = "dictionaries of another library"
    parser.add_argument("--site", type=common.sae_site, help=f"of {about}: where they read, such as mlp-in")
    parser.add_argument("--layer", type=common.natural, help=f"of {about}: the layer of that site, from 0")
    parser.add_argument("--target", type=common.sae_site, help=f"of {about}: what transcoders reconstruct")
    common.add_json(parser)


def run(options: argparse.Namespace) -> dict[str, Any]:
    from bilinear_jax.store.convert import convert
    from bilinear_jax.store.convert_dictionaries import convert_dictionaries, holds_dictionaries

    placed = {name: getattr(options, name) for name in ("site", "layer", "target")}
    if any(value is not None for value in placed.values()) or holds_dictionaries(options.source):
        if options.scope is not None or options.attn_scale is not None:
            raise common.WrongUse(f"{options.source} holds dictionaries, no model: leave out --scope and --attn-scale")
        names = convert_dictionaries(options.source, options.out, **placed, force=options.force)
        return {"out": str(options.out), "dictionaries": names}
    scope = common.scope_source(options)
    names = convert(options.source, options.out, scope, attn_scale=options.attn_scale, force=options.force)
    return {"out": str(options.out), "saes": names}


def text(result: dict[str, Any]) -> str:
    if "dictionaries" in result:
        return f"{result['out']}: {', '.join(result['dictionaries'])}"
    names = result["saes"]
    return f"{result['out']}: the model" + (f" and {len(names)} SAEs: {', '.join(names)}" if names else "")
