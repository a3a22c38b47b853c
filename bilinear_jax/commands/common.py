"""What several commands share: options, loading, and printing a table."""

import argparse
import math
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from bilinear_jax.errors import UnknownNameError
from bilinear_jax.store.fields import SEED
from bilinear_jax.store.terminal import say

CORPUS = " (default: the corpus of the model)"
SENTENCE = "Once upon a time, there was a cat."


class WrongUse(Exception):
    """The command line itself is wrong, and this is clear before anything is loaded: exit status 2."""


class Parser(argparse.ArgumentParser):
    """A parser that keeps the layout of examples, has no abbreviated options, and prints errors in one line."""

    def __init__(self, **options):
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        say(f"bilinear-jax: error: {message} (see {self.prog} --help)", sys.stderr)
        self.exit(2)


# Options


def add_general(parser: argparse.ArgumentParser) -> None:
    """Add --debug and --no-cache, which may be before or after the command."""
    parser.add_argument(
        "--debug", action="store_true", default=argparse.SUPPRESS, help="show the traceback of an error"
    )
    parser.add_argument(
        "--no-cache", action="store_true", default=argparse.SUPPRESS, help="compile anew, and keep no compiled program"
    )


def add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print only JSON to the standard output")


def add_model(parser: argparse.ArgumentParser, *, measured_scale: bool = False, named: bool = False) -> None:
    """Add the arguments of ``load_model``. ``named``: the model has no default, and stands alone."""
    if named:
        parser.add_argument("model", metavar="MODEL", help="a folder, a GGUF file, a hub name, or a built-in name")
    else:
        parser.add_argument("--model", default="ts-nano", help="built-in name, folder or hub name (default: ts-nano)")
    help = "factor on the attention's output, instead of that in the files"
    if measured_scale:
        help += "; auto: 1 or 1/sqrt(2 n_layer), the one with the lower loss; prints both losses"
    parser.add_argument("--attn-scale", type=scale_or_auto if measured_scale else scale, metavar="X", help=help)
    parser.add_argument(
        "--verbose", action="store_true", help="print what was loaded, and an encoded sentence, to the standard error"
    )


def add_tracer(parser: argparse.ArgumentParser, *, use_encoder: bool = True) -> None:
    """Add the arguments of ``Tracer``. Here ``inp`` and ``out`` are --inp-sae and --out-sae; --out is a folder."""
    parser.add_argument("--layer", type=natural, required=True, help="the layer whose MLP is explained, from 0")
    choice = "site=SITE,expansion=X,k=K,tag=TAG, only what is needed to choose one SAE"
    parser.add_argument("--inp-sae", type=sae_choice, metavar="CHOICE", help=f"the input SAE: {choice}")
    parser.add_argument("--out-sae", type=sae_choice, metavar="CHOICE", help=f"the output SAE: {choice}")
    parser.add_argument("--scope", help="folder or hub name of the SAEs (default: those of the model)")
    if use_encoder:
        parser.add_argument(
            "--use-encoder",
            action=argparse.BooleanOptionalAction,
            default=True,
            help="explain what makes a feature fire (its encoder row), or what it represents (its decoder column)",
        )


def add_keep_end(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--keep-end",
        action=argparse.BooleanOptionalAction,
        help="keep, or leave out, the end-of-text token that some tokenizers put after every text (default: keep it, "
        "with a warning)",
    )


def add_features(parser: argparse.ArgumentParser, default: str) -> None:
    help = f"output features: top:200 (the strongest), 3,17,20-30, or all (default: {default})"
    parser.add_argument("--features", type=features, default=default, help=help)


def add_data(parser: argparse.ArgumentParser, *, default: str | None = CORPUS) -> None:
    """Add --data with its options. ``default``: what the help says of it; None: there is none."""
    parser.add_argument(
        "--data",
        nargs="+",
        metavar="SOURCE",
        required=default is None,
        help="text: .txt (documents separated by <|endoftext|>), .txt.gz, .jsonl, .jsonl.gz or .parquet files or "
        "hub:OWNER/NAME[:CONFIG[:SPLIT]]; or token ids [rows, seq] in one .npy file or, with --field input_ids, in a "
        f"Parquet file, a folder of such files, or a hub dataset OWNER/NAME{default or ''}",
    )
    parser.add_argument(
        "--field",
        default="text",
        help="field of the text or the token ids in JSONL, Parquet and hub datasets (default: text)",
    )
    parser.add_argument(
        "--max-characters",
        type=positive,
        metavar="N",
        help="most characters of a document; a longer one is an error (default: 2^26)",
    )


def add_conversion(parser: argparse.ArgumentParser, source: str, out: str, scope: str) -> None:
    """Add SOURCE, OUT and --scope with their help texts, and --attn-scale."""
    parser.add_argument("source", metavar="SOURCE", help=source)
    parser.add_argument("out", metavar="OUT", type=folder, help=out)
    help = f"{scope}: all of SCOPE_SOURCE (default: those of the model)"
    parser.add_argument("--scope", nargs="?", const=True, metavar="SCOPE_SOURCE", help=help)
    parser.add_argument("--attn-scale", type=scale, metavar="X", help="factor on the attention's output")


def scope_source(options: argparse.Namespace) -> str | None:
    """The source in --scope: the given one, the model itself if --scope stands alone, or None."""
    return options.source if options.scope is True else options.scope


def folder(text: str) -> Path:
    """The name of a folder. An empty text, as an unset variable of the shell gives it, would be the working folder.

    A name that ends in ".." has no last part, to which "-scope" could be added: it is resolved.
    """
    if not text:
        raise argparse.ArgumentTypeError("the name of a folder must not be empty")
    return Path(text) if Path(text).name not in ("", "..") else Path(text).resolve()


def png(text: str) -> Path:
    if not text.endswith(".png"):
        raise argparse.ArgumentTypeError(f"{text!r} does not end in .png, the only format that figures are saved in")
    return Path(text)


def natural(text: str) -> int:
    return _whole(text, 0)


def positive(text: str) -> int:
    return _whole(text, 1)


def _whole(text: str, least: int) -> int:
    if not re.fullmatch(r"\d+", text) or int(text) < least:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least {least}")
    return int(text)


def scale(text: str) -> float:
    try:
        if math.isfinite(value := float(text)):
            return value
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"{text!r} is not a finite number")


def scale_or_auto(text: str) -> float | str:
    return text if text == "auto" else scale(text)


def features(text: str) -> str:
    """A valid text for ``explain.select.select_features``, which reads it once the features are known."""
    from bilinear_jax.explain.select import parse_features

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
    """A text that is valid Unicode. The terminal or the shell may pass bytes that are not UTF-8."""
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
    kinds = {"site": sae_site, "expansion": positive, "k": positive, "tag": str}
    choice: dict[str, Any] = {}
    for part in text.split(","):
        name, equals, value = part.partition("=")
        if not equals or not value or name not in kinds or name in choice:
            raise argparse.ArgumentTypeError(f"{text!r} does not choose an SAE: write for instance site=resid-mid,k=20")
        choice[name] = kinds[name](value)
    return choice


def sae_site(text: str) -> str:
    from bilinear_jax.nn.sae_config import site_name

    try:
        site_name(text)
    except UnknownNameError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return text


# What is loaded


def load_model(options: argparse.Namespace):
    from bilinear_jax.language import load

    lm = load(options.model, attn_scale=options.attn_scale)
    say_loaded(options, lm)
    return lm


def say_loaded(options: argparse.Namespace, lm) -> None:
    """Print what ``--verbose`` asks for."""
    if options.verbose:
        say(described(lm), sys.stderr)


def described(lm) -> str:
    """Two lines on a model and its tokenizer. The second is a sentence, encoded and decoded again."""
    from bilinear_jax.store.tokenizers import tokenizer_hash

    config = lm.config
    kind = "bilinear" if config.bilinear and config.gate is None else f"gate {config.gate}"
    sizes = f"{config.n_layer} layers, d_model {config.d_model}, {config.n_vocab} tokens, context {config.n_ctx}"
    ids = lm.tokenizer(SENTENCE)["input_ids"]
    return (
        f"{lm.source}: {sizes}, {kind}, attn_scale {config.attn_scale:.6g}; tokenizer {config.tokenizer}, sha256 "
        f"{tokenizer_hash(lm.tokenizer)[:12]}\n{SENTENCE!r} -> {ids} -> {lm.tokenizer.decode(ids)!r}"
    )


def load_tracer(options: argparse.Namespace, lm):
    from bilinear_jax.explain.tracer import Tracer

    use_encoder = getattr(options, "use_encoder", True)
    return Tracer(lm, options.layer, options.inp_sae, options.out_sae, use_encoder, options.scope)


def chosen_position(position: int | None, preactivation, counts) -> int:
    """--position, or by default the position of the largest pre-activation among the tokens that count."""
    import numpy as np

    if position is None:
        return int(np.argmax(np.where(counts | ~counts.any(), preactivation, -np.inf)))
    if position >= len(preactivation):
        raise ValueError(f"--position is {position}, but the text has the positions 0 ... {len(preactivation) - 1}")
    return position


def texts_at(lm, rows, places) -> list[str]:
    """The text around each (row, position) of some token rows, with that token in brackets and no padding."""
    import numpy as np

    from bilinear_jax.show.text import text_at

    last = rows.shape[1] - 1 - np.asarray(lm.token_mask(rows))[:, ::-1].argmax(axis=1)  # before the padding
    return [text_at(lm.tokenizer, rows[row], position, int(last[row])) for row, position in places]


class Tokens(NamedTuple):
    """A dataset as a command uses it."""

    ids: Any  # [rows, seq]
    name: str  # its name, and what was left out of it


def load_tokens(
    options: argparse.Namespace, lm, rows: int | None = None, seq: int | None = None, option: str = "data"
) -> Tokens:
    """The token ids ``[rows, seq]`` of ``--data``, at most ``rows`` rows, and a name for them.

    Text is read and encoded as for training, and cut into rows. The last row is filled with padding. If the model has
    no padding, the last tokens are left out, and the name says so. Rows of token ids longer than ``seq`` are cut, and
    the name says this too. ``seq`` is at most the context of the model, and by default all of it. ``option``: the one
    that names the sources.
    """
    from bilinear_jax.store.datasets import COLUMN, load_token_rows

    data, width = getattr(options, option), min(lm.config.n_ctx, seq or lm.config.n_ctx)
    if data is None:
        from bilinear_jax.store.datasets import load_corpus

        return Tokens(load_corpus(options.model)[:rows, :width], f"corpus.npy of {options.model}")
    name = ", ".join(source if source.startswith("hub:") else Path(source).name for source in data)
    ids = [source.endswith(".npy") or options.field == COLUMN for source in data]
    if not any(ids):
        return _in_rows(_tokenized(options, data, lm, rows, width), lm.config.pad_id, rows, width, name)
    if len(ids) > 1:
        raise WrongUse(f"--{option.replace('_', '-')} takes either one source of token ids, or texts")
    found = load_token_rows(data[0], rows=rows)
    if found.shape[1] > width:
        name += f" (the first {width} of the {found.shape[1]} tokens of each row)"
    return Tokens(found[:, :width], name)


def _in_rows(stream, pad_id: int | None, rows: int | None, width: int, name: str) -> Tokens:
    import numpy as np

    width = min(width, len(stream))
    over = len(stream) % width
    if over and (rows is None or len(stream) // width < rows):
        if pad_id is None:
            stream, name = stream[:-over], f"{name} (without its last {over} tokens, which do not fill a row)"
        else:
            stream = np.pad(stream, (0, width - over), constant_values=pad_id)
    return Tokens(stream[: len(stream) // width * width].reshape(-1, width)[:rows], name)


def _tokenized(options: argparse.Namespace, data: Sequence[str], lm, rows: int | None, width: int):
    import tempfile

    import numpy as np

    from bilinear_jax.store.documents import LARGEST_DOCUMENT
    from bilinear_jax.store.tokens import tokenize

    most = options.max_characters or LARGEST_DOCUMENT
    limit = None if rows is None else rows * width
    with tempfile.TemporaryDirectory(prefix="bilinear-jax-") as folder:
        path = Path(folder) / "tokens"
        made = tokenize(data, lm.tokenizer, path, field=options.field, max_tokens=limit, max_characters=most)
        return np.array(made.tokens)


# What is written


def figures_folder(out: str | Path) -> Path:
    """A folder for figures, which may be made later. Raises ``OSError`` if it cannot be written."""
    from bilinear_jax.store.files import check_writable
    from weights_convert.files import expanded

    out = expanded(out)
    try:
        check_writable(out / "spectrum.png")
    except OSError as error:
        raise OSError(f"the figures cannot be written to {out} ({error}): name another folder with --out") from error
    return out


def save_figure(figure, path: Path) -> None:
    """Write a figure as PNG, and say so on the standard error."""
    from bilinear_jax.store.files import atomic_file

    with atomic_file(path) as partial:
        figure.savefig(partial, dpi=150, format="png")
    say(f"saved {path}", sys.stderr)


# What is printed


def heading(text: str) -> None:
    """Print a heading at once, before the work whose results follow it."""
    say(f"\n== {text}")
    sys.stdout.flush()


def columns(titles: Sequence[str], rows: Iterable[Sequence[Any]], left: Iterable[str] = ()) -> str:
    """Rows as aligned text. The columns named in ``left`` are flush left, all others flush right.

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
