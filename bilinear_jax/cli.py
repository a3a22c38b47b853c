"""The command ``bilinear-jax``."""

import argparse
import inspect
import sys

EXAMPLES = """examples:
  bilinear-jax tour                 the language chapter on the model that ships with the package
  bilinear-jax tour --out figures   the same, with its figures in figures/
"""


def main(arguments: list[str] | None = None) -> int:
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
    options = vars(parser.parse_args(arguments))
    run, debug, _ = options.pop("run"), options.pop("debug"), options.pop("command")
    try:
        run(**options)
    except (OSError, ValueError) as error:
        if debug:
            raise
        print(f"bilinear-jax: {inspect.cleandoc(str(error))}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("bilinear-jax: interrupted", file=sys.stderr)
        return 1
    return 0


def _tour(**options) -> None:
    from bilinear_jax.tour import tour

    tour(**options)
