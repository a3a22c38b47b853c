"""Documents to batches of tokens: one flat memory-mapped token file, and shuffled windows of it.

A token file is two files: ``NAME``, the tokens of all documents one after another as little-endian uint16 or uint32,
and ``NAME.json``, its side-car, which says what they are.
"""

import dataclasses
import errno
import functools
import hashlib
import json
import os
import secrets
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from jaxtyping import Int

from bilinear_jax.training.documents import as_sources, is_hub, plain_tokenizer, read_documents, too_few_documents
from bilinear_jax.training.fit import BatchIterator

FORMAT, VERSION = "bilinear_jax.tokens", 1

_COUNTS = ("version", "n_vocab", "n_documents", "n_tokens", "n_held_out")
_RECORD = dict.fromkeys(_COUNTS, int) | {"dtype": str, "tokenizer_hash": str, "made_from": dict}

_CHARACTERS = 1 << 21  # of documents that are encoded at once
_PREFETCHED = 8  # batches that are cut before they are asked for


@dataclasses.dataclass(frozen=True)
class TokenFile:
    """A tokenised text, as ``tokenize`` wrote it."""

    path: Path  # the tokens; the side-car is beside it
    tokens: np.ndarray  # [n_tokens], uint16 or uint32, memory-mapped: what to train on
    held_out: np.ndarray  # [n_held_out], the tokens of the last documents: what not to train on
    n_documents: int  # documents, those held out among them
    n_vocab: int  # largest token that the tokenizer can give, plus 1
    tokenizer_hash: str  # sha256 of the tokenizer, see tokenizer_hash
    made_from: dict[str, Any]  # the sources (name and size of each), field, held-out documents, limit of tokens


def tokenize(
    sources: str | Path | Sequence[str | Path],
    tokenizer,
    path: str | Path,
    *,
    field: str = "text",
    held_out: int = 0,
    max_tokens: int | None = None,
) -> TokenFile:
    """Encode all documents into one token file, each exactly as the tokenizer does; a second call only opens it.

    Nothing is put between documents but what the tokenizer itself puts at their ends. Documents are read and encoded
    2 million characters at a time, on all cores, so that memory doesn't grow with the text; a progress bar shows on a
    terminal. The file appears at ``path`` when it is whole: a process that is killed leaves only a hidden
    ``.NAME.partial-...`` beside it, which can be deleted.

    Args:
        sources, field: as for ``read_documents``.
        tokenizer: a ``tokenizers.Tokenizer`` or a ``transformers.PreTrainedTokenizerFast``, without its settings of
            padding and truncation.
        path: the token file.
        held_out: how many documents at the end are kept apart, as ``TokenFile.held_out``.
        max_tokens: stop after the document that reaches so many. None: at the end of the sources.

    Raises:
        ValueError: where ``path`` holds another text or another tokenizer's tokens, or isn't a token file; for fewer
            documents than are held out; and as ``read_documents`` does.
        OSError: if the file can't be written, on a full disk for instance; nothing is left of it.

    Example:
        >>> import tempfile
        >>> from bilinear_jax.training.documents import train_tokenizer
        >>> folder = Path(tempfile.mkdtemp())
        >>> _ = (folder / "two.txt").write_text("A cat sat.<|endoftext|>A dog sat.")
        >>> tokenizer = train_tokenizer(["A cat sat.", "A dog sat."], n_vocab=259)
        >>> file = tokenize(folder / "two.txt", tokenizer, folder / "tokens")
        >>> file.n_documents, tokenizer.decode(list(file.tokens), skip_special_tokens=False)
        (2, '<|endoftext|>A cat sat.<|endoftext|>A dog sat.')
    """
    if held_out < 0 or (max_tokens is not None and max_tokens < 1):
        raise ValueError(f"held_out counts from 0 and max_tokens from 1, got {held_out} and {max_tokens}")
    found, path = as_sources(sources), Path(path)
    made_from = {
        "sources": [str(s) if is_hub(s) else {"name": Path(s).name, "bytes": Path(s).stat().st_size} for s in found],
        "field": field,
        "held_out_documents": held_out,
        "max_tokens": max_tokens,
    }
    if path.exists():
        there = open_tokens(path, tokenizer)
        before = there.made_from
        changed = [f"{key}: {before[key]} there, {now} now" for key, now in made_from.items() if before[key] != now]
        if changed:
            raise ValueError(f"{path} was made from another text ({'; '.join(changed)}): delete it, or name another")
        return there

    encoder, n_vocab = plain_tokenizer(tokenizer), vocabulary_size(tokenizer)
    dtype = np.dtype("<u2" if n_vocab <= 1 << 16 else "<u4")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}-{secrets.token_hex(4)}")
    described = partial.with_name(partial.name + ".json")
    try:
        with open(partial, "wb") as file:
            counts = _encode_into(file, dtype, encoder, read_documents(found, field), held_out, max_tokens)
            file.flush()
            os.fsync(file.fileno())
        record = {"format": FORMAT, "version": VERSION, "tokenizer_hash": tokenizer_hash(tokenizer)}
        record |= {"n_vocab": n_vocab, "dtype": dtype.name} | counts | {"made_from": made_from}
        described.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        os.replace(described, _sidecar(path))  # before the tokens: without them it is not a token file
        os.replace(partial, path)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise OSError(
            error.errno, f"the disk is full ({error.strerror}), {path} was not written: make room, or name another disk"
        ) from error
    finally:
        partial.unlink(missing_ok=True)
        described.unlink(missing_ok=True)
    return open_tokens(path, tokenizer)


def open_tokens(path: str | Path, tokenizer=None, *, n_vocab: int | None = None) -> TokenFile:
    """The token file at ``path``, memory-mapped.

    Args:
        tokenizer: the one that the tokens must come from; None: any.
        n_vocab: the vocabulary size of the model that shall read them; None: any.

    Raises:
        FileNotFoundError: if it or its side-car isn't there.
        ValueError: for a file that is cut short or isn't a token file, one of another tokenizer, or one whose tokens
            the model doesn't have.
    """
    path = Path(path)
    sidecar = _sidecar(path)
    if not path.is_file() or not sidecar.is_file():
        there = path if path.is_file() else sidecar if sidecar.is_file() else "neither"
        raise FileNotFoundError(
            f"a token file is {path} and {sidecar.name} beside it, of which there is {there}: tokenise the text "
            "again, to a name that no other file has, or delete this one first if it is of tokens"
        )
    try:
        record = json.loads(sidecar.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{sidecar} is not JSON ({error}): delete {path} and tokenise the text again") from error
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise ValueError(f"{sidecar} doesn't describe a token file of this library: name another file")
    missing = [name for name, kind in _RECORD.items() if not isinstance(record.get(name), kind)]
    if missing:
        raise ValueError(f"{sidecar} lacks {', '.join(missing)}: delete {path} and tokenise the text again")
    if record["version"] > VERSION:
        raise ValueError(
            f"{path} has format version {record['version']}, this bilinear_jax reads {VERSION}: upgrade it"
        )
    dtype = np.dtype(record["dtype"]).newbyteorder("<")
    count, size = record["n_tokens"] + record["n_held_out"], path.stat().st_size
    if size != count * dtype.itemsize:
        raise ValueError(
            f"{path} has {size} bytes and should have {count * dtype.itemsize} ({count} tokens of {dtype.name}): "
            "it is cut short or damaged. Delete it and tokenise the text again"
        )
    if tokenizer is not None and record["tokenizer_hash"] != tokenizer_hash(tokenizer):
        raise ValueError(
            f"{path} has the tokens of another tokenizer, {record['tokenizer_hash'][:12]} with {record['n_vocab']} "
            f"tokens, and not of this one, {tokenizer_hash(tokenizer)[:12]} with {vocabulary_size(tokenizer)}: "
            "tokenise the text with this one, to another file"
        )
    if n_vocab is not None and record["n_vocab"] > n_vocab:
        raise ValueError(
            f"{path} has a vocabulary of {record['n_vocab']} tokens and the model one of {n_vocab}: tokenise the text "
            "with the model's own tokenizer, or give the model as large a vocabulary"
        )
    stream = np.memmap(path, dtype, mode="r")
    return TokenFile(
        path=path,
        tokens=stream[: record["n_tokens"]],
        held_out=stream[record["n_tokens"] :],
        **{name: record[name] for name in ("n_documents", "n_vocab", "tokenizer_hash", "made_from")},
    )


def tokenizer_hash(tokenizer) -> str:
    """sha256 of a tokenizer's ``tokenizer.json``, keys sorted, without its settings of padding and truncation."""
    definition = json.loads(plain_tokenizer(tokenizer).to_str())
    return hashlib.sha256(json.dumps(definition, sort_keys=True).encode()).hexdigest()


def vocabulary_size(tokenizer) -> int:
    """The largest token of a tokenizer, plus 1: some leave out numbers."""
    return 1 + max(getattr(tokenizer, "backend_tokenizer", tokenizer).get_vocab(with_added_tokens=True).values())


def _sidecar(path: Path) -> Path:
    return path.with_name(path.name + ".json")


def _encode_into(
    file: BinaryIO, dtype: np.dtype, encoder, documents: Iterable[str], held_out: int, max_tokens: int | None
) -> dict[str, int]:
    """Append the tokens of all documents to a file; returns how many there are of both."""
    from tqdm.auto import tqdm

    n_documents = n_tokens = 0
    last: deque[int] = deque(maxlen=held_out)  # lengths of the documents that are held out, as it looks so far
    with tqdm(desc="tokenise", disable=None, unit="token", unit_scale=True) as bar:
        for chunk in _chunks(documents):
            encoded = [np.asarray(document.ids, dtype) for document in encoder.encode_batch_fast(chunk)]
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
    return {"n_documents": n_documents, "n_tokens": n_tokens - sum(last), "n_held_out": sum(last)}


def _chunks(documents: Iterable[str]) -> Iterator[list[str]]:
    """Lists of documents of about 2 million characters, and 65,536 documents at most."""
    chunk, size = [], 0
    for document in documents:
        chunk.append(document)
        size += len(document)
        if size >= _CHARACTERS or len(chunk) == 1 << 16:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def batches(
    tokens: np.ndarray, n_ctx: int, batch_size: int, seed: int = 0, *, n_vocab: int | None = None
) -> BatchIterator:
    """Shuffled windows of a token stream, int32 ``[batch_size, n_ctx]``, without end.

    In every epoch the stream is cut at another offset, and its windows come in another order, each once. What comes
    is a function of the arguments and of the number of batches so far, which is the iterator's whole state. The next
    batches are cut in the background. Memory: 8 batches; the order is computed, not stored.

    Args:
        tokens: the stream, ``[tokens]``; may be memory-mapped.
        seed: of the offsets and the order, 0 to 2^32 - 1.
        n_vocab: the vocabulary size of the model that shall read them; None: any.

    Returns:
        Grain's iterator: ``next(it)``, ``it.get_state()``, ``it.set_state(state)``.

    Raises:
        ValueError: for a stream too short for one batch, or one that isn't of whole numbers; from ``next``, for a
            token that isn't one of ``n_vocab``.

    Example:
        >>> source = batches(np.arange(100), n_ctx=10, batch_size=4, seed=1)
        >>> first, state, second = next(source), source.get_state(), next(source)
        >>> source.set_state(state)
        >>> first.shape, bool((next(source) == second).all())
        ((4, 10), True)
    """
    import grain

    if tokens.ndim != 1 or not np.issubdtype(tokens.dtype, np.integer):
        raise ValueError(f"tokens are whole numbers [tokens], one stream; got {tokens.dtype} of shape {tokens.shape}")
    windows = len(tokens) // n_ctx - 1  # one less, so that every offset has as many
    if windows < batch_size:
        raise ValueError(
            f"{len(tokens)} tokens are too few for one batch of {batch_size} windows of {n_ctx}: "
            "give more text, or lower batch_size (of SAEs: rows) or n_ctx"
        )

    @functools.lru_cache(maxsize=2)
    def offset(epoch: int) -> int:
        return int(np.random.default_rng([seed, epoch]).integers(n_ctx))

    def cut(position: int, window: int) -> Int[np.ndarray, " n_ctx"]:
        start = offset(position // windows) + window * n_ctx
        found = tokens[start : start + n_ctx]
        if n_vocab is not None and not 0 <= found.min() <= found.max() < n_vocab:
            raise ValueError(
                f"tokens {found.min()} ... {found.max()} at {start:,} lie outside the vocabulary 0 ... {n_vocab - 1}: "
                "tokenise the text again, with the model's own tokenizer"
            )
        return found.astype(np.int32)

    order = grain.MapDataset.range(windows).seed(seed).shuffle().repeat()
    read = grain.ReadOptions(num_threads=1, prefetch_buffer_size=_PREFETCHED)
    return iter(order.map_with_index(cut).batch(batch_size).to_iter_dataset(read))


def held_out_rows(tokens: np.ndarray, n_ctx: int) -> Int[np.ndarray, "rows n_ctx"]:
    """The stream cut into consecutive full rows, without shuffling."""
    rows = len(tokens) // n_ctx
    if rows == 0:
        raise ValueError(f"{len(tokens)} tokens do not fill one row of {n_ctx}: hold out more text")
    return np.asarray(tokens[: rows * n_ctx], dtype=np.int32).reshape(rows, n_ctx)
