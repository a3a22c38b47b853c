"""Write arrays as a file of ``torch.save``, without torch.

The file is a zip archive: ``data.pkl`` is a pickle of a dict of tensors, and ``data/0``, ``data/1`` ... hold their
numbers. For each tensor, the pickle names ``torch._utils._rebuild_tensor_v2``, so ``torch.load(weights_only=True)``
reads it. It is put together here from the opcodes of protocol 2, because a pickler would have to import torch.

Source: the zip format of torch 1.6 and later (``torch/serialization.py``); Python's ``pickletools``.
"""

import math
import pickle
import zipfile
from collections.abc import Mapping
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

_STORAGES = {
    **{"float64": "DoubleStorage", "float32": "FloatStorage", "float16": "HalfStorage", "bfloat16": "BFloat16Storage"},
    **{"int64": "LongStorage", "int32": "IntStorage"},
}
"""The storages of torch, by the dtypes of numpy."""


def write_torch(path: str | Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Write a dict of tensors that ``torch.load`` and ``read_torch`` read. It replaces an older file.

    Args:
        path: the file.
        tensors: arrays of any shape and memory layout, by name.

    Raises:
        ValueError: for a dtype other than float64, float32, float16, bfloat16, int64 and int32.

    Example:
        >>> import tempfile
        >>> from weights_convert.pickled import read_torch
        >>> path = Path(tempfile.mkdtemp(), "ae.pt")
        >>> write_torch(path, {"k": np.array(6, np.int32), "b_dec": np.ones(2, np.float16)})
        >>> {name: value.tolist() for name, value in read_torch(path).items()}
        {'k': 6, 'b_dec': [1.0, 1.0]}
    """
    for name, value in tensors.items():
        if value.dtype.name not in _STORAGES:
            raise ValueError(f"{name} is {value.dtype}, but torch files are written of {', '.join(_STORAGES)}: cast it")
    pieces = [_tensor(name, str(i), value) for i, (name, value) in enumerate(tensors.items())]
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:

        def put(name: str, data: Any) -> None:
            archive.writestr(zipfile.ZipInfo(f"{Path(path).stem}/{name}"), data)  # its date is fixed: equal files

        put("data.pkl", b"\x80\x02}" + b"".join(pieces) + b".")
        put("byteorder", b"little")
        for i, value in enumerate(tensors.values()):
            plain = np.asarray(value, value.dtype.newbyteorder("<"), order="C")
            put(f"data/{i}", plain.reshape(-1).view(np.uint8).data)
        put("version", b"3\n")


def _tensor(name: str, key: str, value: np.ndarray) -> bytes:
    """The opcodes that put one tensor, as a view of the whole storage ``key``, into the dict on the stack."""
    strides = tuple(accumulate(value.shape[:0:-1], lambda a, b: a * b, initial=1))[::-1] if value.ndim else ()
    storage = [_plain("storage"), _named("torch", _STORAGES[value.dtype.name])]
    storage += [_plain(item) for item in (key, "cpu", math.prod(value.shape))]
    hooks = _named("collections", "OrderedDict") + b")R"  # of the backward pass: none
    arguments = [b"(" + b"".join(storage) + b"tQ", _plain(0), _plain(value.shape), _plain(strides), b"\x89", hooks]
    rebuild = _named("torch._utils", "_rebuild_tensor_v2")
    return _plain(name) + rebuild + b"(" + b"".join(arguments) + b"tRs"


def _plain(value: Any) -> bytes:
    """The opcodes of a text, a number or a tuple of numbers: a pickle without its first and last opcode."""
    return pickle.dumps(value, 2)[2:-1]


def _named(module: str, name: str) -> bytes:
    """The opcode of a global name."""
    return f"c{module}\n{name}\n".encode()
