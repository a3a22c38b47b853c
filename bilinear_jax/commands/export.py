"""``bilinear-jax export``: write checkpoints in the published torch layout."""

import argparse
from typing import Any

from bilinear_jax.commands import common

HELP = "write a model, and its SAEs, in the published layout, for the original torch code"
EXAMPLES = """examples:
  bilinear-jax export runs/mine/model mine
      mine/config.json and mine/model.safetensors, in float32; bilinear-jax convert reads it back, bit for bit
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
    from bilinear_jax.store.convert import export

    scope = common.scope_source(options)
    names = export(options.source, options.out, scope, repo=options.repo, attn_scale=options.attn_scale)
    return {"out": str(options.out), "saes": names}


def text(result: dict[str, Any]) -> str:
    names = result["saes"]
    return f"{result['out']}: the model" + (f"; {result['out']}-scope: {', '.join(names)}" if names else "")
