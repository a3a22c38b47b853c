"""``bilinear-jax certify``: the bilinear form of a gated model, and how far it can be trusted."""

import argparse
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bilinear_jax.commands import common

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from bilinear_jax.training.distil import DistilRecipe

HELP = "replace the gates of a model by bilinear forms, and measure on held-out text what that changes"
EXAMPLES = """examples:
  bilinear-jax certify SmolLM2-135M-Instruct.Q4_1.gguf --data stories.txt
      a table with a line for each layer: fitted on three quarters of 64 rows of 256 tokens, measured on the last
  bilinear-jax certify path/to/a/llama --data stories.txt --held-out news.txt --rows 256 --figure certificate.png
      fitted on one text, measured on another, with a figure
  bilinear-jax certify path/to/a/llama --data stories.txt --sequential --out llama-bilinear
      fitted layer after layer, and saved with its certificate; then bilinear_jax.load("llama-bilinear")
  bilinear-jax certify path/to/a/llama --data stories.txt --sequential --distil 600 --run runs/llama
      then trained for 600 updates to do what the model does; the same command resumes it
"""
FORMAT, VERSION = "bilinear_jax.certificate", 1
NOTE = """R2: 1 - squared error / variance of the MLP's output; linear, shuffled: R2 of hidden units that are linear,
and of the form with the coefficients of its hidden units shuffled; loss added: in nats a token, with this layer alone
replaced, +- its standard error; removed: with its MLP replaced by the mean of its output instead; kept: tokens after
position 0 that keep the original MLP, because its output is massive there. Position 0 always keeps it."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    common.add_model(parser, named=True)
    common.add_data(parser, default=None)
    parser.add_argument(
        "--held-out",
        nargs="+",
        metavar="SOURCE",
        help="measure on this text, of the same kind as --data (default: on the last quarter of the rows of --data)",
    )
    rows = "use at most this many rows of --data (default: 64), and a quarter as many of --held-out"
    parser.add_argument("--rows", type=common.positive, default=64, help=rows)
    parser.add_argument("--seq", type=_length, default=256, metavar="N", help="tokens in a row (default: 256)")
    parser.add_argument("--layers", type=layers, default=None, help="3,17,20-29, or all (default: all)")
    parser.add_argument(
        "--sequential", action="store_true", help="fit each layer on what the replaced layers before it feed it"
    )
    steps = "then train the bilinear MLPs for this many updates (the first third each layer alone), in bfloat16 with "
    steps += "float32 weights, on the text after the rows of the fit"
    parser.add_argument("--distil", type=common.positive, metavar="STEPS", help=steps)
    parser.add_argument("--run", type=common.folder, help="folder for the checkpoints of --distil, which resumes there")
    tokens = "measure the loss of single layers on about this many tokens (default: 512)"
    parser.add_argument("--loss-tokens", type=common.positive, default=512, metavar="N", help=tokens)
    parser.add_argument("--batch-size", type=common.positive, default=8, help="rows in a batch (default: 8)")
    parser.add_argument("--figure", type=common.png, metavar="FILE.png", help="save a figure of the table")
    out = "folder for the form, as a checkpoint with the tokenizer, and for the result as JSON, certificate.json"
    parser.add_argument("--out", type=common.folder, help=out)
    parser.add_argument("--force", action="store_true", help="replace OUT, if it is a model of this library")
    common.add_json(parser)


def layers(text: str) -> list[int] | None:
    """The layers that a text names; None: all.

    Example:
        >>> layers("3,17,20-22")
        [3, 17, 20, 21, 22]
    """
    if text == "all":
        return None
    if not re.fullmatch(r"\d+(-\d+)?(,\d+(-\d+)?)*", text):
        raise argparse.ArgumentTypeError(f"cannot read {text!r}: name layers as '3,17,20-29' or 'all'")
    found = []
    for part in text.split(","):
        low, _, high = part.partition("-")
        found += range(int(low), int(high or low) + 1)
        if high and int(high) < int(low):
            raise argparse.ArgumentTypeError(f"the range {part} is empty: write {high}-{low}")
    return found


def _recipe(options: argparse.Namespace, lm) -> "DistilRecipe":
    from bilinear_jax.training.distil import DistilRecipe

    return DistilRecipe(
        options.distil,
        alone=options.distil // 3,
        n_ctx=min(DistilRecipe.n_ctx, lm.config.n_ctx),
        local=3.0,
        compute_dtype="bfloat16",
    )


def _rows_to_train(options: argparse.Namespace, lm) -> int:
    """How many rows of text after those of the fit the updates of --distil can see, each once."""
    if options.distil is None:
        return 0
    recipe = _recipe(options, lm)
    return recipe.steps * recipe.batch_size * recipe.n_ctx // options.seq


def _length(text: str) -> int:
    if (length := common.positive(text)) < 2:
        raise argparse.ArgumentTypeError("a row needs at least 2 tokens: position 0 is never measured")
    return length


def run(options: argparse.Namespace) -> dict[str, Any]:
    import numpy as np

    from bilinear_jax.measure.bilinear_form import bilinear_form
    from bilinear_jax.measure.quadratic import check_gated
    from bilinear_jax.store.checkpoint import MODEL
    from bilinear_jax.store.files import check_place, check_writable
    from weights_convert.files import expanded

    if (options.distil is None) != (options.run is None):
        raise common.WrongUse("--distil STEPS and --run FOLDER belong together: give both, or neither")
    place = None if options.out is None else check_place(options.out, replace=MODEL if options.force else None)
    figure = None if options.figure is None else expanded(options.figure)
    if figure is not None:
        check_writable(figure)
    lm = common.load_model(options)
    check_gated(lm)
    whole, data = common.load_tokens(options, lm, options.rows + _rows_to_train(options, lm), options.seq)
    tokens, name = whole[: options.rows], None
    if options.held_out is not None:
        held_out, name = common.load_tokens(options, lm, max(1, options.rows // 4), options.seq, "held_out")
        fit = tokens
    elif len(tokens) < 4:
        raise ValueError(
            f"{data} gives {len(tokens)} row{'s' * (len(tokens) > 1)} of {tokens.shape[1]} tokens, but at least 4 are "
            "needed to hold one out: give more text, shorter rows with --seq, or another text with --held-out"
        )
    else:
        fit, held_out = np.split(tokens, [len(tokens) - len(tokens) // 4])
    measured = {"batch_size": options.batch_size, "loss_tokens": options.loss_tokens}
    form = bilinear_form(lm, fit, layers=options.layers, held_out=held_out, sequential=options.sequential, **measured)
    about = {"model": str(options.model), "data": data, "held_out": name, "layers": options.layers}
    result = result_of(form, tokens.shape, sequential=options.sequential, **about)
    if options.distil is not None:
        from bilinear_jax.training.distil import distil

        stream = np.concatenate([fit, whole[options.rows :]]).ravel()
        form = distil(form, _recipe(options, lm), stream, held_out, options.run, certificate=measured)
        result |= {"distilled": options.distil, "before": result["certificate"]}
        result["certificate"] = form.certificate.as_json()
    if figure is not None:
        common.save_figure(figure_of(result), figure)
    if place is not None:
        _save(place, form, result)
    return result


def result_of(
    form,
    shape: tuple[int, ...],
    *,
    model: str,
    data: str,
    held_out: str | None = None,
    layers: list[int] | None = None,
    sequential: bool = False,
) -> dict[str, Any]:
    """The certificate of a form, and what it is of, as JSON. ``shape`` is that of the token ids, ``[rows, seq]``."""
    config = form.original.config
    return {
        **{"format": FORMAT, "version": VERSION, "model": model, "family": config.family, "gate": config.gate},
        **{"data": data, "held_out": held_out, "rows": shape[0], "seq": shape[1]},
        "layers": list(range(config.n_layer)) if layers is None else sorted(set(layers)),
        "sequential": sequential,
        "certificate": form.certificate.as_json(),
    }


def _save(place, form, result: dict[str, Any]) -> None:
    """Write the model of a form and its tokenizer as a checkpoint, with the result in the same folder."""
    from bilinear_jax.store.checkpoint import save_model
    from bilinear_jax.store.files import atomic_folder
    from bilinear_jax.store.published import hashes_of
    from bilinear_jax.store.version import library_version

    lm = form.lm
    names = ("data", "rows", "seq", "layers", "sequential", "distilled")
    made = {name: result[name] for name in names if name in result}
    origin = {
        "source": result["model"],
        "files": hashes_of(result["model"]),
        "bilinear_form": made,
        "written_by": f"bilinear-jax {library_version()}",
    }
    with atomic_folder(place) as partial:
        save_model(partial, lm.config, lm.params, tokenizer=lm.tokenizer_source, origin=origin)
        text = json.dumps(result, indent=2, allow_nan=False) + "\n"
        (partial / "certificate.json").write_text(text, encoding="utf-8")


def figure_of(result: dict[str, Any]) -> "Figure":
    """The figure of a result."""
    from bilinear_jax.show.figures import certificate

    found = result["certificate"]
    scores = {"form": found["form"], **found["controls"]}
    return certificate(
        {name: one["r2"] for name, one in scores.items()},
        {name: one["loss_added"] for name, one in scores.items()},
        found["loss_removed"],
        found["form"]["loss_added_error"],
        title=f"{Path(result['model']).name}, on {_measured_on(result)}",
    )


def text(result: dict[str, Any]) -> str:
    found = result["certificate"]
    form, controls = found["form"], found["controls"]
    fitted = ", layer after layer" * result["sequential"]
    lines = [
        f"{result['model']}: its MLPs, gated by {result['gate']}, as bilinear ones with a constant input",
        f"fitted on {result['data']} ({result['rows']} rows of {result['seq']} tokens"
        f"{'' if result['held_out'] else ', the last quarter held out'}){fitted}; measured on {_measured_on(result)}:",
        f"{found['tokens']:,} tokens, and {found['loss_tokens']:,} for the losses of single layers",
    ]
    if result["gate"] is None:
        lines[:2] = [
            f"{result['model']}: its MLPs are bilinear, so the model is its own form; nothing is left out",
            f"measured on {_measured_on(result)}:",
        ]
    titles = ["layer", "R2", *controls, "loss added", "+-", "removed", "kept"]
    rows = []
    for layer, removed in enumerate(found["loss_removed"]):
        r2 = [_number(one["r2"][layer]) for one in (form, *controls.values())]
        losses = [f"{form['loss_added'][layer]:+.4f}", f"{form['loss_added_error'][layer]:.4f}", f"{removed:+.4f}"]
        rows.append([layer, *r2, *losses, found["kept"][layer]])
    whole = [f"{name} {_added(one)}" for name, one in controls.items()]
    if "distilled" in result:
        whole.append(f"before {result['distilled']} updates of distillation {_added(result['before']['form'])}")
    lines += ["", common.columns(titles, rows), ""]
    lines += [
        f"all of them: loss added {_added(form)} nats a token; {', '.join(whole)}",
        f"the model's own loss: {found['loss']:.4f}",
        "",
        NOTE,
        "These numbers hold for text like this one.",
    ]
    return "\n".join(lines)


def _measured_on(result: dict[str, Any]) -> str:
    return result["held_out"] or f"the last quarter of {result['data']}"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _added(scores: dict[str, Any]) -> str:
    return f"{scores['loss_added_all']:+.4f} +- {scores['loss_added_all_error']:.4f}"
