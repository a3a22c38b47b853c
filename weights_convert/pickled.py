"""Read files of ``torch.save`` without torch, and without running any code that they name.

Such a file is a zip archive. It holds ``data.pkl``, a pickle of the object without its tensors, and one entry for each
tensor storage. A pickle is a program: loading it calls whatever it names. Here it can only name the few things that
tensors are made of, and those are functions of this module on numpy arrays. Every other name becomes a ``Foreign``,
which records as data what the object would have been.

Source: the zip format of torch 1.6 and later (``torch/serialization.py``); Python's ``pickle`` and ``pickletools``.
"""

import collections
import dataclasses
import io
import math
import pickle
import pickletools
import reprlib
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

LARGEST_PICKLE = 64 * 2**20
"""Most bytes of ``data.pkl``. The largest published models have less than one megabyte."""

LARGEST_EXPANSION = 20_000_000
"""Most objects in the nested parts of a pickle. Each part counts as often as it is referred to."""

LARGEST_REPEATED = 256 * 2**20
"""Most bytes by which the tensors of a file, written out, may exceed their storages. Those of ``torch.expand`` do: a
few bytes of a file can stand for any number."""

_DAMAGED = (zipfile.BadZipFile, zlib.error, struct.error, EOFError, OSError, NotImplementedError, RuntimeError)
"""The errors of ``zipfile`` for a damaged file."""

_DTYPES = {
    "FloatStorage": np.dtype(np.float32),
    "DoubleStorage": np.dtype(np.float64),
    "HalfStorage": np.dtype(np.float16),
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "LongStorage": np.dtype(np.int64),
    "IntStorage": np.dtype(np.int32),
    "ShortStorage": np.dtype(np.int16),
    "CharStorage": np.dtype(np.int8),
    "ByteStorage": np.dtype(np.uint8),
    "BoolStorage": np.dtype(np.bool_),
}


@dataclasses.dataclass(eq=False)
class Foreign:
    """Something that a file names and that was not looked up. It keeps, as data, what the object is made of."""

    name: str  # "module.attribute"
    arguments: tuple = ()  # the arguments of its call
    state: Any = None  # the state that sets its attributes


def read_torch(path: str | Path) -> Any:
    """Read what ``torch.save`` wrote. Tensors become numpy arrays, objects of other classes ``Foreign``.

    The arrays are read-only and memory-mapped. The checksum of each storage is verified. Nothing that the file names is
    imported or called.

    Raises:
        FileNotFoundError: if the file does not exist.
        ValueError: if the file is damaged or was not written by ``torch.save``, if a tensor reaches beyond its storage,
            if expanded tensors would take more than ``LARGEST_REPEATED``, if the pickle cannot be read, or if a storage
            is compressed (torch never compresses, and a small compressed file could become a huge one).
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        with zipfile.ZipFile(path) as archive:
            return _Archive(path, archive).load()
    except _DAMAGED as error:
        raise ValueError(f"{path} ({path.stat().st_size} bytes) is {_what_else(path)} ({error})") from error


def state_dict(loaded: Any, fits: Callable[[str], Any] = lambda name: True) -> dict[str, np.ndarray]:
    """The named arrays in the result of ``read_torch``: a state dict or a whole module, or one that a dict holds.

    Such a dict is a checkpoint of a training run: the model lies beside the state of the optimiser and more. Of several
    state dicts, the one is meant that has a name that ``fits``.

    Raises:
        ValueError: if there is none, or if it is not clear which is meant. The message names what there is.
    """
    places = [("the file itself", loaded), *(loaded.items() if isinstance(loaded, dict) else ())]
    found = [(place, named) for place, value in places if (named := _named(value))]
    meant = [one for one in found if any(isinstance(name, str) and fits(name) for name in one[1])] or found
    if not meant:
        what = sorted(map(str, loaded)) if isinstance(loaded, dict) else getattr(loaded, "name", type(loaded).__name__)
        raise ValueError(
            f"the file holds no state dict and no module, but {what}: save model.state_dict() with torch.save"
        )
    if len(meant) > 1:
        raise ValueError(
            f"the file holds {len(meant)} state dicts, in {reprlib.repr([place for place, _ in meant])}, and does not "
            "say which is the model: save the one that you mean alone, with torch.save"
        )
    named = meant[0][1]
    if not all(isinstance(name, str) for name in named):
        raise ValueError(f"the names in the file's state dict are not all texts: {reprlib.repr(list(named))}")
    return named


def _named(loaded: Any, prefix: str = "", depth: int = 0) -> dict[str, np.ndarray]:
    if depth > 100:
        raise ValueError("the file's modules are nested more than 100 deep: it is damaged")
    if isinstance(loaded, Foreign) and isinstance(loaded.state, dict) and "_parameters" in loaded.state:
        found = {}
        for kind in ("_parameters", "_buffers"):
            found |= {prefix + name: value for name, value in _items(loaded.state, kind) if value is not None}
        for name, module in _items(loaded.state, "_modules"):
            found |= _named(module, f"{prefix}{name}.", depth + 1)
    elif isinstance(loaded, dict) and not prefix:
        found = dict(loaded)
    else:
        return {}
    return {name: value for name, value in found.items() if isinstance(value, np.ndarray)}


def _items(state: dict, kind: str):
    value = state.get(kind)
    return value.items() if isinstance(value, dict) else ()


class _Storage(NamedTuple):
    values: np.ndarray  # one-dimensional


class _Archive:
    """One open file of ``torch.save``."""

    def __init__(self, path: Path, archive: zipfile.ZipFile):
        self.path, self.archive = path, archive
        names = archive.namelist()
        pickles = [name for name in names if name == "data.pkl" or name.endswith("/data.pkl")]
        if len(pickles) != 1 or len(set(names)) != len(names):
            raise ValueError(f"{path} is a zip archive, but not one that torch wrote: {_what_else(path)}")
        self.root = pickles[0].removesuffix("data.pkl")
        self.storages: dict[str, np.ndarray] = {}
        order = self._bytes("byteorder", 16).strip() if f"{self.root}byteorder" in names else b"little"
        if order not in (b"little", b"big"):
            raise ValueError(f"{path} has an unknown byte order {order!r}: download it again")
        self.order = "<" if order == b"little" else ">"

    def load(self) -> Any:
        data = self._bytes("data.pkl", LARGEST_PICKLE)
        self._check_size(data)
        try:
            return _Unpickler(self, data).load()
        except (
            pickle.UnpicklingError,
            EOFError,
            AttributeError,
            KeyError,
            IndexError,
            TypeError,
            UnicodeDecodeError,
            OverflowError,
            MemoryError,
            RecursionError,
        ) as error:
            raise ValueError(
                f"the pickle in {self.path} cannot be read ({error!r}): download the file again"
            ) from error

    def _check_size(self, data: bytes) -> None:
        try:
            _check_expansion(data)
        except Exception as error:  # a broken pickle can raise any error here
            raise ValueError(f"the pickle in {self.path} is damaged ({error}): download the file again") from error

    def _bytes(self, name: str, largest: int) -> bytes:
        info = self.archive.getinfo(self.root + name)
        if info.file_size > largest:
            raise ValueError(f"{name} in {self.path} has {info.file_size} bytes, but at most {largest} are read")
        with self.archive.open(info) as entry:
            data = entry.read(largest + 1)
        if len(data) != info.file_size:
            raise ValueError(f"{name} in {self.path} is cut short: download the file again")
        return data

    def storage(self, name: str, key: str, count: int) -> np.ndarray:
        """The numbers of one storage, memory-mapped, with its checksum verified."""
        if name not in _DTYPES:
            raise ValueError(f"{self.path} has a tensor of {name}: save it as float32, float16 or bfloat16")
        dtype = _DTYPES[name].newbyteorder(self.order) if _DTYPES[name].kind != "V" else _DTYPES[name]
        if key not in self.storages:
            entry = f"{self.root}data/{key}"
            if entry not in self.archive.NameToInfo:
                raise ValueError(f"{self.path} lacks the values of a tensor ({entry}): download it again")
            self.storages[key] = self._mapped(self.archive.getinfo(entry))
        raw = self.storages[key]
        if len(raw) != count * dtype.itemsize:
            raise ValueError(
                f"data/{key} in {self.path} has {len(raw)} bytes, not {count * dtype.itemsize}: download it again"
            )
        return raw.view(dtype)

    def _mapped(self, info: zipfile.ZipInfo) -> np.ndarray:
        if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size:
            raise ValueError(f"{info.filename} in {self.path} is compressed, but torch never compresses: save it again")
        with self.archive.open(info) as entry:  # reading to the end verifies the checksum
            while entry.read(2**24):
                pass
        if not info.file_size:
            return np.zeros(0, np.uint8)
        with open(self.path, "rb") as file:
            file.seek(info.header_offset)
            header = struct.unpack("<4s5H3L2H", file.read(30))
        start = info.header_offset + 30 + header[-2] + header[-1]
        return np.memmap(self.path, np.uint8, "r", start, (info.file_size,))


def _check_expansion(data: bytes) -> None:
    """Raise ``ValueError`` for a small pickle that would take endless time or memory.

    Such a pickle can ask for a table of any length with one large index; a normal one counts up from 0. It can also
    nest
    tuples that each hold the previous one twice: a hash of the outermost then takes 2^depth steps. So this function
    runs the stack machine of the pickle with only sizes on its stack. Each size is in a list of length 1, because it
    can grow.
    """
    stack: list[list[int] | None] = []  # None: a mark
    memo: dict[Any, list[int]] = {}
    total = 0
    for opcode, argument, _ in pickletools.genops(data):
        if "PUT" in opcode.name or opcode.name == "MEMOIZE":
            index = len(memo) if argument is None else int(str(argument))
            if index > len(data):
                raise ValueError(f"it gives an object the index {index}")
            memo[index] = stack[-1] or [1]
        elif opcode.name.endswith("GET"):
            stack.append(memo[int(str(argument))])
        elif opcode.name == "DUP":
            stack.append(stack[-1])
        elif opcode.name == "MARK":
            stack.append(None)
        else:
            before = opcode.stack_before
            parts: list[list[int]] = []
            if pickletools.markobject in before:
                while (part := stack.pop()) is not None:
                    parts.append(part)
                before = before[: before.index(pickletools.markobject)]
            parts += [part for _ in before if (part := stack.pop()) is not None]
            if opcode.stack_after:
                grows = opcode.name in ("APPEND", "APPENDS", "SETITEM", "SETITEMS", "ADDITEMS", "BUILD")
                size = parts.pop() if grows else [1]
                added = sum(part[0] for part in parts)
                size[0] += added
                total += added
                if total > LARGEST_EXPANSION:
                    raise ValueError(f"unfolded it would have more than {LARGEST_EXPANSION} parts")
                stack.append(size)


class _Unpickler(pickle.Unpickler):
    """An unpickler that maps names to functions of this module or to ``Foreign``. It imports nothing."""

    def __init__(self, archive: _Archive, data: bytes):
        super().__init__(io.BytesIO(data))
        self._archive = archive
        self._repeated = 0  # bytes by which tensors exceed their storages

    def find_class(self, module: str, name: str) -> Any:
        known = {
            ("collections", "OrderedDict"): collections.OrderedDict,
            ("torch", "Size"): tuple,
            ("torch._utils", "_rebuild_tensor_v2"): _Call(self._tensor),
            ("torch._utils", "_rebuild_parameter"): _Call(lambda data, *rest: data),
        }
        if (module, name) in known:
            return known[module, name]
        if module in ("torch", "torch.storage") and name.endswith("Storage"):
            return _foreign(name)
        return _foreign(f"{module}.{name}")

    def persistent_load(self, pid: Any) -> _Storage:
        match pid:
            case ("storage", kind, str(key), str(), int(count)) if isinstance(kind, type) and count >= 0:
                return _Storage(self._archive.storage(kind.__name__, key, count))
        raise ValueError(f"{self._archive.path} refers to a storage in an unknown way: {reprlib.repr(pid)}")

    def _tensor(self, storage, offset, size, stride, *rest) -> np.ndarray:
        values = storage.values if isinstance(storage, _Storage) else None
        numbers = (offset, *size, *stride)
        if values is None or len(size) != len(stride) or not all(type(n) is int and n >= 0 for n in numbers):
            raise ValueError(
                f"{self._archive.path} has a bad tensor: storage {type(storage).__name__}, {reprlib.repr(numbers)}"
            )
        count = math.prod(size)
        last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
        if not count:
            return np.zeros(size, values.dtype)
        if last >= len(values):
            raise ValueError(
                f"{self._archive.path} has a tensor {list(size)} that reaches beyond its {len(values)} values: "
                "download it again"
            )
        self._repeated += max(count - len(values), 0) * values.dtype.itemsize
        if self._repeated > LARGEST_REPEATED:
            raise ValueError(
                f"{self._archive.path} has expanded tensors: one, {list(size)}, repeats {len(values)} values. Written "
                f"out they would take more than {LARGEST_REPEATED} bytes: if you trust the file, save contiguous "
                "tensors again in torch"
            )
        strides = [step * values.dtype.itemsize for step in stride]
        return np.lib.stride_tricks.as_strided(values[offset:], size, strides, writeable=False)


class _Call:
    """A function that a pickle may call but not change. A pickle could set the attributes of a plain function."""

    __slots__ = ("_function",)

    def __init__(self, function):
        self._function = function

    def __call__(self, *arguments):
        return self._function(*arguments)

    def __setstate__(self, state):
        raise pickle.UnpicklingError("a function has no state")


def _foreign(full_name: str) -> type:
    """A class whose instances keep what they are given. Each call makes a new class, so that changes stay separate."""

    class Kept(Foreign):
        def __new__(cls, *arguments, **options):
            return super().__new__(cls)

        def __init__(self, *arguments, **options):
            super().__init__(full_name, arguments)

        def __setstate__(self, state):
            self.name, self.state = full_name, state

        def __call__(self, *arguments):
            return Foreign(full_name, arguments)

        def append(self, item):
            self.state = self.state if isinstance(self.state, list) else []
            self.state.append(item)

        def __setitem__(self, key, value):
            self.state = self.state if isinstance(self.state, dict) else {}
            self.state[key] = value

    Kept.__name__ = full_name
    return Kept


def _what_else(path: Path) -> str:
    with open(path, "rb") as file:
        start = file.read(2)
    if start == b"PK":
        return "a damaged zip archive: download it again"
    if start[:1] == b"\x80":
        return (
            "in torch's format before 1.6, or a bare pickle: if you trust it, load it in torch and torch.save it again"
        )
    return "not a file of torch.save: check the name, or download it again"
