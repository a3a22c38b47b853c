"""What a GGUF file holds: its metadata and its tensors. Sizes are compared with the file before they are used.

The layout, all little-endian; a string is its length (uint64) and UTF-8:

    "GGUF", version (uint32), number of tensors (uint64), number of metadata keys (uint64)
    of each key: its name (string), the type of its value (uint32), the value; an array begins with the type (uint32)
        and the number (uint64) of its values
    of each tensor: its name (string), the number of its axes (uint32), their lengths (uint64 each, the last axis
        first), how it is stored (uint32), where it begins after the header (uint64)
    the tensors, each at a multiple of the alignment

The package gguf decodes the stored values. Its own reader trusts the sizes in a header, so it is not used.
"""

import functools
import math
import mmap
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

LARGEST_HEADER = 64 * 2**20
"""Most bytes of a header. A vocabulary of 250 thousand tokens with its merges has a fifth of this."""

VERSIONS = (2, 3)
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""The types of metadata, as the codes of ``struct``."""
_STRING, _ARRAY = 8, 9
_FLOATS = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype(ml_dtypes.bfloat16)}
_MOST_AXES, _LONGEST_NAME = 4, 256
_ROW, _PIECE = 2**14, 2**20
"""Numbers that are decoded together, and that are in memory twice. With longer or shorter rows gguf is slower."""


class GGUFTensor(NamedTuple):
    """Where a tensor is, and how it is stored."""

    shape: tuple[int, ...]  # as of a numpy array: GGUF has the axes in the other order
    kind: str  # the name in ``gguf.GGMLQuantizationType``: "F32", "Q4_1"
    block: int  # numbers in a block
    bytes: int  # bytes of a block
    place: int  # where it begins in the file

    @property
    def size(self) -> int:
        """Its bytes in the file."""
        return math.prod(self.shape) // self.block * self.bytes


class GGUFFile:
    """The metadata and the tensors of a GGUF file, by name.

    Args:
        path: the file.

    Raises:
        FileNotFoundError: if it does not exist.
        ImportError: if the package gguf is not installed.
        ValueError: if it is not a GGUF file, is cut short, or a size in its header does not fit the file.
    """

    def __init__(self, path: Path):
        self.path = path
        size = path.stat().st_size
        with open(path, "rb") as file:
            if file.read(4) != b"GGUF":
                raise ValueError(f"{path} is not a GGUF file: it does not begin with GGUF. Name another file")
            header = _Header(path, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), min(size, LARGEST_HEADER))
        with header.memory:
            n_tensors = header.begin()
            self.metadata: dict[str, Any] = header.named(header.pair, header.count("keys", 13))
            tensors: dict[str, GGUFTensor] = header.named(header.tensor, header.fits("tensors", n_tensors, 24))
            alignment = self.metadata.get("general.alignment", 32)
            if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
                raise header.damaged(f"general.alignment is {alignment!r:.100}, which is not a power of two")
            start = -(-header.place // alignment) * alignment
        self.tensors = {name: tensor._replace(place=start + tensor.place) for name, tensor in tensors.items()}
        for name, tensor in self.tensors.items():
            if (end := tensor.place + tensor.size) > size:
                raise header.damaged(f"{name} should end at byte {end}, but it has {size}")
        if (whole := sum(tensor.size for tensor in tensors.values())) > size:
            raise header.damaged(f"its tensors should have {whole} bytes, but it has {size}")

    def dtype(self, name: str) -> str:
        """The dtype to keep a tensor in: as stored, and float32 for what is quantised."""
        kind = self.tensors[name].kind
        return _FLOATS[kind].name if kind in _FLOATS else "float32"

    def read(self, name: str, out: np.ndarray) -> None:
        """Write a tensor into an array in C order of its shape. Raises ``ValueError`` if it is not finite."""
        flat, start = out.reshape(-1), 0
        for piece in self._pieces(self.tensors[name]):
            if not np.isfinite(piece).all():
                raise ValueError(f"{name} in {self.path} has NaN or infinite values: download the file again")
            flat[start : start + piece.size] = piece
            start += piece.size

    def _pieces(self, tensor: GGUFTensor) -> Iterator[np.ndarray]:
        """The numbers of a tensor in order, as flat arrays of at most ``_PIECE``."""
        stored = np.memmap(self.path, np.uint8, "r", tensor.place, (tensor.size,))
        if tensor.kind in _FLOATS:
            values = np.frombuffer(stored, _FLOATS[tensor.kind])
            yield from (values[start : start + _PIECE] for start in range(0, len(values), _PIECE))
            return
        row = max(1, _ROW // tensor.block) * tensor.bytes
        whole = tensor.size // row * row
        for rows in (stored[:whole].reshape(-1, row), stored[whole:].reshape(1, -1)):
            for start in range(0, len(rows) if rows.size else 0, _PIECE // _ROW):
                yield _decoded(np.asarray(rows[start : start + _PIECE // _ROW]), tensor.kind).reshape(-1)


class _Header:
    """Reads a header from its beginning. No length in it is believed before it is compared with what is left."""

    def __init__(self, path: Path, memory: mmap.mmap, end: int):
        self.path, self.memory, self.end, self.place = path, memory, end, 4

    def damaged(self, why: str) -> ValueError:
        return ValueError(f"{self.path} is cut short or damaged ({why}): download it again")

    def fits(self, what: str, number: int, each: int) -> int:
        """``number``, if as many items of ``each`` bytes are left."""
        if number * each > self.end - self.place:
            raise self.damaged(f"its header has {number} {what}, but {self.end - self.place} bytes are left for them")
        return number

    def number(self, code: str) -> Any:
        size = struct.calcsize(f"<{code}")
        if size > self.end - self.place:
            raise self.damaged("its header ends too early")
        (value,) = struct.unpack_from(f"<{code}", self.memory, self.place)
        self.place += size
        return value

    def count(self, what: str, each: int) -> int:
        """A number of items of at least ``each`` bytes, which begins them."""
        return self.fits(what, self.number("Q"), each)

    def begin(self) -> int:
        """What is before the metadata. Returns the number of tensors."""
        version = self.number("I")
        if version not in VERSIONS:
            kind = "big-endian" if version and not version & 0xFFFF else f"of version {version}"
            known = " and ".join(map(str, VERSIONS))
            raise ValueError(f"{self.path} is a GGUF file {kind}: the versions {known} can be read, little-endian")
        return self.number("Q")

    def string(self) -> str:
        length = self.count("bytes of a string", 1)
        text = self.memory[self.place : self.place + length]
        self.place += length
        try:
            return text.decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.damaged(f"a text in its header is not UTF-8: {error}") from error

    def name(self) -> str:
        """A string that can be printed in one line."""
        name = self.string()
        if not name.isprintable() or len(name) > _LONGEST_NAME:
            raise self.damaged(f"{name!r:.100} is not a name")
        return name

    def named(self, read: Callable[[], tuple[str, Any]], number: int) -> dict[str, Any]:
        """So many items with names, of which no two are equal."""
        found: dict[str, Any] = {}
        for _ in range(number):
            name, value = read()
            if name in found:
                raise self.damaged(f"the name {name} is there twice")
            found[name] = value
        return found

    def pair(self) -> tuple[str, Any]:
        """A key of the metadata and its value: a number, a string, or a list of either."""
        key, kind = self.name(), self.number("I")
        if kind != _ARRAY:
            return key, self.value(key, kind)
        kind = self.number("I")
        if kind == _STRING:
            return key, [self.string() for _ in range(self.count("strings", 8))]
        if kind not in _SCALARS:
            raise self.damaged(f"{key} is an array of the unknown type {kind}")
        size = struct.calcsize(f"<{_SCALARS[kind]}")
        number = self.count("numbers", size)
        values = np.frombuffer(self.memory[self.place : self.place + number * size], f"<{_SCALARS[kind]}").tolist()
        self.place += number * size
        return key, values

    def value(self, key: str, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind not in _SCALARS:
            raise self.damaged(f"{key} has the unknown type {kind}")
        return self.number(_SCALARS[kind])

    def tensor(self) -> tuple[str, GGUFTensor]:
        """The name of a tensor and where it is. Its place is counted from the end of the header."""
        name, axes = self.name(), self.number("I")
        if axes > _MOST_AXES:
            raise self.damaged(f"{name} has {axes} axes, but at most {_MOST_AXES} are possible")
        shape = tuple(self.number("Q") for _ in range(axes))[::-1]
        kind, block, size = _stored_as(self.path, name, self.number("I"))
        if not all(shape) or (shape and shape[-1] % block):
            raise self.damaged(f"{name} has the shape {list(shape)}, stored in blocks of {block}")
        return name, GGUFTensor(shape, kind, block, size, self.number("Q"))


def _package(path: Path) -> Any:
    try:
        import gguf
    except ImportError as error:
        raise ImportError(f"reading {path} needs the package gguf: pip install 'bilinear-jax[gguf]'") from error
    return gguf


def _stored_as(path: Path, name: str, number: int) -> tuple[str, int, int]:
    """Name, numbers in a block and bytes of a block of a way to store tensors."""
    gguf = _package(path)
    try:
        kind = gguf.GGMLQuantizationType(number)
        block, size = gguf.GGML_QUANT_SIZES[kind]
    except (KeyError, ValueError):
        kind, block, size = None, 1, 1
    if kind is None or not (kind.name in _FLOATS or _decodes(kind.name, size)):
        called = number if kind is None else kind.name
        raise ValueError(
            f"{path} stores {name} as {called}, which the package gguf does not decode: upgrade it, or name a file "
            "that is stored otherwise"
        )
    return kind.name, block, size


@functools.cache
def _decodes(kind: str, size: int) -> bool:
    """Whether the package gguf decodes what is stored so."""
    try:
        _decoded(np.zeros((1, size), np.uint8), kind)
    except NotImplementedError:
        return False
    return True


def _decoded(rows: np.ndarray, kind: str) -> np.ndarray:
    import gguf

    with np.errstate(all="ignore"):  # a scale that is not finite is found afterwards
        return gguf.quants.dequantize(rows, gguf.GGMLQuantizationType[kind])
