"""Read documents one at a time from text, JSONL and Parquet files and from hub datasets."""

import gzip
import importlib
import io
import json
import zlib
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from bilinear_jax.store.datasets import bytes_per_row, chunks, parquet_file

END_OF_TEXT = "<|endoftext|>"
HUB = "hub:"

_SUFFIXES = (".txt", ".txt.gz", ".jsonl", ".jsonl.gz", ".parquet")
_EXPECTED = f"name a {', '.join(_SUFFIXES)} file, or {HUB}OWNER/NAME for a hub dataset"
_CHARACTERS = 1 << 20  # of a text file, read at once
_BATCH = 1 << 24  # bytes of a Parquet file, read at once
_GROWTH = 200  # by how much the text of a Parquet file may grow when it is decompressed; usual are factors of 2 to 10

LARGEST_DOCUMENT = 1 << 26
"""Most characters of a document, unless another limit is given. Its tokens take a few gigabytes of memory."""


def as_sources(sources: str | Path | Sequence[str | Path]) -> list[str | Path]:
    """One source or several, as a list. Raises ``FileNotFoundError`` or ``ValueError`` if one cannot be read."""
    found = [sources] if isinstance(sources, str | Path) else list(sources)
    if not found:
        raise ValueError("no text is given: name at least one file or hub dataset")
    for source in found:
        if not is_hub(source):
            _kind(Path(source))
            if not Path(source).exists():
                raise FileNotFoundError(f"there is no file {source}: {_EXPECTED}")
            if not Path(source).is_file():
                raise ValueError(f"{source} is not a regular file (but a folder, a pipe or a device): {_EXPECTED}")
    places = [str(source) if is_hub(source) else Path(source).resolve() for source in found]
    if twice := [source for i, source in enumerate(found) if places[i] in places[:i]]:
        raise ValueError(f"{twice[0]} is named twice, so its text would be trained on and held out: name it once")
    return found


def is_hub(source: str | Path) -> bool:
    """Whether a source is the name of a hub dataset."""
    return str(source).startswith(HUB)


def read_documents(
    sources: str | Path | Sequence[str | Path], field: str = "text", *, max_characters: int = LARGEST_DOCUMENT
) -> Iterator[str]:
    """Yield the documents of the sources in order. Each is read when it is asked for.

    Args:
        sources: one or several of

            - a text file (``.txt``, ``.txt.gz``), UTF-8, with ``<|endoftext|>`` between documents; white space at
              both ends of a document is removed;
            - a JSONL file (``.jsonl``, ``.jsonl.gz``): one JSON object per line;
            - a Parquet file (``.parquet``; needs pyarrow);
            - ``hub:OWNER/NAME``, ``hub:OWNER/NAME:CONFIG`` or ``hub:OWNER/NAME:CONFIG:SPLIT``: a hub dataset, which
              is streamed (needs the package datasets). The default split is "train".
        field: the field with the text in JSONL, Parquet and hub datasets.
        max_characters: most characters of a document, and of a line of a JSONL file.

    Documents with only white space are skipped. All others are not changed.

    Memory: the largest document. Of a Parquet file: documents of about 16 MB, and the texts of a row group that are
    stored only once.

    Raises:
        FileNotFoundError: if a file does not exist. This is checked before any file is read.
        ValueError: if a file has another type, is damaged or has no documents, if a record does not have the field, or
            if a document has more than ``max_characters``. The message names the file and the line.
        ImportError: for a Parquet file or a hub dataset, if the package that reads it is not installed.

    Example:
        >>> import tempfile, pathlib
        >>> file = pathlib.Path(tempfile.mkdtemp()) / "two.jsonl"
        >>> _ = file.write_text('{"text": "A cat."}\\n{"text": "A dog."}\\n')
        >>> list(read_documents(file))
        ['A cat.', 'A dog.']
    """
    return _read(as_sources(sources), field, max_characters)


def _read(sources: list[str | Path], field: str, most: int) -> Iterator[str]:
    for source in sources:
        empty = True
        for number, document in enumerate(_documents(source, field, most), 1):
            if len(document) > most:
                raise _too_long(f"document {number} of {source}", most)
            if document and not document.isspace():
                empty = False
                yield document
        if empty:
            separated = "" if is_hub(source) or _kind(Path(source)) != ".txt" else f", with {END_OF_TEXT} between them"
            raise ValueError(f"{source} has no documents: it must hold text{separated}")


def _too_long(where: str, most: int, fix: str = "cut it") -> ValueError:
    return ValueError(
        f"{where} has more than {most} characters, which would take much memory: {fix}, or raise max_characters "
        "(--max-characters, or --data.max_characters for training)"
    )


def _documents(source: str | Path, field: str, most: int) -> Iterator[str]:
    if is_hub(source):
        yield from _from_hub(str(source), field)
        return
    path = Path(source)
    try:
        if _kind(path) == ".txt":
            with _open(path) as file:
                read = iter(lambda: file.read(_CHARACTERS), "")
                yield from (document.strip() for document in _separated(path, read, most))
        elif _kind(path) == ".jsonl":
            with _open(path) as file:
                yield from _from_lines(path, iter(lambda: file.readline(most + 2), ""), field, most)
        else:
            yield from _from_parquet(path, field, most)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error}): convert it, or name another file") from error
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path} is cut short or damaged ({error}): download it again") from error


def _kind(path: Path) -> str:
    """``.txt``, ``.jsonl`` or ``.parquet``, from the file name."""
    for suffix in _SUFFIXES:
        if path.name.lower().endswith(suffix):
            return suffix.removesuffix(".gz")
    raise ValueError(f"{path} has a file type that cannot be read: {_EXPECTED}")


def _open(path: Path) -> io.TextIOWrapper:
    """Open a UTF-8 file, gzipped or not. Line ends are not changed."""
    if path.suffix.lower() == ".gz":
        return io.TextIOWrapper(gzip.GzipFile(path), encoding="utf-8-sig", newline="")
    return open(path, encoding="utf-8-sig", newline="")


def _separated(path: Path, read: Iterable[str], most: int) -> Iterator[str]:
    """The texts between ``<|endoftext|>``. The separator may cross the border of two chunks."""
    parts, tail, overlap = [], "", len(END_OF_TEXT) - 1
    size = 0  # of the parts, without white space in front
    for chunk in read:
        *whole, rest = (tail + chunk).split(END_OF_TEXT)
        for document in whole:
            yield "".join([*parts, document])
            parts, size = [], 0
        part = rest[:-overlap] if parts else rest[:-overlap].lstrip()
        parts += [part] if part else []
        tail = rest[-overlap:]
        size += len(part)
        if size > most:
            raise _too_long(f"a document of {path}", most, f"separate its documents with {END_OF_TEXT}")
    yield "".join([*parts, tail])


def _from_lines(path: Path, lines: Iterable[str], field: str, most: int) -> Iterator[str]:
    for number, line in enumerate(lines, 1):
        if len(line) > most + 1:
            raise _too_long(f"line {number} of {path}", most)
        if line.isspace():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:  # ValueError: not JSON, or a number with thousands of digits
            reason = getattr(error, "msg", error)
            raise ValueError(f"line {number} of {path} is not JSON ({reason}): fix or remove it") from error
        yield _text(record, field, f"line {number} of {path}")


def _from_parquet(path: Path, field: str, most: int) -> Iterator[str]:
    with parquet_file(path, field, lambda names: _no_field(field, names, str(path))) as file:
        import pyarrow.compute
        import pyarrow.parquet

        if field not in (texts := _text_columns(file.schema_arrow)):
            fix = f"name one of {', '.join(texts)}" if texts else "store text as a column of strings"
            kind = file.schema_arrow.field(field).type
            raise ValueError(f"the field {field!r} of {path} holds {kind}, not text: {fix}")
        row, size = 0, bytes_per_row(file, field)
        if size > 4 * most or any(
            chunk.total_uncompressed_size > max(4 * most, _GROWTH * chunk.total_compressed_size)
            for chunk in chunks(file, field)
        ):
            raise _too_long(f"a document of {path}", most)
        # Each distinct text comes once: a small file can repeat a large one endlessly.
        with pyarrow.parquet.ParquetFile(path, metadata=file.metadata, read_dictionary=[field]) as distinct:
            count = max(1, min(1024, _BATCH // max(1, size)))
            for batch in distinct.iter_batches(batch_size=count, columns=[field]):
                column = batch.column(0)
                lengths = pyarrow.compute.call_function("binary_length", [column.dictionary])
                if (pyarrow.compute.call_function("max", [lengths]).as_py() or 0) > 4 * most:
                    raise _too_long(f"a document of {path}", most)
                for text in column:
                    row += 1
                    yield _text({field: text.as_py()}, field, f"row {row} of {path}")


def _text_columns(schema: Any) -> list[str]:
    """The names of the columns of strings."""
    import pyarrow.types as kinds

    plain = {one.name: one.type.value_type if kinds.is_dictionary(one.type) else one.type for one in schema}
    return [name for name, kind in plain.items() if kinds.is_string(kind) or kinds.is_large_string(kind)]


def _from_hub(source: str, field: str) -> Iterator[str]:
    name, *rest = source.removeprefix(HUB).split(":")
    if not name or len(rest) > 2:
        raise ValueError(f"{source} is not a hub dataset: write {HUB}OWNER/NAME, or {HUB}OWNER/NAME:CONFIG:SPLIT")
    try:
        datasets: Any = importlib.import_module("datasets")
    except ImportError as error:
        raise ImportError(f"reading {source} needs the package datasets: pip install 'bilinear-jax[data]'") from error
    config, split = (*rest, "", "")[:2]
    rows = datasets.load_dataset(name, config or None, split=split or "train", streaming=True)
    for number, record in enumerate(rows, 1):
        yield _text(record, field, f"record {number} of {source}")


def _text(record: Any, field: str, where: str) -> str:
    """The text of a record. Raises ``ValueError`` if it has none."""
    if not isinstance(record, dict):
        raise ValueError(
            f"{where} is not an object with a field {field!r}, but {type(record).__name__}: fix or remove it"
        )
    if field not in record:
        raise ValueError(_no_field(field, record, where))
    if not isinstance(record[field], str):
        raise ValueError(
            f"the field {field!r} of {where} is not text, but {type(record[field]).__name__}: fix or remove it"
        )
    try:
        record[field].encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"the field {field!r} of {where} is not Unicode text ({error}): fix or remove it") from error
    return record[field]


def _no_field(field: str, there: Iterable[str], where: str) -> str:
    return (
        f"{where} has no field {field!r}; it has: {', '.join(sorted(map(str, there))) or 'none'}. Name one that it has"
    )


def up_to(documents: Iterable[str], characters: int) -> Iterator[str]:
    """The documents up to that which reaches this many characters."""
    total = 0
    for document in documents:
        yield document
        total += len(document)
        if total >= characters:
            return


def without_last(documents: Iterable[str], count: int) -> Iterator[str]:
    """All documents except the last ``count``, which are kept in memory. Raises ``ValueError`` if none is left."""
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
    """The error for a text that has no documents except those that are held out."""
    stopped = "" if limit is None else f", or raise max_tokens, which is {limit}"
    return ValueError(f"{there} documents are too few to hold out {held_out}: hold out fewer, give more text{stopped}")
