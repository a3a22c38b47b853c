"""The command ``bilinear-jax``."""

import argparse
import inspect
import sys
from collections.abc import Sequence

EXAMPLES = """examples:
  bilinear-jax tour                 the language chapter on the model that ships with the package
  bilinear-jax tour --out figures   the same, with its figures in figures/
  bilinear-jax train lm ts-nano --data stories.txt.gz --out runs/ts-nano    a language model
  bilinear-jax train sae ts-nano --data stories.txt.gz --out runs/ts-nano   SAEs for it
"""

TRAIN = {
    "lm": """examples:
  bilinear-jax train lm ts-nano --data stories.txt.gz --out runs/ts-nano
      the text becomes tokens once; the same command again goes on where the run was interrupted;
      then bilinear_jax.load("runs/ts-nano/model")
  bilinear-jax train lm ts-nano --data stories.txt.gz --out runs/small --model.n_layer 2 --recipe.steps 100
      any field of the recipe can be given on the command line
  bilinear-jax train lm ts --data part-*.jsonl.gz more.parquet --out runs/ts --model.gate silu --data.field story
      several files, JSON lines or Parquet; a SwiGLU model
  bilinear-jax train lm fw-small --data hub:HuggingFaceFW/fineweb-edu:sample-100BT --out runs/fw --wandb bilinear
      a dataset of the hub, streamed; metrics to Weights & Biases as well as runs/fw/language/metrics.jsonl
  bilinear-jax train lm to-bilinear --model runs/ts/model --data stories.txt.gz --out runs/ts-bilinear
      fine-tuning after which the SwiGLU model is bilinear
""",
    "sae": """examples:
  bilinear-jax train sae ts-nano --data stories.txt.gz --out runs/ts-nano
      SAEs for the model in runs/ts-nano/model, saved in its folder scope/; their scores in runs/ts-nano/saes.json
  bilinear-jax train sae ts --model owner/name --data stories.txt.gz --out runs/scope --saes.layers 0,1 --saes.ks 10,30
      SAEs for any other model, saved in runs/scope/scope
""",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0, 1 (it ran and failed) or 2 (wrong use)."""
    parser = argparse.ArgumentParser(
        prog="bilinear-jax",
        description="Weight-based interpretability of bilinear networks.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    commands = parser.add_subparsers(dest="command", required=True)
    tour = commands.add_parser("tour", help="explain a feature of a language model from its weights")
    tour.add_argument("--out", default="tour", help="folder for the figures (default: tour)")
    tour.add_argument("--model", default="ts-nano", help="built-in name, folder or hub name (default: ts-nano)")
    tour.add_argument("--layer", type=int, default=2, help="the layer whose MLP is explained (default: 2)")
    tour.set_defaults(run=_tour)
    train = commands.add_parser("train", help="train a language model, or SAEs for one")
    kinds = train.add_subparsers(dest="kind", required=True, parser_class=_TrainParser)
    for kind, what in {"lm": "a language model", "sae": "SAEs for a language model"}.items():
        _add_train(kinds.add_parser(kind, help=what, description=f"Train {what} by a recipe.", kind=kind))
    words, overrides = _split_overrides(sys.argv[1:] if arguments is None else arguments, parser)
    options = vars(parser.parse_args(words))
    run, debug, command = options.pop("run"), options.pop("debug"), options.pop("command")
    if command == "train":
        options["overrides"] = overrides
    elif overrides:
        parser.error(f"unrecognized arguments: {' '.join(f'--{name}' for name in overrides)}")
    try:
        run(**options)
    except (OSError, ValueError, ImportError, ArithmeticError, RuntimeError) as error:
        if debug:
            raise
        print(f"bilinear-jax: {inspect.cleandoc(str(error))}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("bilinear-jax: interrupted", file=sys.stderr)
        return 1
    return 0


class _TrainParser(argparse.ArgumentParser):
    """Its help lists the recipes and their fields, which takes an import of everything."""

    def __init__(self, *, kind: str, **options):
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, **options)
        self._kind = kind

    def format_help(self) -> str:
        from bilinear_jax.training.recipes import describe, recipe_names

        names = ", ".join(recipe_names(self._kind))
        self.epilog = f"{TRAIN[self._kind]}\nrecipes: {names}\n\nfields of a recipe:\n{describe(self._kind)}\n"
        return super().format_help()


def _add_train(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", help="the name of a recipe, or a file that ends in .toml")
    parser.add_argument(
        "--data",
        nargs="+",
        required=True,
        metavar="SOURCE",
        help=".txt (documents separated by <|endoftext|>), .txt.gz, .jsonl, .jsonl.gz or .parquet files, or "
        "hub:OWNER/NAME[:CONFIG[:SPLIT]]",
    )
    parser.add_argument("--out", required=True, help="folder of the run; with the same folder it goes on")
    parser.add_argument("--model", help="model to start from (lm), or to train SAEs for (sae; default: OUT/model)")
    parser.add_argument("--wandb", metavar="PROJECT", help="send the metrics to Weights & Biases as well")
    parser.set_defaults(run=_train)


def _split_overrides(arguments: Sequence[str], parser: argparse.ArgumentParser) -> tuple[list[str], dict[str, str]]:
    """The arguments without those of the form ``--table.field VALUE`` or ``--table.field=VALUE``, and these."""
    words, overrides, rest = [], {}, iter(arguments)
    for word in rest:
        name, equals, value = word.removeprefix("--").partition("=")
        if not word.startswith("--") or "." not in name:
            words.append(word)
            continue
        given = value if equals else next(rest, None)
        if given is None:
            parser.error(f"--{name} needs a value")
        overrides[name] = given
    return words, overrides


def _tour(**options) -> None:
    from bilinear_jax.tour import tour

    tour(**options)


def _train(kind: str, **options) -> None:
    from bilinear_jax.training import command
    from bilinear_jax.training.mesh import join_processes

    join_processes()
    (command.train_lm if kind == "lm" else command.train_sae)(**options)
