"""``bilinear-jax generate``: text from a language model."""

import argparse
from typing import Any

from bilinear_jax.commands import common

HELP = "continue a prompt"
EXAMPLES = """examples:
  bilinear-jax generate --prompt "Once upon a time"
      60 tokens from the model that ships with the package
  bilinear-jax generate --model tdooms/fw-medium --prompt "The sea is" --temperature 0.7 --top-k 50 --seed 1
      a published model; the same seed gives the same text
  bilinear-jax generate --prompt "Tom said" --prompt "Lily said" --max-length 20 --temperature 0 --stop --json
      two prompts at once, the most likely token each time, up to the end of the text, as JSON

A terminal shows control characters of the text as symbols, such as ␛ for escape. If the output is not a terminal, but a
file or a pipe, the text is printed exactly.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    common.add_model(parser)
    parser.add_argument(
        "--prompt",
        type=common.unicode,
        action="append",
        required=True,
        metavar="TEXT",
        help="text to continue; give the option again for several",
    )
    parser.add_argument(
        "--max-length", type=common.positive, default=60, metavar="N", help="most new tokens (default: 60)"
    )
    parser.add_argument(
        "--temperature", type=common.scale, default=1.0, metavar="X", help="0: the most likely token (default: 1)"
    )
    parser.add_argument("--top-k", type=common.positive, metavar="N", help="sample among the N most likely tokens")
    parser.add_argument("--seed", type=common.seed, default=0, metavar="N", help="seed of the sampling (default: 0)")
    parser.add_argument("--stop", action="store_true", help="stop when the model ends the text")
    common.add_keep_end(parser)
    common.add_json(parser)


def run(options: argparse.Namespace) -> dict[str, Any]:
    if not options.temperature >= 0:
        raise common.WrongUse(f"--temperature must be at least 0, got {options.temperature}")
    names = ("max_length", "temperature", "top_k", "seed", "stop")
    sampling = {name: getattr(options, name) for name in names}
    texts = common.load_model(options).generate(options.prompt, keep_end=options.keep_end, **sampling)
    found = [{"prompt": prompt, "text": text} for prompt, text in zip(options.prompt, texts, strict=True)]
    return {"model": options.model, **sampling, "texts": found}


def text(result: dict[str, Any]) -> str:
    return "\n\n".join(entry["text"] for entry in result["texts"])
