"""Checksums are those of hashlib, and a record notices every change of its own."""

import hashlib
import json

import numpy as np
import pytest

from bilinear_jax.store import checksums


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def test_they_are_those_of_hashlib(tmp_path):
    (tmp_path / "file").write_bytes(b"\x00\xffabc")
    assert checksums.of_file(tmp_path / "file") == sha256(b"\x00\xffabc")
    assert checksums.of_json({"b": [1.5, None], "a": "é"}) == sha256(b'{"a": "\\u00e9", "b": [1.5, null]}')
    assert checksums.of_texts(["ab", "é"]) == sha256(b"2 ab2 \xc3\xa9")


@pytest.mark.parametrize("dtype", ["<u2", ">u2", "<i4", "<f4"])
def test_arrays_in_any_memory_layout(dtype):
    array = np.arange(12).reshape(3, 4).astype(dtype)
    little = array.dtype.newbyteorder("<")
    expected = sha256(f"{little.str} (3, 4)".encode() + array.astype(little).tobytes())
    for same in (array, np.asfortranarray(array), np.stack([array, array], 2)[..., 0]):
        assert checksums.of_arrays(same) == expected
    assert checksums.of_arrays(array, array) == sha256(
        2 * (f"{little.str} (3, 4)".encode() + array.astype(little).tobytes())
    )


def test_large_arrays_are_hashed_in_parts():
    array = np.random.default_rng(0).integers(0, 9, 2**22 + 5).astype("<u2")
    assert checksums.of_arrays(array) == sha256(f"<u2 ({2**22 + 5},)".encode() + array.tobytes())


def test_a_record_notices_every_change():
    record = {"step": 3, "data": {"next_index": 41, 2: "two", 10: "ten"}, "parts": (1, 2.5), "none": None}
    sealed = json.loads(json.dumps(checksums.sealed(record)))
    assert checksums.intact(sealed) is True
    assert checksums.intact({key: value for key, value in sealed.items() if key != "sha256"}) is None
    changes = [{"step": 4}, {"data": sealed["data"] | {"next_index": 42}}, {"more": 1}, {"sha256": "0"}, {"none": 0}]
    for change in changes:
        assert checksums.intact(sealed | change) is False
    assert checksums.intact({"steps" if key == "step" else key: value for key, value in sealed.items()}) is False
    assert checksums.sealed(sealed) == sealed
