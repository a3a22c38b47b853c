"""GGUF files that are cut short, damaged, or whose headers lie: one clear line, and no memory for a lie."""

import re
import struct
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import bilinear_jax as bj
from weights_convert.gguf import read_gguf


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def begin(tensors: int = 0, keys: int = 0, version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, keys)


def info(shape=(4,), kind: int = 0, place: int = 0, name: str = "a", axes: int | None = None) -> bytes:
    sizes = struct.pack(f"<I{len(shape)}Q", len(shape) if axes is None else axes, *shape)
    return text(name) + sizes + struct.pack("<IQ", kind, place)


LIES = {
    "empty": (b"", "it does not begin with GGUF"),
    "another file": (b"PK\3\4" + bytes(40), "it does not begin with GGUF"),
    "nothing more": (b"GGUF", "its header ends too early"),
    "version 1": (begin(version=1), "of version 1"),
    "big-endian": (begin(version=3 << 24), "big-endian"),
    "2^60 keys": (begin(keys=2**60), "1152921504606846976 keys, but 0 bytes are left"),
    "2^60 tensors": (begin(tensors=2**60), "1152921504606846976 tensors, but 0 bytes are left"),
    "a key of 2^62 bytes": (
        begin(keys=1) + struct.pack("<Q", 2**62) + bytes(20),
        "4611686018427387904 bytes of a string",
    ),
    "2^61 strings": (begin(keys=1) + text("k") + struct.pack("<IIQ", 9, 8, 2**61), "2305843009213693952 strings"),
    "2^61 numbers": (begin(keys=1) + text("k") + struct.pack("<IIQ", 9, 6, 2**61), "2305843009213693952 numbers"),
    "an array of arrays": (begin(keys=1) + text("k") + struct.pack("<IIQ", 9, 9, 1), "array of the unknown type 9"),
    "an unknown type": (begin(keys=1) + text("k") + struct.pack("<IQ", 77, 0), "k has the unknown type 77"),
    "no UTF-8": (begin(keys=1) + struct.pack("<Q", 1) + b"\xff" + bytes(20), "is not UTF-8"),
    "2^31 axes": (begin(tensors=1) + info(axes=2**31), "a has 2147483648 axes"),
    "2^62 numbers in a tensor": (begin(tensors=1) + info((2**31, 2**31)) + bytes(99), "a should end at byte"),
    "a shape beyond 64 bits": (begin(tensors=1) + info((2**63, 2**63, 2**63)) + bytes(99), "a should end at byte"),
    "no numbers": (begin(tensors=1) + info((0, 4)) + bytes(99), "a has the shape [4, 0]"),
    "half a block": (
        begin(tensors=1) + info((33,), kind=8) + bytes(99),
        "a has the shape [33], stored in blocks of 32",
    ),
    "an unknown quantisation": (begin(tensors=1) + info(kind=999) + bytes(99), "stores a as 999"),
    "integers": (begin(tensors=1) + info(kind=26) + bytes(99), "stores a as I32"),
    "a place beyond the end": (begin(tensors=1) + info(place=2**63) + bytes(99), "a should end at byte"),
    "one place for all": (
        begin(tensors=40) + b"".join(info((16,), name=f"{i}") for i in range(40)) + bytes(96),
        "its tensors should have 2560 bytes",
    ),
    "a key that is there twice": (
        begin(keys=2) + (text("k") + struct.pack("<IB", 0, 1)) * 2,
        "the name k is there twice",
    ),
    "a tensor that is there twice": (begin(tensors=2) + info() * 2 + bytes(99), "the name a is there twice"),
    "a name of two lines": (begin(tensors=1) + info(name="a\nb") + bytes(99), r"'a\nb' is not a name"),
    "a name of a megabyte": (begin(tensors=1) + info(name="a" * 2**20) + bytes(99), "aaa is not a name"),
    "an odd alignment": (
        begin(keys=1) + text("general.alignment") + struct.pack("<II", 4, 24),
        "general.alignment is 24, which is not a power of two",
    ),
    "an alignment of 0": (begin(keys=1) + text("general.alignment") + struct.pack("<II", 4, 0), "alignment is 0"),
}


@pytest.mark.parametrize(("content", "message"), LIES.values(), ids=LIES)
def test_a_header_that_lies_is_one_line(tmp_path, content, message):
    path = tmp_path / "m.gguf"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        bj.load(path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600


def test_a_header_that_lies_takes_no_memory(tmp_path):
    """In a process that may take half a gigabyte more than it has, none of the lies raises a MemoryError."""
    for number, (content, _) in enumerate(LIES.values()):
        (tmp_path / f"{number}.gguf").write_bytes(content)
    code = f"""
import resource
from pathlib import Path
import gguf
from weights_convert.gguf import read_gguf
taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (taken + 2**29,) * 2)
for path in Path({str(tmp_path)!r}).iterdir():
    try:
        read_gguf(path)
    except ValueError as error:
        print(error)
    else:
        raise SystemExit(f"{{path}} was read")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == len(LIES)


def test_a_file_that_is_cut_short_anywhere_is_one_line(tmp_path, small):
    path = tmp_path / "m.gguf"
    for end in [*range(0, 2600, 13), *range(2600, len(small) - 32, 997), len(small) - 33]:
        path.write_bytes(small[:end])
        with pytest.raises(ValueError, match=r"cut short or damaged|does not begin with GGUF") as caught:
            read_gguf(path)
        assert "\n" not in str(caught.value)


@settings(deadline=None, max_examples=100)
@given(data=st.data())
def test_a_damaged_header_is_read_or_one_line(tmp_path_factory, small, data):
    content = bytearray(small)
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, 2600))
        content[place] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.getbasetemp() / "damaged.gguf"
    path.write_bytes(bytes(content))
    try:
        read_gguf(path)
    except ValueError as error:
        assert "\n" not in str(error)


def test_without_the_package_the_error_says_what_to_install(tmp_path, monkeypatch, small):
    (tmp_path / "m.gguf").write_bytes(small)
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ImportError, match=re.escape("pip install 'bilinear-jax[gguf]'")):
        bj.load(tmp_path / "m.gguf")
