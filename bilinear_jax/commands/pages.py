"""``bilinear-jax pages``: write a static site of feature pages."""

import argparse
import dataclasses
import shlex
from typing import Any

from bilinear_jax.commands import common

HELP = "write a page for each of many output features, and an index, to open in a browser"
EXAMPLES = """examples:
  bilinear-jax pages --layer 2 --features top:200 --out site
      the 200 strongest output features of the model that ships with the package; open site/index.html
  bilinear-jax pages --model runs/mine/model --layer 1 --features 3,17,20-30 --data stories.txt.gz --out site --force
      some features of your own model, on your own text; this replaces an older site there
  bilinear-jax pages --layer 2 --features all --rows 2048 --contexts 20 --out site
      more rows of the dataset, and more contexts on each page
  bilinear-jax pages --layer 2 --features all --out site --neuronpedia batches
      also writes the output features as files for Neuronpedia's converter
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from bilinear_jax.pages.options import PageOptions
    from bilinear_jax.store.fields import field_comments

    common.add_model(parser)
    common.add_tracer(parser, use_encoder=False)
    common.add_data(parser)
    common.add_features(parser, "top:200")
    parser.add_argument(
        "--out", required=True, type=common.folder, help="the folder to write; it appears when it is complete"
    )
    parser.add_argument("--force", action="store_true", help="replace an older site or older batches there")
    help = "also write the output features as Neuronpedia's batch files; the folder appears when it is complete"
    parser.add_argument("--neuronpedia", type=common.folder, metavar="FOLDER", help=help)
    group, comments = parser.add_argument_group("how much the pages show"), field_comments(PageOptions)
    for field in dataclasses.fields(PageOptions):
        help = f"{comments[field.name]} (default: {field.default})"
        group.add_argument(f"--{field.name.replace('_', '-')}", type=int, default=field.default, metavar="N", help=help)
    common.add_json(parser)


def run(options: argparse.Namespace) -> dict[str, Any]:
    from bilinear_jax.explain.select import select_features
    from bilinear_jax.pages.options import PageOptions

    try:
        shown = PageOptions(**{field.name: getattr(options, field.name) for field in dataclasses.fields(PageOptions)})
    except ValueError as error:
        raise common.WrongUse(str(error)) from error
    from bilinear_jax.pages import gather, neuronpedia, site
    from bilinear_jax.store.files import check_place

    out = check_place(options.out, replace=site.KIND if options.force else None)  # before minutes of work
    batches = None
    if options.neuronpedia is not None:
        batches = check_place(options.neuronpedia, replace=neuronpedia.KIND if options.force else None)
        if out.path.is_relative_to(batches.path) or batches.path.is_relative_to(out.path):
            raise common.WrongUse("--out and --neuronpedia must be two folders, neither inside the other")
    lm = common.load_model(options)
    tracer = common.load_tracer(options, lm)
    features = select_features(options.features, tracer)
    tokens, dataset = common.load_tokens(options, lm)
    command = shlex.join(["bilinear-jax", *options.words])
    found = gather.gather(tracer, features, tokens=tokens, options=shown, command=command, dataset=dataset)
    index = site.write_site(found, out)
    result = {"index": str(index), "outputs": len(found.outputs), "inputs": len(found.inputs)}
    if batches is not None:
        activities, length = [page.activity for page in found.outputs], tokens.shape[1]
        of_dataset = {"dataset": dataset, "rows": found.provenance.rows, "tokens_per_row": length}
        result["neuronpedia"] = str(neuronpedia.export(lm, tracer.out, activities, batches, **of_dataset))
    return result


def text(result: dict[str, Any]) -> str:
    lines = [f"{result['index']}: pages of {result['outputs']} output and {result['inputs']} input features"]
    if "neuronpedia" in result:
        lines.append(f"{result['neuronpedia']}: the output features as Neuronpedia's batch files")
    return "\n".join(lines)
