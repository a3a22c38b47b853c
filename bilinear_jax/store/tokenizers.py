"""Find, load, train, save and hash tokenizers."""

import contextlib
import functools
import json
import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from bilinear_jax.store import checksums
from bilinear_jax.store.documents import END_OF_TEXT
from bilinear_jax.store.files import read_json, replace_file
from bilinear_jax.store.sources import GGUF, folder_of, local_folder
from weights_convert.files import expanded, inside, read_text

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")

LARGEST_TOKENIZER = 256 * 2**20
"""Most bytes of a ``tokenizer.json``. Those of the largest published vocabularies have a tenth of this."""


def copy_tokenizer(source: Path, folder: Path) -> None:
    """Copy a ``tokenizer.json`` (or that of a folder) and the ``tokenizer_config.json`` beside it.

    That of a GGUF file is written as these two files. Only what is a tokenizer is copied, and no link to something
    outside the folder is followed: the copy may be published. Raises ``ValueError`` for anything else.
    """
    path = source if source.is_file() else inside(source, TOKENIZER_FILES[0])
    if not path.is_file():
        raise FileNotFoundError(f"{source} has no {TOKENIZER_FILES[0]}")
    if path.suffix == GGUF:
        save_tokenizer(load_tokenizer(str(path), None), folder)
        return
    _read_tokenizer(path)
    _read_settings(path)
    for name, file in zip(TOKENIZER_FILES, (path, path.with_name(TOKENIZER_FILES[1])), strict=True):
        if file.is_file():
            text = read_text(file, limit=LARGEST_TOKENIZER)
            (folder / name).write_text(text, encoding="utf-8", newline="")


class _Known(NamedTuple):
    """A tokenizer that published models were trained with."""

    repository: str
    bos_token: str
    eos_token: str
    pad_token: str
    begins: bool  # whether every text starts with the bos_token


_TOKENIZERS = {
    "ts-4096": _Known("tdooms/ts-tokenizer-4096", "[BOS]", "[EOS]", "[EOS]", begins=True),
    "mistral": _Known("mistral-community/Mixtral-8x22B-v0.1", "<s>", "</s>", "</s>", begins=True),
    "gpt2": _Known("openai-community/gpt2", *["<|endoftext|>"] * 3, begins=False),
}


def load_tokenizer(tokenizer_source: str | None, name: str | None, n_vocab: int | None = None):
    """Load a tokenizer as a ``transformers.PreTrainedTokenizerFast``.

    Up to 8 are cached, each until one of its files, or the ``config.json`` with their checksums, is changed.

    Args:
        tokenizer_source: a folder with ``tokenizer.json``, the file itself, a GGUF file, or a hub name. None: look up
            ``name``.
        name: the name of a known tokenizer ("ts-4096", "mistral", "gpt2"), which is downloaded from the hub. The first
            two put their bos_token at the start of every text, as in the training of the published models. A file that
            does not do this (for instance one made from a sentencepiece file) is corrected, with a warning.
        n_vocab: the vocabulary of the model. None: not checked.

    A file without a decoder gets the one that its tokens show that they need: see ``missing_decoder``. A special token
    that ``tokenizer_config.json`` names and ``tokenizer.json`` does not have is left out, with a warning.

    Raises:
        FileNotFoundError, ConnectionError: if the tokenizer cannot be found. The message says what would help.
        ValueError: if a file cannot be read, the tokenizers library fails on what it holds, or the tokenizer has tokens
            that the model does not have.
    """
    known = _TOKENIZERS.get(name or "")
    if tokenizer_source is None:
        if known is None:
            raise FileNotFoundError(
                f"the model's folder has no tokenizer.json, and its config names the tokenizer {name!r}, which is not "
                f"one of {', '.join(_TOKENIZERS)}: put a tokenizer.json into the model's folder, or use token ids"
            )
        tokenizer_source = known.repository
    path = expanded(tokenizer_source)
    if not path.is_file():
        try:
            folder = local_folder(tokenizer_source) or _downloaded(tokenizer_source)
            path = inside(folder, TOKENIZER_FILES[0])
        except (ConnectionError, FileNotFoundError) as error:
            raise type(error)(
                f"the tokenizer cannot be loaded: {error}. A tokenizer.json in the model's folder is used first"
            ) from error
    if not path.is_file():
        _downloaded.cache_clear()
        made = ", made from its tokenizer.model by transformers," if (path.parent / "tokenizer.model").is_file() else ""
        raise FileNotFoundError(f"{path.parent} has no tokenizer.json: put one there{made} or use token ids")
    return _loaded(path, name, n_vocab, _state(path))


_downloaded = functools.lru_cache(maxsize=8)(functools.partial(folder_of, files=TOKENIZER_FILES))
"""The folder of a hub name. The hub is asked once in a process."""


def _state(path: Path) -> tuple[Any, ...]:
    """What tells whether a tokenizer is the one that was loaded: its place, and the state of the files it is from."""
    found: list[Any] = [os.path.realpath(path)]
    for file in (path, path.with_name(TOKENIZER_FILES[1]), path.with_name("config.json")):
        try:
            stat = file.stat()
        except FileNotFoundError:
            found.append(None)
        else:
            found.append((stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns))
    return tuple(found)


@functools.lru_cache(maxsize=8)
def _loaded(path: Path, name: str | None, n_vocab: int | None, state: tuple[Any, ...]):
    """The tokenizer in a file. ``state`` is only for the cache: with another, the file is read again."""
    tokenizer = _from_gguf(path) if path.suffix == GGUF else _from_json(path, name)
    if n_vocab is not None and (size := vocabulary_size(tokenizer)) > n_vocab:
        raise ValueError(
            f"the tokenizer in {path} has {size} token ids, but the vocabulary of the model only {n_vocab}: put the "
            "tokenizer of this model there, or use token ids"
        )
    return tokenizer


def _from_gguf(path: Path):
    """The tokenizer in a GGUF file."""
    from bilinear_jax.store.gguf_tokenizer import gguf_tokenizer

    with clear_errors(f"the tokenizer in {path} is damaged", "download the file again"):
        tokenizer, special = gguf_tokenizer(path)
    return _tokenizer_class()(tokenizer_object=tokenizer, **special)


def _from_json(path: Path, name: str | None):
    """The tokenizer in a ``tokenizer.json``."""
    known = _TOKENIZERS.get(name or "")
    if changed := [found for name in TOKENIZER_FILES if (found := checksums.changed_file(path.with_name(name)))]:
        warnings.warn(
            f"{'; '.join(changed)}: text may become other token ids than those that the model was trained on. Restore "
            f"the file; or, if you replaced it on purpose, run {checksums.how_to_add(path.parent)}",
            stacklevel=5,
        )
    tokenizer = _read_tokenizer(path)
    if known and known.begins:
        _begin_with(tokenizer, known.bos_token, name)
    if added := _added_decoder(tokenizer):
        tokenizer.decoder = added
    usual = {key: getattr(known, key) for key in ("bos_token", "eos_token", "pad_token")} if known else {}
    usual = {key: token for key, token in usual.items() if tokenizer.token_to_id(token) is not None}
    padding = {key: token for key, token in usual.items() if key == "pad_token"}  # it takes precedence over the files
    special = usual | _special_tokens(path, tokenizer) | padding
    return _tokenizer_class()(tokenizer_object=tokenizer, **special)


def _read_tokenizer(path: Path):
    """The ``tokenizers.Tokenizer`` in a file. It is tried on a short text, since it may panic only then."""
    from tokenizers import Tokenizer

    text = read_text(path, limit=LARGEST_TOKENIZER, fix="restore it, or name another")
    with clear_errors(f"{path} is not a tokenizer that can be read", "restore it, or name another"):
        tokenizer = Tokenizer.from_str(text)
    with clear_errors(f"{path} is damaged", "restore it, or name another"), contextlib.suppress(Exception):
        tokenizer.decode(tokenizer.encode("Once upon a time: 12 naïve cafés 🙂").ids)
    return tokenizer


def _read_settings(path: Path) -> dict[str, Any]:
    """The ``tokenizer_config.json`` beside a tokenizer. Empty if there is none."""
    return read_json(inside(path.parent, TOKENIZER_FILES[1]), fix="restore it, or delete it") or {}


@contextlib.contextmanager
def clear_errors(what: str, fix: str) -> Iterator[None]:
    """Raise ``ValueError`` for what the tokenizers library raises: a plain ``Exception``, or a panic of its Rust code.

    A panic is a ``BaseException`` and not an ``Exception``. No caller would expect it.
    """
    try:
        yield
    except BaseException as error:
        if type(error) is not Exception and type(error).__name__ != "PanicException":
            raise
        raise ValueError(f"{what} ({error}): {fix}") from error


def missing_decoder(tokenizer) -> Any:
    """The decoder that a ``tokenizers.Tokenizer`` lacks: the one that joins its tokens to text as they were split.

    Without a decoder, the library puts a space between all tokens. That is right for tokens that are whole words. It is
    wrong if tokens that continue a word have a prefix (``##``), if those that end a word have a suffix (``</w>``), or
    if the pre-tokenizer writes spaces into the tokens (``ByteLevel``, ``Metaspace``). The published ts-4096 is a
    WordPiece without a decoder. None: the tokenizer has a decoder, or needs none.

    Example:
        >>> from tokenizers import Tokenizer, models
        >>> tokenizer = Tokenizer(models.WordPiece({"up": 0, "##on": 1}, unk_token="up"))
        >>> tokenizer.decode([0, 1]), missing_decoder(tokenizer).decode(["up", "##on"])
        ('up ##on', 'upon')
    """
    from tokenizers import decoders

    if tokenizer.decoder is not None:
        return None
    model, before = tokenizer.model, tokenizer.pre_tokenizer
    state = {} if before is None else json.loads(before.__getstate__())
    steps = {step["type"]: step for step in state.get("pretokenizers", [state]) if step}
    if "ByteLevel" in steps:
        return decoders.ByteLevel()
    if step := steps.get("Metaspace"):
        return decoders.Metaspace(step["replacement"], step["prepend_scheme"])
    if prefix := getattr(model, "continuing_subword_prefix", None):
        return decoders.WordPiece(prefix)
    if suffix := getattr(model, "end_of_word_suffix", None):
        return decoders.BPEDecoder(suffix)
    return None


def _added_decoder(tokenizer) -> Any:
    """The missing decoder as ``load_tokenizer`` adds it: a sequence of one, which tells it from a file's own."""
    from tokenizers import decoders

    missing = missing_decoder(tokenizer)
    return None if missing is None else decoders.Sequence([missing])


def _begin_with(tokenizer, bos_token: str, name: str | None) -> None:
    """Make a tokenizer put its bos_token first, if it has one and does not do so yet."""
    from tokenizers.processors import TemplateProcessing

    bos_id = tokenizer.token_to_id(bos_token)
    if bos_id is None or tokenizer.encode("a").ids[:1] == [bos_id]:
        return
    special = [(bos_token, bos_id)]
    tokenizer.post_processor = TemplateProcessing(single=f"{bos_token} $A", special_tokens=special)
    warnings.warn(
        f"this tokenizer did not put {bos_token} first, unlike {name}, which the published models were trained with: "
        "now it does",
        stacklevel=5,
    )


def _special_tokens(path: Path, tokenizer) -> dict[str, str]:
    """The special tokens in the ``tokenizer_config.json`` beside a tokenizer, but for those that it does not have.

    transformers would add them to the vocabulary, with ids that the model does not have.
    """
    config_path, config = path.with_name(TOKENIZER_FILES[1]), _read_settings(path)
    tokens = {}
    for key in ("bos_token", "eos_token", "pad_token", "unk_token"):
        value = config.get(key)
        value = value.get("content") if isinstance(value, dict) else value
        if value is None:
            continue
        if not isinstance(value, str):
            raise ValueError(f"{config_path}: {key} is {value!r:.100}, but must be a token: correct it")
        if tokenizer.token_to_id(value) is not None:
            tokens[key] = value
            continue
        warnings.warn(
            f"{config_path} names {value!r} as its {key}, but {path.name} has no such token: it is left out. Remove it "
            f"from {config_path.name}, or correct its name",
            stacklevel=6,
        )
    return tokens


def prompt_ids(tokenizer, texts: Sequence[str], keep_end: bool | None = None) -> list[list[int]]:
    """The token ids of texts that a model is to read or to continue.

    Many tokenizers put a token after every text, as training wants it: the end of the text. A model continues after it
    as if a new text began.

    Args:
        tokenizer: a ``transformers`` tokenizer.
        keep_end: keep these tokens (True), or leave them out (False). None: keep them, with a warning.

    Raises:
        ValueError: if the tokenizers library fails on a text.
    """
    end = end_tokens(tokenizer)
    if end and keep_end is None:
        names = " ".join(map(repr, tokenizer.convert_ids_to_tokens(end)))
        warnings.warn(
            f"the tokenizer puts {names} after every text, so a prompt ends there, and the model goes on with another "
            "text: leave it out with keep_end=False (--no-keep-end), or keep it with keep_end=True (--keep-end)",
            stacklevel=3,
        )
    with clear_errors("the tokenizer fails on this text", "give another text, or restore tokenizer.json"):
        rows = [list(tokenizer(text)["input_ids"]) for text in texts]
    return [row[: len(row) - len(end)] for row in rows] if keep_end is False else rows


def end_tokens(tokenizer) -> list[int]:
    """The token ids that a ``transformers`` tokenizer itself puts after every text; [] for most."""
    found = tokenizer("a", return_special_tokens_mask=True)
    ids, added = found["input_ids"], found["special_tokens_mask"]
    return ids[len(ids) - added[::-1].index(0) :] if 0 in added else []


def _tokenizer_class():
    """``PreTrainedTokenizerFast``, imported without the warning of transformers that torch is missing."""
    quiet = "TRANSFORMERS_NO_ADVISORY_WARNINGS"
    before = os.environ.get(quiet)
    os.environ[quiet] = "1"
    try:
        from transformers import PreTrainedTokenizerFast
    finally:
        if before is None:
            del os.environ[quiet]
        else:
            os.environ[quiet] = before
    return PreTrainedTokenizerFast


def train_tokenizer(documents: Iterable[str], n_vocab: int):
    """Train a lossless byte-level BPE tokenizer. ``<|endoftext|>`` has id 0 and starts every text.

    Args:
        documents: the texts to train on.
        n_vocab: the number of token ids, at least 257: one per byte, and ``<|endoftext|>``.

    Returns:
        A ``tokenizers.Tokenizer``. Decoding gives the text back, byte for byte.

    Raises:
        ValueError: if ``n_vocab`` is too small, or larger than the text allows.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    least = len(pre_tokenizers.ByteLevel.alphabet()) + 1
    if n_vocab < least:
        raise ValueError(f"n_vocab is {n_vocab}, but a byte-level tokenizer has at least {least} token ids: raise it")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=n_vocab,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    if tokenizer.get_vocab_size() != n_vocab:
        raise ValueError(
            f"n_vocab is {n_vocab}, but the text gives only {tokenizer.get_vocab_size()} token ids: lower n_vocab, or "
            "give more text"
        )
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{END_OF_TEXT} $A", special_tokens=[(END_OF_TEXT, 0)]
    )
    return tokenizer


def save_tokenizer(tokenizer, folder: str | Path) -> None:
    """Write ``tokenizer.json`` and ``tokenizer_config.json``, which names the bos, eos and pad tokens.

    For a ``transformers`` tokenizer these are its own tokens. For a ``tokenizers.Tokenizer`` all three are
    ``<|endoftext|>``. Each file is written completely or not at all. Raises ``OSError`` with the path if that fails.
    """
    folder = expanded(folder)
    names = ("bos_token", "eos_token", "pad_token")
    special = {name: getattr(tokenizer, name, END_OF_TEXT) for name in names}
    given = {name: token for name, token in special.items() if token is not None}
    replace_file(folder / "tokenizer_config.json", json.dumps(given, indent=2) + "\n")
    replace_file(folder / "tokenizer.json", plain_tokenizer(tokenizer).to_str(pretty=True))


def plain_tokenizer(tokenizer):
    """A copy as a ``tokenizers.Tokenizer``, with padding and truncation switched off, and without an added decoder."""
    from tokenizers import Tokenizer

    copy = Tokenizer.from_str(getattr(tokenizer, "backend_tokenizer", tokenizer).to_str())
    copy.no_padding()
    copy.no_truncation()
    decoder = copy.decoder
    copy.decoder = None
    added = _added_decoder(copy)
    if decoder is not None and (added is None or added.__getstate__() != decoder.__getstate__()):
        copy.decoder = decoder
    return copy


def tokenizer_hash(tokenizer) -> str:
    """The SHA-256 of a tokenizer's ``tokenizer.json``, with sorted keys and without padding and truncation settings."""
    return checksums.of_json(json.loads(plain_tokenizer(tokenizer).to_str()))


def vocabulary_size(tokenizer) -> int:
    """The largest token id of a tokenizer, plus 1. Some tokenizers skip ids."""
    return 1 + max(getattr(tokenizer, "backend_tokenizer", tokenizer).get_vocab(with_added_tokens=True).values())
