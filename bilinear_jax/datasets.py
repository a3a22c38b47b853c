"""Datasets of token ids, as published top activations number their rows."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from bilinear_jax.sources import dataset_folder

COLUMN = "input_ids"


def load_token_rows(source: str | Path, length: int | None = None) -> np.ndarray:
    """A dataset of token ids, ``[rows, seq]``, for ``Visualizer`` and everything else that takes tokens.

    The published ``top-activations.safetensors`` of fw-medium-scope names rows of ``tdooms/fineweb-16k``::

        tokens = load_token_rows("tdooms/fineweb-16k", lm.config.n_ctx)
        bj.Visualizer(lm, sae, tokens, top="tdooms/fw-medium-scope")

    Args:
        source: a Parquet file with a column ``input_ids``, a folder of such files, which are read in the order of their
            names, the hub name of such a dataset, or a ``.npy`` file, which is read as it is used.
        length: tokens a row; longer ones are cut. None: as they are.

    Returns:
        An integer array, of int32 where it comes from Parquet.

    Raises:
        FileNotFoundError: for a source that doesn't exist, or a folder without Parquet files.
        ConnectionError: where the hub can't be reached and its cache doesn't hold the dataset.
        ImportError: without pyarrow, for Parquet files.
        ValueError: for files that can't be read, another column, rows of different lengths, or ids that are none.

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
            raise FileNotFoundError(f"{source} has no Parquet files: name the folder or the file that has them")
        parts = [part for file in files for part in _from_parquet(file)]
        widths = sorted({part.shape[1] for part in parts})
        if len(widths) != 1:
            found = f"rows of {' and '.join(map(str, widths))} tokens" if widths else "no rows"
            raise ValueError(f"{source} has {found}: rows must be of one length; pad them, or cut them")
        rows = np.concatenate(parts)
    if length is not None and length < 1:
        raise ValueError(f"length must be at least 1, got {length}")
    return rows[:, :length]


def _saved(path: Path) -> np.ndarray:
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}: name token ids [rows, seq], saved by numpy.save")
    try:
        rows = np.load(path, mmap_mode="r")
    except (ValueError, EOFError) as error:
        raise ValueError(f"{path} is no array of numbers ({error}): save token ids with numpy.save") from error
    if rows.ndim != 2 or rows.dtype.kind not in "iu":
        raise ValueError(f"{path} holds {rows.dtype} of shape {rows.shape}, but tokens are [rows, seq], of integers")
    return rows


@contextlib.contextmanager
def parquet_file(path: Path, column: str, lacking: Callable[[list[str]], str]) -> Iterator[Any]:
    """An open ``pyarrow.parquet.ParquetFile`` that has a column; ``lacking`` says what is wrong if it hasn't."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError(f"{path} needs the package pyarrow: pip install 'bilinear-jax[data]'") from error
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if column not in names:
                raise ValueError(lacking(names))
            yield file
    except pyarrow.ArrowException as error:
        raise ValueError(f"{path} can't be read ({error}): download it again, or check what it is") from error


def _from_parquet(path: Path) -> list[np.ndarray]:
    def lacking(names: list[str]) -> str:
        return f"{path} has no column {COLUMN}, but {', '.join(names)}: name a dataset of token ids"

    with parquet_file(path, COLUMN, lacking) as file:
        return [_array(path, batch.column(0)) for batch in file.iter_batches(batch_size=4096, columns=[COLUMN])]


def _array(path: Path, column) -> np.ndarray:
    """Lists of token ids, in one array."""
    import pyarrow.types

    kind = column.type
    lists = (pyarrow.types.is_list, pyarrow.types.is_large_list, pyarrow.types.is_fixed_size_list)
    if not any(is_list(kind) for is_list in lists) or not pyarrow.types.is_integer(kind.value_type):
        raise ValueError(f"{COLUMN} of {path} holds {kind}, expected lists of integers: name a dataset of token ids")
    values, widths = column.flatten(), set(column.value_lengths().to_pylist())
    if len(widths) > 1 or None in widths or values.null_count:
        raise ValueError(f"{path} has rows of different lengths: rows must be of one length; pad them, or cut them")
    ids = values.to_numpy(zero_copy_only=False)
    if ids.size and (ids.min() < 0 or ids.max() > np.iinfo(np.int32).max):
        raise ValueError(f"{path} has ids such as {ids.min()} and {ids.max()}: name a dataset of token ids")
    return ids.astype(np.int32).reshape(len(column), widths.pop())
