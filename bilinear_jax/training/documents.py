"""Documents from text, JSONL and Parquet files and from the hub, one after another; and a tokenizer trained on them."""

import gzip
import importlib
import io
import json
import zlib
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from bilinear_jax.datasets import parquet_file
from bilinear_jax.training.folder import replace_file

END_OF_TEXT = "<|endoftext|>"
HUB = "hub:"

_SUFFIXES = (".txt", ".txt.gz", ".jsonl", ".jsonl.gz", ".parquet")
_EXPECTED = f"name a {', '.join(_SUFFIXES)} file, or {HUB}OWNER/NAME for a hub dataset"
_CHARACTERS = 1 << 20  # read at once of a text file


def as_sources(sources: str | Path | Sequence[str | Path]) -> list[str | Path]:
    """One source or several as a list; raises ``FileNotFoundError`` or ``ValueError`` for one that can't be read."""
    found = [sources] if isinstance(sources, str | Path) else list(sources)
    if not found:
        raise ValueError("no text: name at least one file or hub dataset")
    for source in found:
        if not is_hub(source):
            _kind(Path(source))
            if not Path(source).is_file():
                raise FileNotFoundError(f"there is no file {source}: {_EXPECTED}")
    places = [str(source) if is_hub(source) else Path(source).resolve() for source in found]
    if twice := [source for i, source in enumerate(found) if places[i] in places[:i]]:
        raise ValueError(f"{twice[0]} is named twice, and would be trained on and held out: name it once")
    return found


def is_hub(source: str | Path) -> bool:
    """Whether a source names a hub dataset."""
    return str(source).startswith(HUB)


def read_documents(sources: str | Path | Sequence[str | Path], field: str = "text") -> Iterator[str]:
    """The documents of the sources, in order, read as they are asked for.

    Args:
        sources: one or several of

            - a text file (``.txt``, ``.txt.gz``), UTF-8, with ``<|endoftext|>`` between documents, whose white space
              at both ends is dropped;
            - a JSONL file (``.jsonl``, ``.jsonl.gz``): a JSON object a line;
            - a Parquet file (``.parquet``; needs pyarrow);
            - ``hub:OWNER/NAME``, ``hub:OWNER/NAME:CONFIG`` or ``hub:OWNER/NAME:CONFIG:SPLIT``: a dataset of the hub,
              streamed (needs the package datasets). The split is "train" unless another is named.
        field: where JSONL, Parquet and hub datasets have the text.

    Documents of nothing but white space are left out; every other one is given as it is. Memory: the largest
    document, or one row group's batch of 1,024 documents of a Parquet file.

    Raises:
        FileNotFoundError: for a file that isn't there, before any is read.
        ValueError: for a file of another kind, one that is damaged, one without documents, or a record without the
            field; it names the file and the line.
        ImportError: for a Parquet file or a hub dataset without the package that reads it.

    Example:
        >>> import tempfile, pathlib
        >>> file = pathlib.Path(tempfile.mkdtemp()) / "two.jsonl"
        >>> _ = file.write_text('{"text": "A cat."}\\n{"text": "A dog."}\\n')
        >>> list(read_documents(file))
        ['A cat.', 'A dog.']
    """
    return _read(as_sources(sources), field)


def _read(sources: list[str | Path], field: str) -> Iterator[str]:
    for source in sources:
        empty = True
        for document in _documents(source, field):
            if document and not document.isspace():
                empty = False
                yield document
        if empty:
            separated = "" if is_hub(source) or _kind(Path(source)) != ".txt" else f", with {END_OF_TEXT} between them"
            raise ValueError(f"{source} holds no documents: expected text{separated}")


def _documents(source: str | Path, field: str) -> Iterator[str]:
    if is_hub(source):
        yield from _from_hub(str(source), field)
        return
    path = Path(source)
    try:
        if _kind(path) == ".txt":
            with _open(path) as file:
                yield from (document.strip() for document in _separated(iter(lambda: file.read(_CHARACTERS), "")))
        elif _kind(path) == ".jsonl":
            with _open(path) as file:
                yield from _from_lines(path, file, field)
        else:
            yield from _from_parquet(path, field)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error}): convert it, or check what it is") from error
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path} is cut short or damaged ({error}): download it again") from error


def _kind(path: Path) -> str:
    """``.txt``, ``.jsonl`` or ``.parquet``, by the name."""
    for suffix in _SUFFIXES:
        if path.name.lower().endswith(suffix):
            return suffix.removesuffix(".gz")
    raise ValueError(f"{path} is of no kind that is read: {_EXPECTED}")


def _open(path: Path) -> io.TextIOWrapper:
    """A UTF-8 file, gzipped or not, with its line ends as they are."""
    if path.suffix.lower() == ".gz":
        return io.TextIOWrapper(gzip.GzipFile(path), encoding="utf-8-sig", newline="")
    return open(path, encoding="utf-8-sig", newline="")


def _separated(chunks: Iterable[str]) -> Iterator[str]:
    """The texts between ``<|endoftext|>``, which may lie across the border of two chunks."""
    parts, tail, overlap = [], "", len(END_OF_TEXT) - 1
    for chunk in chunks:
        *whole, rest = (tail + chunk).split(END_OF_TEXT)
        for document in whole:
            yield "".join([*parts, document])
            parts = []
        parts.append(rest[:-overlap])
        tail = rest[-overlap:]
    yield "".join([*parts, tail])


def _from_lines(path: Path, lines: Iterable[str], field: str) -> Iterator[str]:
    for number, line in enumerate(lines, 1):
        if line.isspace():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:  # ValueError: not JSON, or a number of thousands of digits
            reason = getattr(error, "msg", error)
            raise ValueError(f"line {number} of {path} is not JSON ({reason}): mend or remove it") from error
        yield _text(record, field, f"line {number} of {path}")


def _from_parquet(path: Path, field: str) -> Iterator[str]:
    with parquet_file(path, field, lambda names: _no_field(field, names, str(path))) as file:
        row = 0
        for batch in file.iter_batches(batch_size=1024, columns=[field]):
            for document in batch.column(0).to_pylist():
                row += 1
                yield _text({field: document}, field, f"row {row} of {path}")


def _from_hub(source: str, field: str) -> Iterator[str]:
    name, *rest = source.removeprefix(HUB).split(":")
    if not name or len(rest) > 2:
        raise ValueError(f"{source}: a hub dataset is {HUB}OWNER/NAME, or {HUB}OWNER/NAME:CONFIG:SPLIT")
    try:
        datasets: Any = importlib.import_module("datasets")
    except ImportError as error:
        raise ImportError(f"{source} needs the package datasets: pip install 'bilinear-jax[data]'") from error
    config, split = (*rest, "", "")[:2]
    rows = datasets.load_dataset(name, config or None, split=split or "train", streaming=True)
    for number, record in enumerate(rows, 1):
        yield _text(record, field, f"record {number} of {source}")


def _text(record: Any, field: str, where: str) -> str:
    """The text of a record; raises ``ValueError`` if there is none."""
    if not isinstance(record, dict):
        raise ValueError(f"{where} is not an object with a field {field!r}, but {type(record).__name__}")
    if field not in record:
        raise ValueError(_no_field(field, record, where))
    if not isinstance(record[field], str):
        raise ValueError(f"the field {field!r} of {where} is not text, but {type(record[field]).__name__}: remove it")
    try:
        record[field].encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"the field {field!r} of {where} is not Unicode text ({error}): mend or remove it") from error
    return record[field]


def _no_field(field: str, there: Iterable[str], where: str) -> str:
    return f"{where} has no field {field!r}; it has: {', '.join(sorted(map(str, there))) or 'none'}. Name the field"


def without_last(documents: Iterable[str], count: int) -> Iterator[str]:
    """All documents but the last ``count``, which are held in memory; ``ValueError`` if that leaves none."""
    held: deque[str] = deque()
    some = False
    for document in documents:
        held.append(document)
        if len(held) > count:
            yield held.popleft()
            some = True
    if not some:
        raise too_few_documents(len(held), count)


def too_few_documents(there: int, held_out: int, limit: int | None = None) -> ValueError:
    """The error of a text that has no documents besides those that are held out."""
    stopped = "" if limit is None else f", or raise max_tokens, which is {limit}"
    return ValueError(f"{there} documents are too few to hold out {held_out}: hold out fewer, or give more{stopped}")


def train_tokenizer(documents: Iterable[str], n_vocab: int):
    """A lossless byte-level BPE tokenizer; ``<|endoftext|>`` is id 0 and is put first in every text.

    Returns a ``tokenizers.Tokenizer``. Decoding gives back the text, byte for byte. Raises ``ValueError`` for fewer
    pieces than a byte each takes, 257, and for more than the text has.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    least = len(pre_tokenizers.ByteLevel.alphabet()) + 1
    if n_vocab < least:
        raise ValueError(f"a tokenizer of bytes has at least {least} pieces: raise n_vocab, which is {n_vocab}")
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
            f"the text supports only {tokenizer.get_vocab_size()} pieces: lower n_vocab, which is {n_vocab}, to that "
            "or less, or give more text"
        )
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{END_OF_TEXT} $A", special_tokens=[(END_OF_TEXT, 0)]
    )
    return tokenizer


def save_tokenizer(tokenizer, folder: str | Path) -> None:
    """Write ``tokenizer.json``, and ``tokenizer_config.json``, which names the tokens that begin, end and pad.

    Those of a ``transformers`` tokenizer are its own; of a ``tokenizers.Tokenizer`` all three are ``<|endoftext|>``.
    Each file is whole or not there; ``OSError``, which names it, if it can't be written.
    """
    folder = Path(folder)
    names = ("bos_token", "eos_token", "pad_token")
    special = {name: getattr(tokenizer, name, END_OF_TEXT) for name in names}
    given = {name: token for name, token in special.items() if token is not None}
    replace_file(folder / "tokenizer_config.json", json.dumps(given, indent=2) + "\n")
    replace_file(folder / "tokenizer.json", plain_tokenizer(tokenizer).to_str(pretty=True))


def plain_tokenizer(tokenizer):
    """A copy, as a ``tokenizers.Tokenizer``, without the padding and truncation that someone may have switched on."""
    from tokenizers import Tokenizer

    copy = Tokenizer.from_str(getattr(tokenizer, "backend_tokenizer", tokenizer).to_str())
    copy.no_padding()
    copy.no_truncation()
    return copy
