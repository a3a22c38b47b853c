"""What several commands share: options, what they load, and how they print a table."""

import argparse
import math
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from bilinear_jax.fields import SEED

SENTENCE = "Once upon a time, there was a cat."


class WrongUse(Exception):
    """The command line itself is wrong, as can be seen without loading anything: exit status 2."""


class Parser(argparse.ArgumentParser):
    """Examples as they are written, no abbreviated options, and errors of one line."""

    def __init__(self, **options):
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"bilinear-jax: error: {message} (see {self.prog} --help)\n")


# Options


def add_debug(parser: argparse.ArgumentParser) -> None:
    """It may stand before the command, and after it."""
    parser.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help="show an error's traceback")


def add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON, and nothing else, to the standard output")


def add_model(parser: argparse.ArgumentParser, *, measured_scale: bool = False) -> None:
    parser.add_argument("--model", default="ts-nano", help="built-in name, folder or hub name (default: ts-nano)")
    help = "factor on the attention's output, over what the files say"
    if measured_scale:
        help += "; auto: whichever of 1 and 1/sqrt(2 n_layer) gives the lower loss, and says both"
    parser.add_argument("--attn-scale", type=scale_or_auto if measured_scale else scale, metavar="X", help=help)
    parser.add_argument(
        "--verbose", action="store_true", help="say on the standard error what was loaded, and decode a line"
    )


def add_tracer(parser: argparse.ArgumentParser, *, use_encoder: bool = True) -> None:
    """The arguments of ``Tracer``; its ``inp`` and ``out`` are --inp-sae and --out-sae, for --out names a folder."""
    parser.add_argument("--layer", type=natural, required=True, help="the layer whose MLP is explained, from 0")
    choice = "site=SITE,expansion=X,k=K,tag=TAG, each only where several SAEs would fit"
    parser.add_argument("--inp-sae", type=sae_choice, metavar="CHOICE", help=f"the input SAE: {choice}")
    parser.add_argument("--out-sae", type=sae_choice, metavar="CHOICE", help=f"the output SAE: {choice}")
    parser.add_argument("--scope", help="folder or hub name of the SAEs (default: where the model's own are)")
    if use_encoder:
        parser.add_argument(
            "--use-encoder",
            action=argparse.BooleanOptionalAction,
            default=True,
            help="explain what makes a feature fire (its encoder row), or what it stands for (its decoder column)",
        )


def add_features(parser: argparse.ArgumentParser, default: str) -> None:
    help = f"output features: top:200 (the strongest), 3,17,20-30, or all (default: {default})"
    parser.add_argument("--features", type=features, default=default, help=help)


def add_data(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--data",
        nargs="+",
        metavar="SOURCE",
        help="text: .txt (documents separated by <|endoftext|>), .txt.gz, .jsonl, .jsonl.gz or .parquet files or "
        "hub:OWNER/NAME[:CONFIG[:SPLIT]]; or token ids [rows, seq] in one .npy file or, with --field input_ids, in a "
        "Parquet file, a folder of such, or a hub dataset OWNER/NAME (default: the corpus that lies beside the model)",
    )
    parser.add_argument("--field", default="text", help="where JSONL, Parquet and hub datasets have it (default: text)")


def add_conversion(parser: argparse.ArgumentParser, source: str, out: str, scope: str) -> None:
    """SOURCE, OUT and --scope, each with its help, and the factor on the attention's output."""
    parser.add_argument("source", metavar="SOURCE", help=source)
    parser.add_argument("out", metavar="OUT", type=Path, help=out)
    help = f"{scope}: all those of SCOPE_SOURCE (default: the model's own)"
    parser.add_argument("--scope", nargs="?", const=True, metavar="SCOPE_SOURCE", help=help)
    parser.add_argument("--attn-scale", type=scale, metavar="X", help="factor on the attention's output")


def scope_source(options: argparse.Namespace) -> str | None:
    """What --scope names: a source, the model's own if it stands alone, or nothing."""
    return options.source if options.scope is True else options.scope


def natural(text: str) -> int:
    return _whole(text, 0)


def positive(text: str) -> int:
    return _whole(text, 1)


def _whole(text: str, least: int) -> int:
    if not re.fullmatch(r"\d+", text) or int(text) < least:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number of at least {least}")
    return int(text)


def scale(text: str) -> float:
    try:
        if math.isfinite(value := float(text)):
            return value
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"{text!r} is no finite number")


def scale_or_auto(text: str) -> float | str:
    return text if text == "auto" else scale(text)


def features(text: str) -> str:
    """A text of the form that ``pages.options.select_features`` reads, once there are features to choose from."""
    from bilinear_jax.pages.options import parse_features

    try:
        parse_features(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return text


def seed(text: str) -> int:
    if not SEED.fits(number := _whole(text, 0)):
        raise argparse.ArgumentTypeError(f"a seed {SEED.says}, got {text}")
    return number


def unicode(text: str) -> str:
    """A text that is none, for the terminal or the shell gave bytes that aren't UTF-8, is a wrong use."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not UTF-8") from error
    return text


def sae_choice(text: str) -> dict[str, Any]:
    """``site=resid-mid,expansion=4,k=20`` as the ``inp`` or ``out`` of a ``Tracer``.

    Example:
        >>> sae_choice("site=resid-mid,k=20")
        {'site': 'resid-mid', 'k': 20}
    """
    kinds = {"site": _site, "expansion": positive, "k": positive, "tag": str}
    choice: dict[str, Any] = {}
    for part in text.split(","):
        name, equals, value = part.partition("=")
        if not equals or not value or name not in kinds or name in choice:
            raise argparse.ArgumentTypeError(f"{text!r} names no SAE: write for instance site=resid-mid,k=20")
        choice[name] = kinds[name](value)
    return choice


def _site(text: str) -> str:
    from bilinear_jax.nn.sae import site_name

    try:
        site_name(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return text


# What is loaded


def load_model(options: argparse.Namespace):
    from bilinear_jax.language import load

    lm = load(options.model, attn_scale=options.attn_scale)
    say_loaded(options, lm)
    return lm


def say_loaded(options: argparse.Namespace, lm) -> None:
    """What ``--verbose`` asks for."""
    if options.verbose:
        print(described(lm), file=sys.stderr)


def described(lm) -> str:
    """A model and its tokenizer in two lines, the second a sentence encoded and decoded again."""
    from bilinear_jax.training.data import tokenizer_hash

    config = lm.config
    kind = "bilinear" if config.bilinear and config.gate is None else f"gate {config.gate}"
    sizes = f"{config.n_layer} layers, d_model {config.d_model}, {config.n_vocab} tokens, context {config.n_ctx}"
    ids = lm.tokenizer(SENTENCE)["input_ids"]
    return (
        f"{lm.source}: {sizes}, {kind}, attn_scale {config.attn_scale:.6g}; tokenizer {config.tokenizer}, sha256 "
        f"{tokenizer_hash(lm.tokenizer)[:12]}\n{SENTENCE!r} -> {ids} -> {lm.tokenizer.decode(ids)!r}"
    )


def load_tracer(options: argparse.Namespace, lm):
    from bilinear_jax.tracer import Tracer

    use_encoder = getattr(options, "use_encoder", True)
    return Tracer(lm, options.layer, options.inp_sae, options.out_sae, use_encoder, options.scope)


def load_tokens(options: argparse.Namespace, lm, rows: int | None = None) -> tuple[Any, str]:
    """The token ids ``[rows, seq]`` that ``--data`` stands for, at most so many rows, and a name for them.

    Text is read and encoded as for training, and cut into rows. The last is filled up with padding; where the model
    has none, the name says what was left out. It says so too of token ids in rows longer than the context.
    """
    from bilinear_jax.datasets import COLUMN, load_token_rows

    if options.data is None:
        from bilinear_jax.checkpoint import corpus

        return corpus(options.model)[:rows], f"corpus.npy of {options.model}"
    name = ", ".join(source if source.startswith("hub:") else Path(source).name for source in options.data)
    ids = [source.endswith(".npy") or options.field == COLUMN for source in options.data]
    if not any(ids):
        return _in_rows(_tokenized(options, lm, rows), lm.config, rows, name)
    if len(ids) > 1:
        raise WrongUse("--data takes one source of token ids, or texts")
    found, width = load_token_rows(options.data[0])[:rows], lm.config.n_ctx
    if found.shape[1] > width:
        name += f" (the first {width} of the {found.shape[1]} tokens of each row)"
    return found[:, :width], name


def _in_rows(stream, config, rows: int | None, name: str) -> tuple[Any, str]:
    import numpy as np

    width = min(config.n_ctx, len(stream))
    over = len(stream) % width
    if over and (rows is None or len(stream) // width < rows):
        if config.pad_id is None:
            stream, name = stream[:-over], f"{name} (without its last {over} tokens, which fill no row)"
        else:
            stream = np.pad(stream, (0, width - over), constant_values=config.pad_id)
    return stream[: len(stream) // width * width].reshape(-1, width)[:rows], name


def _tokenized(options: argparse.Namespace, lm, rows: int | None):
    import tempfile

    import numpy as np

    from bilinear_jax.training.data import tokenize

    limit = None if rows is None else rows * lm.config.n_ctx
    with tempfile.TemporaryDirectory(prefix="bilinear-jax-") as folder:
        path = Path(folder) / "tokens"
        return np.array(tokenize(options.data, lm.tokenizer, path, field=options.field, max_tokens=limit).tokens)


# What is printed


def columns(titles: Sequence[str], rows: Iterable[Sequence[Any]], left: Iterable[str] = ()) -> str:
    """Rows as aligned text; the columns named in ``left`` are flush left, all others flush right.

    Example:
        >>> print(columns(["feature", "value"], [[7, "0.25"], [12, "-10.00"]]))
        feature   value
              7    0.25
             12  -10.00
    """
    table = [list(titles), *([str(cell) for cell in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    flush = [str.ljust if title in left else str.rjust for title in titles]
    lines = ("  ".join(f(cell, width) for f, cell, width in zip(flush, row, widths, strict=True)) for row in table)
    return "\n".join(line.rstrip() for line in lines)
