"""``bilinear-jax tour``: the language chapter in one call."""

import argparse

from bilinear_jax.commands import common

HELP = "explain a feature of a language model from its weights, step by step"
EXAMPLES = """examples:
  bilinear-jax tour
      the language chapter on the model that ships with the package; figures in tour/
  bilinear-jax tour --model tdooms/fw-medium --layer 7 --out figures
      a published model
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", default="tour", help="folder for the figures (default: tour)")
    parser.add_argument("--model", default="ts-nano", help="built-in name, folder or hub name (default: ts-nano)")
    parser.add_argument("--layer", type=common.natural, default=2, help="the layer whose MLP is explained (default: 2)")


def run(options: argparse.Namespace) -> None:
    from bilinear_jax.tour import tour

    tour(options.out, options.model, options.layer)
