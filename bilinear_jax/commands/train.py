"""``bilinear-jax train``: train a language model, or SAEs for one, with a recipe."""

import argparse
from collections.abc import Sequence

from bilinear_jax.commands import common

HELP = "train a language model, or SAEs for one"
EXAMPLES = """examples:
  bilinear-jax train lm ts-nano --data stories.txt.gz --out runs/ts-nano    a language model
  bilinear-jax train sae ts-nano --data stories.txt.gz --out runs/ts-nano   SAEs for it
  bilinear-jax train lm --help                                              all recipes, and their fields
"""
KINDS = {
    "lm": """examples:
  bilinear-jax train lm ts-nano --data stories.txt.gz --out runs/ts-nano
      the text is tokenised once; the same command again resumes an interrupted run;
      then bilinear_jax.load("runs/ts-nano/model")
  bilinear-jax train lm ts-nano --data stories.txt.gz --out runs/small --model.n_layer 2 --recipe.steps 100
      any field of the recipe can be given on the command line
  bilinear-jax train lm ts --data part-*.jsonl.gz more.parquet --out runs/ts --model.gate silu --data.field story
      several files, JSON lines or Parquet; a SwiGLU model
  bilinear-jax train lm fw-small --data hub:HuggingFaceFW/fineweb-edu:sample-100BT --out runs/fw --wandb bilinear
      a hub dataset, streamed; metrics go to Weights & Biases and to runs/fw/language/metrics.jsonl
  bilinear-jax train lm to-bilinear --model runs/ts/model --data stories.txt.gz --out runs/ts-bilinear
      fine-tuning that makes a SwiGLU model bilinear
""",
    "sae": """examples:
  bilinear-jax train sae ts-nano --data stories.txt.gz --out runs/ts-nano
      SAEs for the model in runs/ts-nano/model, saved in its folder scope/; their scores in runs/ts-nano/saes.json
  bilinear-jax train sae ts --model owner/name --data stories.txt.gz --out runs/scope --saes.layers 0,1 --saes.ks 10,30
      SAEs for another model, saved in runs/scope/scope
""",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="KIND", parser_class=_KindParser)
    for kind, what in {"lm": "a language model", "sae": "SAEs for a language model"}.items():
        each = kinds.add_parser(kind, help=what, description=f"Train {what} with a recipe.", kind=kind)
        each.add_argument("recipe", help="the name of a recipe, or a file that ends in .toml")
        each.add_argument(
            "--data",
            nargs="+",
            required=True,
            metavar="SOURCE",
            help=".txt (documents separated by <|endoftext|>), .txt.gz, .jsonl, .jsonl.gz or .parquet files, or "
            "hub:OWNER/NAME[:CONFIG[:SPLIT]]",
        )
        each.add_argument(
            "--out", type=common.folder, required=True, help="folder of the run; the same folder resumes it"
        )
        each.add_argument("--model", help="model to start from (lm), or to train SAEs for (sae; default: OUT/model)")
        common.add_general(each)
        each.add_argument("--wandb", metavar="PROJECT", help="also send the metrics to Weights & Biases")


class _KindParser(common.Parser):
    """Its help lists the recipes and their fields, which needs slow imports."""

    def __init__(self, *, kind: str, **options):
        super().__init__(**options)
        self._kind = kind

    def format_help(self) -> str:
        from bilinear_jax.training.recipes import describe, recipe_names

        names = ", ".join(recipe_names(self._kind))
        self.epilog = f"{KINDS[self._kind]}\nrecipes: {names}\n\nfields of a recipe:\n{describe(self._kind)}\n"
        return super().format_help()


def split_overrides(arguments: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Split the arguments into those of the form ``--table.field VALUE`` or ``--table.field=VALUE``, and all others.

    Example:
        >>> split_overrides(["lm", "ts", "--recipe.steps", "10", "--model.gate=silu"])
        (['lm', 'ts'], {'recipe.steps': '10', 'model.gate': 'silu'})
    """
    words, overrides, rest = [], {}, iter(arguments)
    for word in rest:
        name, equals, value = word.removeprefix("--").partition("=")
        if not word.startswith("--") or "." not in name:
            words.append(word)
            continue
        given = value if equals else next(rest, None)
        if given is None:
            raise common.WrongUse(f"--{name} needs a value")
        overrides[name] = given
    return words, overrides


def run(options: argparse.Namespace) -> None:
    from bilinear_jax.training import runs
    from bilinear_jax.training.mesh import join_processes
    from bilinear_jax.training.recipes import read_recipe

    if not options.recipe.endswith(".toml"):
        try:
            read_recipe(options.kind, options.recipe, options.overrides)
        except (FileNotFoundError, ValueError) as error:
            raise common.WrongUse(str(error)) from error
    join_processes()
    train = runs.train_language if options.kind == "lm" else runs.train_saes
    given = {"model": options.model, "overrides": options.overrides, "wandb": options.wandb}
    train(options.recipe, options.data, options.out, **given)
