"""Datasets of token ids: rows of one length, numbered as in the published top activations."""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from bilinear_jax.errors import check_count
from bilinear_jax.store import checksums
from bilinear_jax.store.sources import dataset_folder, folder_of
from weights_convert.files import expanded, inside

COLUMN = "input_ids"
LONGEST_ROW = 1 << 20
"""Most token ids of a row of a Parquet file. In a ``.npy`` file a row may have any length."""


def load_token_rows(source: str | Path, length: int | None = None, rows: int | None = None) -> np.ndarray:
    """Load a dataset of token ids, ``[rows, seq]``, for ``Visualizer`` and every other function that takes tokens.

    The published ``top-activations.safetensors`` of fw-medium-scope refers to rows of ``tdooms/fineweb-16k``::

        tokens = load_token_rows("tdooms/fineweb-16k", lm.config.n_ctx)
        bj.Visualizer(lm, sae, tokens, top="tdooms/fw-medium-scope")

    Args:
        source: one of

            - a Parquet file with a column ``input_ids``,
            - a folder of such files, which are read in the order of their names,
            - the hub name of such a dataset,
            - a ``.npy`` file, which is memory-mapped.
        length: tokens per row. Longer rows are cut. None: keep them as they are.
        rows: read only this many rows, the first. None: all.

    Returns:
        An integer array; int32 for Parquet files.

    Raises:
        FileNotFoundError: if the source does not exist, or if the folder has no Parquet files.
        ConnectionError: if the hub cannot be reached and its cache does not hold the dataset.
        ImportError: for Parquet files, if pyarrow is not installed.
        ValueError: if a file cannot be read, the column is missing, rows differ in length, values are not token ids, or
            rows of a Parquet file have more than 2^20 of them.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "tokens.npy"
        >>> np.save(path, np.arange(12).reshape(2, 6))
        >>> load_token_rows(path, length=4).shape
        (2, 4)
    """
    for name, limit in (("length", length), ("rows", rows)):
        if limit is not None:
            check_count(name, limit)
    path = expanded(source)
    if path.suffix == ".npy":
        if not path.is_file():
            raise FileNotFoundError(f"there is no file {path}: name token ids [rows, seq] in a file of numpy.save")
        found = _saved(path)
    else:
        folder = path if path.exists() else dataset_folder(source)
        files = [folder] if folder.is_file() else sorted(file for file in folder.rglob("*.parquet") if file.is_file())
        if not files:
            raise FileNotFoundError(f"{source} has no Parquet files: name a folder with Parquet files, or one file")
        parts = _first(rows, (part for file in files for part in _from_parquet(file)))
        widths = sorted({part.shape[1] for part in parts})
        if len(widths) != 1:
            found = f"rows of {' and '.join(map(str, widths))} tokens" if widths else "no rows"
            raise ValueError(f"{source} has {found}, but all rows must have one length: pad or cut them")
        found = np.concatenate(parts)
    return found[:rows, :length]


def _first(rows: int | None, parts: Iterable[np.ndarray]) -> list[np.ndarray]:
    """The parts up to that which reaches this many rows."""
    kept: list[np.ndarray] = []
    for part in parts:
        kept.append(part)
        if rows is not None and sum(map(len, kept)) >= rows:
            break
    return kept


def _saved(path: Path) -> np.ndarray:
    """The integers ``[rows, seq]`` in a ``.npy`` file, memory-mapped."""
    try:
        with np.errstate(over="ignore"):
            rows = np.lib.format.open_memmap(path, mode="r")
    except Exception as error:  # a broken header can raise any error
        reason = (str(error) or type(error).__name__).splitlines()[0][:200]
        raise ValueError(f"{path} is not an array of numbers ({reason}): save token ids with numpy.save") from error
    if rows.ndim != 2 or rows.dtype.kind not in "iu":
        raise ValueError(f"{path} holds {rows.dtype} of shape {rows.shape}, but must hold integers [rows, seq]")
    return rows


@contextlib.contextmanager
def parquet_file(path: Path, column: str, lacking: Callable[[list[str]], str]) -> Iterator[Any]:
    """An open ``pyarrow.parquet.ParquetFile`` that has the column. If not, ``lacking`` gives the error message."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError(f"reading {path} needs the package pyarrow: pip install 'bilinear-jax[data]'") from error
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if column not in names:
                raise ValueError(lacking(names))
            yield file
    except pyarrow.ArrowException as error:
        raise ValueError(f"{path} cannot be read ({error}): download it again, or check its name") from error


def bytes_per_row(file: Any, column: str) -> int:
    """The mean size of a column's values when they are decompressed, in the row group where it is largest."""
    groups = [file.metadata.row_group(number) for number in range(file.metadata.num_row_groups)]
    sizes = zip(groups, chunks(file, column), strict=True)
    return max((chunk.total_uncompressed_size // max(1, group.num_rows) for group, chunk in sizes), default=0)


def chunks(file: Any, column: str) -> list[Any]:
    """What a Parquet file says of a column in each of its row groups."""
    names = [file.schema.column(number).path for number in range(len(file.schema))]
    place = next(number for number, name in enumerate(names) if name == column or name.startswith(f"{column}."))
    return [file.metadata.row_group(number).column(place) for number in range(file.metadata.num_row_groups)]


def _from_parquet(path: Path) -> Iterator[np.ndarray]:
    def lacking(names: list[str]) -> str:
        return f"{path} has no column {COLUMN}, only {', '.join(names)}: name a dataset of token ids"

    with parquet_file(path, COLUMN, lacking) as file:
        width = -(-sum(chunk.num_values for chunk in chunks(file, COLUMN)) // max(1, file.metadata.num_rows))
        if width > LONGEST_ROW:
            raise ValueError(
                f"{path} has rows of {width} token ids, but at most {LONGEST_ROW} are read from a Parquet file: cut "
                "the rows, or save them with numpy.save, as a .npy file"
            )
        for batch in file.iter_batches(batch_size=max(1, min(4096, (1 << 22) // max(1, width))), columns=[COLUMN]):
            yield _array(path, batch.column(0))


def _array(path: Path, column) -> np.ndarray:
    """Lists of token ids as one array."""
    import pyarrow.types

    kind = column.type
    lists = (pyarrow.types.is_list, pyarrow.types.is_large_list, pyarrow.types.is_fixed_size_list)
    if not any(is_list(kind) for is_list in lists) or not pyarrow.types.is_integer(kind.value_type):
        raise ValueError(f"{COLUMN} of {path} holds {kind}, not lists of integers: name a dataset of token ids")
    values, widths = column.flatten(), set(column.value_lengths().to_pylist())
    if len(widths) > 1 or None in widths or values.null_count:
        raise ValueError(f"{path} has rows of different lengths, but all rows must have one length: pad or cut them")
    ids = values.to_numpy(zero_copy_only=False)
    if ids.size and (ids.min() < 0 or ids.max() > np.iinfo(np.int32).max):
        raise ValueError(
            f"{path} has values from {ids.min()} to {ids.max()}, but token ids are in 0 ... 2^31 - 1: name a dataset "
            "of token ids"
        )
    return ids.astype(np.int32).reshape(len(column), widths.pop())


def load_corpus(source: str | Path) -> np.ndarray:
    """Load the token ids that ship with a model, uint16 ``[rows, n_ctx]``, memory-mapped.

    Args:
        source: as for ``load``.

    Raises:
        FileNotFoundError: if the model does not exist or has no ``corpus.npy``.
        ValueError: if the file is damaged.

    Example:
        >>> load_corpus("ts-nano").shape[1]
        256
    """
    path = inside(folder_of(source, ["corpus.npy", "config.json"]), "corpus.npy")
    if not path.is_file():
        raise FileNotFoundError(f"{source} has no corpus.npy: give your own token ids [rows, n_ctx]")
    checksums.check_file(path)
    tokens = _saved(path)
    if tokens.dtype != np.uint16:
        raise ValueError(f"{path} holds {tokens.dtype}, but must hold uint16 [rows, n_ctx]: restore it")
    return tokens
