"""Datasets of token ids: rows of one length, numbered as in the published top activations."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from bilinear_jax.store.sources import dataset_folder, folder_of

COLUMN = "input_ids"


def load_token_rows(source: str | Path, length: int | None = None) -> np.ndarray:
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

    Returns:
        An integer array; int32 for Parquet files.

    Raises:
        FileNotFoundError: if the source does not exist, or if the folder has no Parquet files.
        ConnectionError: if the hub cannot be reached and its cache does not hold the dataset.
        ImportError: for Parquet files, if pyarrow is not installed.
        ValueError: if a file cannot be read, the column is missing, rows differ in length, or values are not token ids.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "tokens.npy"
        >>> np.save(path, np.arange(12).reshape(2, 6))
        >>> load_token_rows(path, length=4).shape
        (2, 4)
    """
    path = Path(source).expanduser()
    if path.suffix == ".npy":
        rows = _saved(path)
    else:
        folder = path if path.exists() else dataset_folder(source)
        files = [folder] if folder.is_file() else sorted(folder.rglob("*.parquet"))
        if not files:
            raise FileNotFoundError(f"{source} has no Parquet files: name a folder with Parquet files, or one file")
        parts = [part for file in files for part in _from_parquet(file)]
        widths = sorted({part.shape[1] for part in parts})
        if len(widths) != 1:
            found = f"rows of {' and '.join(map(str, widths))} tokens" if widths else "no rows"
            raise ValueError(f"{source} has {found}, but all rows must have one length: pad or cut them")
        rows = np.concatenate(parts)
    if length is not None and length < 1:
        raise ValueError(f"length must be at least 1, got {length}")
    return rows[:, :length]


def _saved(path: Path) -> np.ndarray:
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}: name token ids [rows, seq] in a file of numpy.save")
    try:
        rows = np.load(path, mmap_mode="r")
    except (ValueError, EOFError) as error:
        raise ValueError(f"{path} is not an array of numbers ({error}): save token ids with numpy.save") from error
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


def _from_parquet(path: Path) -> list[np.ndarray]:
    def lacking(names: list[str]) -> str:
        return f"{path} has no column {COLUMN}, only {', '.join(names)}: name a dataset of token ids"

    with parquet_file(path, COLUMN, lacking) as file:
        return [_array(path, batch.column(0)) for batch in file.iter_batches(batch_size=4096, columns=[COLUMN])]


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
    path = folder_of(source, ["corpus.npy"]) / "corpus.npy"
    if not path.is_file():
        raise FileNotFoundError(f"{source} has no corpus.npy: give your own token ids [rows, n_ctx]")
    tokens = np.load(path, mmap_mode="r")
    if tokens.ndim != 2 or tokens.dtype != np.uint16:
        raise ValueError(
            f"{path} holds {tokens.dtype} of shape {tokens.shape}, but must hold uint16 [rows, n_ctx]: restore it"
        )
    return tokens
