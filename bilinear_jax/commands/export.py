"""``bilinear-jax export``: write checkpoints in the published torch layout, or a dictionary for another library."""

import argparse
from typing import Any

from bilinear_jax.commands import common

HELP = "write a model and its SAEs for the original torch code, or a dictionary for another library"
EXAMPLES = """examples:
  bilinear-jax export runs/mine/model mine
      mine/config.json and mine/model.safetensors, in float32; bilinear-jax convert reads it back, bit for bit
  bilinear-jax export runs/mine/model mine --scope runs/mine-saes --repo someone/mine
      the SAEs too, in mine-scope, one folder each, as on the hub
  bilinear-jax export ts-nano lens --sae 2-mlp-in-x4-k20 --format saelens
      one dictionary as SAELens reads it; also gemma-scope, sparsify and dictionary_learning
"""

FORMATS = ("saelens", "gemma-scope", "sparsify", "dictionary_learning")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    common.add_conversion(
        parser,
        source="a model: a built-in name, a folder or a hub name; or the folder of a dictionary",
        out="the folder to write; SAEs go to OUT-scope",
        scope="export SAEs too",
    )
    parser.add_argument("--repo", metavar="OWNER/NAME", help="the name under which the model will be published")
    parser.add_argument("--format", choices=FORMATS, help="write one dictionary, as this library reads it")
    parser.add_argument("--sae", metavar="NAME", help="the dictionary of the model, such as 2-mlp-out-x4-k20")
    common.add_json(parser)


def run(options: argparse.Namespace) -> dict[str, Any]:
    from bilinear_jax.store.convert import export
    from bilinear_jax.store.convert_dictionaries import export_dictionary

    if options.sae is not None and options.format is None:
        raise common.WrongUse("--sae writes one dictionary: give --format too")
    if options.format is not None:
        if any(value is not None for value in (options.scope, options.repo, options.attn_scale)):
            raise common.WrongUse("--format writes one dictionary: leave out --scope, --repo and --attn-scale")
        name = export_dictionary(options.source, options.out, options.format, name=options.sae)
        return {"out": str(options.out), "saes": [name], "format": options.format}
    scope = common.scope_source(options)
    names = export(options.source, options.out, scope, repo=options.repo, attn_scale=options.attn_scale)
    return {"out": str(options.out), "saes": names}


def text(result: dict[str, Any]) -> str:
    names = result["saes"]
    if "format" in result:
        return f"{result['out']}: {names[0]}, for {result['format']}"
    return f"{result['out']}: the model" + (f"; {result['out']}-scope: {', '.join(names)}" if names else "")
