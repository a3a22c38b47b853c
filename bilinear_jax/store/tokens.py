"""Text as one flat, memory-mapped file of token ids.

A token file is two files. ``NAME`` holds the token ids of all documents, one after another, as little-endian uint16 or
uint32. ``NAME.json``, its sidecar, describes them, with the SHA-256 of the token ids and of the text that they were
made from. It is sealed, see ``store.checksums``.
"""

import dataclasses
import errno
import functools
import itertools
import json
import os
import secrets
import warnings
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from bilinear_jax.store import checksums
from bilinear_jax.store.documents import LARGEST_DOCUMENT, as_sources, is_hub, read_documents, too_few_documents
from bilinear_jax.store.fields import Rule
from bilinear_jax.store.files import locked_folder, put_file, read_json
from bilinear_jax.store.tokenizers import clear_errors, plain_tokenizer, tokenizer_hash, vocabulary_size
from weights_convert.files import expanded

FORMAT, VERSION = "bilinear_jax.tokens", 1

_COUNT = Rule("must be a whole number in 1 ... 2^63 - 1", lambda value: type(value) is int and 0 < value < 2**63)
_RULES = dict.fromkeys(("version", "n_vocab", "n_documents", "n_tokens"), _COUNT) | {
    "n_held_out": Rule("must be a whole number that is not negative", lambda value: type(value) is int and value >= 0),
    "dtype": Rule("must be uint16 or uint32", lambda value: value in ("uint16", "uint32")),
    "tokenizer_hash": Rule("must be text", lambda value: isinstance(value, str)),
    "made_from": Rule("must be a JSON object", lambda value: isinstance(value, dict)),
}
_CHARACTERS = 1 << 21  # encoded at once


@dataclasses.dataclass(frozen=True)
class TokenFile:
    """A tokenised text, as ``tokenize`` writes it."""

    path: Path  # the file of token ids; the sidecar is beside it
    tokens: np.ndarray  # [n_tokens], uint16 or uint32, memory-mapped: the text to train on
    held_out: np.ndarray  # [n_held_out], the held-out text: the last documents
    n_documents: int  # number of documents, with those held out
    n_vocab: int  # largest token id of the tokenizer, plus 1
    tokenizer_hash: str  # SHA-256 of the tokenizer, see tokenizer_hash
    made_from: dict[str, Any]  # sources (name and size of each), field, held-out documents, limit of tokens, content


def tokenize(
    sources: str | Path | Sequence[str | Path],
    tokenizer,
    path: str | Path,
    *,
    field: str = "text",
    held_out: int = 0,
    max_tokens: int | None = None,
    max_characters: int = LARGEST_DOCUMENT,
) -> TokenFile:
    """Encode all documents into one token file. If the file exists, it is only opened.

    Each document is encoded exactly as the tokenizer does it. Between documents there is only what the tokenizer itself
    adds at their ends. Documents are read and encoded 2 million characters at a time, on all cores, so memory does not
    grow with the text. A terminal shows a progress bar. The file appears at ``path`` when it is complete. A killed
    process leaves only hidden files ``.NAME.partial-...`` beside it, which can be deleted.

    If the file exists, the sources are read again, because another text may have the same name and size; with
    ``max_tokens``, only the documents that were tokenised. A hub dataset is known by its name alone.

    Args:
        sources, field, max_characters: as for ``read_documents``.
        tokenizer: a ``tokenizers.Tokenizer`` or a ``transformers.PreTrainedTokenizerFast``. Its padding and truncation
            settings are ignored.
        path: the token file.
        held_out: number of documents at the end that are kept apart, as ``TokenFile.held_out``.
        max_tokens: stop after the document that reaches this many tokens. None: read the sources to the end.

    Raises:
        ValueError: if ``path`` holds another text or the tokens of another tokenizer, is damaged, or is not a token
            file; if all documents would be held out; if the tokenizer gives no token for the text, or a token id
            outside its own vocabulary; and as ``read_documents`` does.
        FileExistsError: if ``path`` is a link to nothing, or the sidecar's name belongs to another file; or, at the
            end, if something else appeared at ``path`` meanwhile. That stays as it is, and the message says where the
            new tokens are.
        OSError: if the file cannot be written, for instance on a full disk. No partial file is left.

    Example:
        >>> import tempfile
        >>> from bilinear_jax.store.tokenizers import train_tokenizer
        >>> folder = Path(tempfile.mkdtemp())
        >>> _ = (folder / "two.txt").write_text("A cat sat.<|endoftext|>A dog sat.")
        >>> tokenizer = train_tokenizer(["A cat sat.", "A dog sat."], n_vocab=259)
        >>> file = tokenize(folder / "two.txt", tokenizer, folder / "tokens")
        >>> file.n_documents, tokenizer.decode(list(file.tokens), skip_special_tokens=False)
        (2, '<|endoftext|>A cat sat.<|endoftext|>A dog sat.')
    """
    if held_out < 0 or (max_tokens is not None and max_tokens < 1):
        raise ValueError(f"held_out must be at least 0 and max_tokens at least 1, got {held_out} and {max_tokens}")
    found, path = as_sources(sources), expanded(path)
    made_from = {
        "sources": [str(s) if is_hub(s) else {"name": Path(s).name, "bytes": Path(s).stat().st_size} for s in found],
        "field": field,
        "held_out_documents": held_out,
        "max_tokens": max_tokens,
    }
    if path.exists():
        there = open_tokens(path, tokenizer)
        before = there.made_from
        if "content" in before and all(before.get(key) == now for key, now in made_from.items()):
            made_from["content"] = _content(found, field, max_tokens, max_characters, there.n_documents)
        changed = [f"{key}: {before.get(key)} there, {n} now" for key, n in made_from.items() if before.get(key) != n]
        if changed:
            raise ValueError(
                f"{path} was made from another text ({'; '.join(changed)}): delete it, or name another file"
            )
        return there

    if os.path.lexists(path):
        raise FileExistsError(f"{path} is a link to nothing: delete it, or name another file")
    _check_sidecar(path)
    encoder, n_vocab = plain_tokenizer(tokenizer), vocabulary_size(tokenizer)
    dtype = np.dtype("<u2" if n_vocab <= 1 << 16 else "<u4")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}-{secrets.token_hex(4)}")
    try:
        documents = read_documents(found, field, max_characters=max_characters)
        with open(partial, "wb") as file:
            counts = _encode_into(file, dtype, n_vocab, encoder, documents, held_out, max_tokens)
            file.flush()
            os.fsync(file.fileno())
        made_from["content"] = _content(found, field, max_tokens, max_characters, counts["n_documents"])
        record = {"format": FORMAT, "version": VERSION, "tokenizer_hash": tokenizer_hash(tokenizer)}
        record |= {"n_vocab": n_vocab, "dtype": dtype.name} | counts | {"made_from": made_from}
        record |= {"tokens_sha256": checksums.of_file(partial)}
        _sidecar(partial).write_text(json.dumps(checksums.sealed(record), indent=2) + "\n", encoding="utf-8")
    except BaseException as error:
        partial.unlink(missing_ok=True)
        _sidecar(partial).unlink(missing_ok=True)
        if not isinstance(error, OSError) or error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise OSError(
            error.errno,
            f"the disk is full ({error.strerror}), so {path} was not written: free disk space, or name another disk",
        ) from error
    _put(partial, path)
    return open_tokens(path, tokenizer)


def open_tokens(path: str | Path, tokenizer=None, *, n_vocab: int | None = None) -> TokenFile:
    """Open the token file at ``path``, memory-mapped.

    Args:
        path: the token file.
        tokenizer: the tokenizer that the tokens must come from. None: any.
        n_vocab: the vocabulary size of the model that will read the tokens. None: any.

    Raises:
        FileNotFoundError: if the file or its sidecar does not exist.
        ValueError: if the file is cut short or is not a token file, if another tokenizer made it, or if the model does
            not have all of its token ids.
    """
    path = expanded(path)
    sidecar = _sidecar(path)
    if not path.is_file() or not sidecar.is_file():
        there = path if path.is_file() else sidecar if sidecar.is_file() else "neither"
        raise FileNotFoundError(
            f"a token file needs both {path} and {sidecar.name} beside it; found: {there}. Tokenise the text again, to "
            "a new name, or delete this file first if it holds tokens"
        )
    anew = _anew(path)
    record = read_json(sidecar, fix=anew) or {}
    if record.get("format") != FORMAT:
        raise ValueError(f"{sidecar} does not describe a token file of this library: name another file")
    for name, rule in _RULES.items():
        if not rule.fits(record.get(name)):
            raise ValueError(f"{sidecar} lacks {name}: {anew} ({name} {rule.says}, but is {record.get(name)!r:.100})")
    if record["version"] > VERSION:
        raise ValueError(
            f"{path} has format version {record['version']}, but this bilinear_jax reads {VERSION}: upgrade it"
        )
    if checksums.intact(record) is False:
        raise ValueError(f"{sidecar} is not what was written, so it is damaged: {anew}")
    dtype = np.dtype(record["dtype"]).newbyteorder("<")
    count, size = record["n_tokens"] + record["n_held_out"], path.stat().st_size
    if size != count * dtype.itemsize:
        raise ValueError(
            f"{path} has {size} bytes, but should have {count * dtype.itemsize} ({count} tokens of {dtype.name}): "
            f"it is cut short or damaged: {anew}"
        )
    _check_ids(path, str(record.get("tokens_sha256")) if checksums.intact(record) else None, _stamp(path))
    if tokenizer is not None and record["tokenizer_hash"] != tokenizer_hash(tokenizer):
        raise ValueError(
            f"{path} has the tokens of another tokenizer, {record['tokenizer_hash'][:12]} with {record['n_vocab']} "
            f"token ids, not of this one, {tokenizer_hash(tokenizer)[:12]} with {vocabulary_size(tokenizer)}: "
            "tokenise the text with this one, to another file"
        )
    if n_vocab is not None and record["n_vocab"] > n_vocab:
        raise ValueError(
            f"{path} has a vocabulary of {record['n_vocab']} tokens, but the model only has {n_vocab}: tokenise the "
            "text with the model's own tokenizer, or give the model a larger vocabulary"
        )
    stream = np.memmap(path, dtype, mode="r")
    return TokenFile(
        path=path,
        tokens=stream[: record["n_tokens"]],
        held_out=stream[record["n_tokens"] :],
        **{name: record[name] for name in ("n_documents", "n_vocab", "tokenizer_hash", "made_from")},
    )


@functools.lru_cache(maxsize=8)
def _check_ids(path: Path, expected: str | None, stamp: tuple[int, ...]) -> None:
    """Compare the token ids with their SHA-256, once per process for each state of the file."""
    if expected is None:
        warnings.warn(
            f"{path} was written by a version that recorded no checksums, so changed token ids, or another text of the "
            f"same name and size, are not noticed. To have them checked, {_anew(path)}",
            stacklevel=3,
        )
    elif checksums.of_file(path) != expected:
        raise ValueError(f"{path} is damaged, for these are not the token ids that were written: {_anew(path)}")


def _anew(path: Path) -> str:
    return f"delete {path} and tokenise the text again"


def _stamp(path: Path) -> tuple[int, ...]:
    stat = path.stat()
    return stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns


def _content(
    sources: list[str | Path], field: str, max_tokens: int | None, max_characters: int, documents: int
) -> list[str]:
    """What identifies a text: the SHA-256 of each file, or of the documents that were read of it up to a limit.

    There is none for a hub dataset, which would have to be downloaded again.
    """
    files = [Path(source) for source in sources if not is_hub(source)]
    if max_tokens is None or len(files) < len(sources):
        return [checksums.of_file(path) for path in files]
    read = read_documents(sources, field, max_characters=max_characters)
    return [checksums.of_texts(itertools.islice(read, documents))]


def _sidecar(path: Path) -> Path:
    return path.with_name(path.name + ".json")


def _check_sidecar(path: Path) -> None:
    """Raise ``FileExistsError`` if the place of the sidecar has another file. A sidecar of deleted tokens is free."""
    sidecar = _sidecar(path)
    record = read_json(sidecar, fix="move it away, or name another token file")
    if record is not None and record.get("format") != FORMAT:
        raise FileExistsError(
            f"{sidecar} is another file, but {path.name} needs this name for its description: move it away, or name "
            "another token file"
        )


def _put(partial: Path, path: Path) -> None:
    """Give a complete token file its name. The sidecar is first, because a sidecar alone is not a token file."""
    try:
        with locked_folder(path.parent):
            if os.path.lexists(path):
                raise FileExistsError
            _check_sidecar(path)
            os.replace(_sidecar(partial), _sidecar(path))
            put_file(partial, path)
    except FileExistsError as error:
        raise FileExistsError(
            f"{path} or {_sidecar(path).name} appeared while the text was tokenised, and stays as it is. The new "
            f"tokens are complete in {partial}: tokenise again to use what is there, or give both new files another "
            "name"
        ) from error


def _encode_into(
    file: BinaryIO,
    dtype: np.dtype,
    n_vocab: int,
    encoder,
    documents: Iterable[str],
    held_out: int,
    max_tokens: int | None,
) -> dict[str, int]:
    """Append the tokens of all documents to a file. Returns the numbers of documents and tokens."""
    from tqdm.auto import tqdm

    n_documents = n_tokens = 0
    last: deque[int] = deque(maxlen=held_out)  # lengths of the last documents so far: at the end, those held out
    with tqdm(desc="tokenise", disable=None, unit="token", unit_scale=True) as bar:
        for chunk in _chunks(documents):
            with clear_errors("the tokenizer fails on this text", "leave it out, or restore tokenizer.json"):
                encoded = [_fitting(document.ids, n_vocab, dtype) for document in encoder.encode_batch_fast(chunk)]
            if max_tokens is not None:
                ends = n_tokens + np.cumsum([len(document) for document in encoded])
                encoded = encoded[: int(np.searchsorted(ends, max_tokens)) + 1]
            file.write(np.concatenate(encoded).tobytes())
            last.extend(map(len, encoded))
            n_documents += len(encoded)
            n_tokens += sum(map(len, encoded))
            bar.update(n_tokens - bar.n)
            if max_tokens is not None and n_tokens >= max_tokens:
                break
    if n_documents <= held_out:
        raise too_few_documents(n_documents, held_out, max_tokens)
    if n_tokens == sum(last):
        before = " before the documents that are held out" if n_tokens else ""
        raise ValueError(
            f"the tokenizer gives no token for this text{before}: name another text, or correct the tokenizer"
        )
    return {"n_documents": n_documents, "n_tokens": n_tokens - sum(last), "n_held_out": sum(last)}


def _fitting(ids: list[int], n_vocab: int, dtype: np.dtype) -> np.ndarray:
    if ids and max(ids) >= n_vocab:  # of a token that only the post-processor knows
        raise ValueError(
            f"the tokenizer gives token id {max(ids)}, but its vocabulary has the ids 0 ... {n_vocab - 1}: correct its "
            "post_processor, or add the token to its vocabulary"
        )
    return np.asarray(ids, dtype)


def _chunks(documents: Iterable[str]) -> Iterator[list[str]]:
    """Lists of documents of about 2 million characters, with at most 65,536 documents."""
    chunk, size = [], 0
    for document in documents:
        chunk.append(document)
        size += len(document)
        if size >= _CHARACTERS or len(chunk) == 1 << 16:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk
