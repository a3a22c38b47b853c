"""The weights in safetensors files and in files of ``torch.save``: shapes at once, values on request."""

import functools
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from weights_convert.names import unwrapped
from weights_convert.pickled import read_torch, state_dict

LARGEST_HEADER = 16 * 2**20
"""Most bytes of a safetensors header. The largest published models have less than a hundredth of this."""

FLOATS = ("float32", "float16", "bfloat16")
_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""The names that safetensors has for dtypes of floating point."""


class _Tensor(NamedTuple):
    """One tensor of one file."""

    path: Path
    key: str  # its name in the file
    shape: tuple[int, ...]
    dtype: str
    read: Callable[[], np.ndarray]


def differences(
    shapes: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]], ignored: Iterable[str] = ()
) -> tuple[list[str], list[str], list[str]]:
    """The names that are missing, the names that are extra (without ``ignored``) and the wrong shapes, each sorted."""
    missing, extra = expected.keys() - shapes.keys(), shapes.keys() - expected.keys() - set(ignored)
    wrong = [
        f"{key} has {list(shapes[key])}, expected {list(shape)}"
        for key, shape in sorted(expected.items())
        if key in shapes and shapes[key] != tuple(shape)
    ]
    return sorted(missing), sorted(extra), wrong


def check_written(arrays: Mapping[str, np.ndarray]) -> None:
    """Raise ``ValueError`` for arrays that no file is written of: other dtypes than ``FLOATS``, or not finite."""
    for key, value in arrays.items():
        if value.dtype.name not in FLOATS:
            raise ValueError(f"{key} is {value.dtype}: give it as one of {', '.join(FLOATS)}")
        if not np.isfinite(value).all():
            raise ValueError(f"{key} has NaN or infinite values: use an earlier checkpoint")


class ReadModel(NamedTuple):
    """A model or an SAE as read from files. ``config`` holds the keyword arguments of its config class."""

    config: dict[str, Any]
    params: dict[str, Any]  # nested dict of numpy arrays, in the dtype of the file


def aligned(shape: tuple[int, ...], dtype: str) -> np.ndarray:
    """A new array without values, at an address that is a multiple of 64: JAX then takes it over without a copy."""
    kind = np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    size = math.prod(shape) * kind.itemsize
    memory = np.empty(size + 64, np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + size].view(kind).reshape(shape)


class Weights:
    """The tensors of one or more files, by name, without the parts that torch's wrappers add (``names.unwrapped``).

    Args:
        files: safetensors files by their name, and else files of ``torch.save``.
        part: how a name of this kind of model begins, a regular expression. It tells the model in a torch file from
            what else a training run saves in it.
        floats: the dtypes that may be read.
        config: the file that describes the model, for messages.
    """

    def __init__(
        self,
        files: Iterable[Path],
        part: str,
        floats: tuple[str, ...] = FLOATS,
        *,
        config: str = "config.json",
    ):
        self.files, self.floats, self.config = list(files), floats, config
        self._tensors: dict[str, _Tensor] = {}
        for path in self.files:
            for tensor in _safetensors(path) if path.suffix == ".safetensors" else _pickled(path, part):
                key = unwrapped(tensor.key)
                if other := self._tensors.get(key):
                    raise ValueError(
                        f"{key} is there twice, as {other.key} in {other.path.name} and as {tensor.key} in "
                        f"{path.name}: delete one of them"
                    )
                self._tensors[key] = tensor
        self.shapes = {key: tensor.shape for key, tensor in self._tensors.items()}

    def check(self, expected: Mapping[str, tuple[int, ...]], ignored: Iterable[str] = ()) -> None:
        """Raise ``ValueError`` unless the tensors are exactly the expected ones. ``ignored`` may be there too."""
        where = ", ".join(path.name for path in self.files) + f" in {self.files[0].parent}"
        missing, extra, wrong = differences(self.shapes, expected, ignored)
        if missing or extra:
            raise ValueError(
                f"the weights in {where} are not those that {self.config} describes. In the model but not in the "
                f"checkpoint: {_listing(missing)}; in the checkpoint but not in the model: {_listing(extra)}. "
                f"Check that {self.config} belongs to these weights, and download both again"
            )
        if wrong:
            raise ValueError(
                f"shapes in {where} do not match {self.config}: {'; '.join(wrong)}. "
                f"Check that {self.config} belongs to these weights"
            )

    def dtype(self, key: str) -> str:
        """The stored dtype of one tensor. Raises ``ValueError`` if it is not in ``floats``."""
        tensor = self._tensors[key]
        if tensor.dtype not in self.floats:
            raise ValueError(
                f"{key} in {tensor.path} is stored as {tensor.dtype}; save it again as one of {', '.join(self.floats)}"
            )
        return tensor.dtype

    def read(self, key: str) -> np.ndarray:
        """One tensor as stored, perhaps read-only. Raises ``ValueError`` for NaN, inf or a dtype outside ``floats``."""
        self.dtype(key)
        value = self._tensors[key].read()
        if not np.isfinite(value).all():
            kind = "NaN" if np.isnan(value).any() else "infinite"
            count = int(value.size - np.isfinite(value).sum())
            raise ValueError(
                f"{key} in {self._tensors[key].path} has {count} values that are not finite ({kind}): the file is "
                "damaged or its training diverged; download it again"
            )
        return value


def _safetensors(path: Path) -> Iterator[_Tensor]:
    """The tensors of one file. safetensors checks the file; then numpy maps the values."""
    from safetensors import SafetensorError, safe_open

    size = path.stat().st_size

    def damaged(why: object) -> ValueError:
        return ValueError(f"{path} ({size} bytes) is cut short or not a safetensors file ({why}): download it again")

    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if min(LARGEST_HEADER, size - 8) < length:
            raise damaged(f"its header should have {length} bytes")
        header = file.read(length)
    try:
        with safe_open(path, framework="numpy"):
            pass
    except SafetensorError as error:
        raise damaged(error) from error
    for key, tensor in json.loads(header).items():
        if key != "__metadata__":
            shape, stored = tuple(tensor["shape"]), str(tensor["dtype"])
            dtype = _DTYPES.get(stored, stored)
            place = 8 + length + tensor["data_offsets"][0]
            yield _Tensor(path, key, shape, dtype, functools.partial(_mapped, path, dtype, place, shape))


def _mapped(path: Path, dtype: str, place: int, shape: tuple[int, ...]) -> np.ndarray:
    """A part of a file as a memory-mapped array. The map lives only as long as the array, to keep memory low."""
    kind = np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype).newbyteorder("<")
    count = math.prod(shape)
    if not count:
        return np.zeros(shape, kind)
    return np.frombuffer(np.memmap(path, np.uint8, "r", place, (count * kind.itemsize,)), kind).reshape(shape)


def _pickled(path: Path, part: str) -> Iterator[_Tensor]:
    for key, value in state_dict(read_torch(path), lambda name: re.match(part, unwrapped(name))).items():
        native = value.dtype.newbyteorder("=")
        read = functools.partial(np.asarray, value, native, order="C")
        yield _Tensor(path, key, value.shape, native.name, read)


def _listing(names: list[str], most: int = 40) -> str:
    if not names:
        return "nothing"
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
