"""``bilinear-jax convert``: convert published torch files to Orbax checkpoints."""

import argparse
from typing import Any

from bilinear_jax.commands import common

HELP = "write a published model, and its SAEs, as checkpoints of this library"
EXAMPLES = """examples:
  bilinear-jax convert tdooms/fw-medium fw-medium --scope
      a model and its SAEs from the hub, bit for bit; then bilinear_jax.load("fw-medium")
  bilinear-jax convert path/to/a/folder converted --scope path/to/a/folder-scope --attn-scale 1
      from folders; OUT appears when it is complete
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    common.add_conversion(
        parser,
        source="a published model: a folder, or a hub name such as owner/name",
        out="the folder to write",
        scope="convert SAEs too, into OUT/scope",
    )
    parser.add_argument("--force", action="store_true", help="replace OUT, if it is a model of this library")
    common.add_json(parser)


def run(options: argparse.Namespace) -> dict[str, Any]:
    from bilinear_jax.store.convert import convert

    scope = common.scope_source(options)
    names = convert(options.source, options.out, scope, attn_scale=options.attn_scale, force=options.force)
    return {"out": str(options.out), "saes": names}


def text(result: dict[str, Any]) -> str:
    names = result["saes"]
    return f"{result['out']}: the model" + (f" and {len(names)} SAEs: {', '.join(names)}" if names else "")
