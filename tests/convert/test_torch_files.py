"""Files of torch.save: what they hold is read, what they ask for is not done."""

import os
import pickle
import zipfile
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from published import archive, ints, tensor, torch_file

from bilinear_jax.images.tensor import load_image_model
from bilinear_jax.nn.image import ImageClassifier
from weights_convert.image import read_image_model
from weights_convert.pickled import Foreign, read_torch, state_dict

FILES = Path(__file__).parents[1] / "data" / "torch"  # written by torch 2.13, see made_by.py there


@pytest.fixture(scope="module")
def expected():
    from safetensors.numpy import load_file

    return load_file(FILES / "expected.safetensors")


def test_values():
    """Views that share a storage, every kind of number, and what is no tensor."""
    got = read_torch(FILES / "values.pt")
    base = np.arange(12, dtype=np.float32).reshape(3, 4)
    wanted = {
        **{"transposed": base.T, "part": base[1:, 2:], "whole": base, "half": base.astype(np.float16)},
        **{
            "long": np.arange(3),
            "parameter": base[:1],
            "scalar": np.float32(2.5),
            "empty": np.zeros((0, 3), np.float32),
        },
    }
    for name, value in wanted.items():
        np.testing.assert_array_equal(got[name], value, err_msg=name)
        assert got[name].dtype == value.dtype
    np.testing.assert_array_equal(got["bfloat16"].astype(np.float32), base + 0.5)
    assert got["number"] == 3 and got["words"] == ["a", ("b", None)]
    with pytest.raises(ValueError, match="read-only"):
        got["whole"][0, 0] = 1


@pytest.mark.parametrize("name", ["state-dict.pt", "module.pt"])
def test_a_state_dict_and_a_module_saved_whole(name, expected):
    config, params = load_image_model(FILES / name, residual=True)
    logits = ImageClassifier(config).apply({"params": params}, jnp.asarray(expected["x"]))
    np.testing.assert_allclose(np.asarray(logits), expected["logits"], atol=1e-6)
    assert config.bias and config.n_layer == 2


# What a file may not do


class Calls:
    """Pickled, it is a call."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", range(6))
def test_nothing_that_a_file_names_is_run(tmp_path, protocol):
    marker = tmp_path / "it-ran"
    calls = [Calls(os.system, f"touch {marker}"), Calls(eval, f"open({str(marker)!r}, 'w')"), Calls(open, marker, "w")]
    got = read_torch(archive(tmp_path / "model.pt", pickle.dumps({"a": calls}, protocol)))
    assert not marker.exists()
    assert all(isinstance(one, Foreign) for one in got["a"]) and got["a"][0].arguments == (f"touch {marker}",)


def test_nor_through_what_it_builds(tmp_path):
    """A call of the result of a call, an attribute of a module, and state set on what is looked up."""
    marker = tmp_path / "it-ran"
    getter = b"cbuiltins\ngetattr\n(cos\nsystem\nS'__call__'\ntR(S'touch %s'\ntR." % str(marker).encode()
    nested = b"cos\npath.os.system\n(S'touch %s'\ntR." % str(marker).encode()
    state = b"ctorch._utils\n_rebuild_parameter\n(N}S'__defaults__'\n(I1\ntstb."
    for data in (getter, b"\x80\x04" + nested):
        read_torch(archive(tmp_path / "model.pt", data))
    with pytest.raises(ValueError, match="cannot be read"):
        read_torch(archive(tmp_path / "model.pt", state))
    assert not marker.exists()


FOUR = np.arange(4, dtype=np.float32).tobytes()


def test_a_tensor_written_by_hand(tmp_path):
    """So that the refusals below are of what is wrong with each, not of how they are written."""
    got = read_torch(archive(tmp_path / "model.pt", tensor(ints(2, 2), ints(2, 1)), **{"0": FOUR}))
    np.testing.assert_array_equal(got, [[0, 1], [2, 3]])


@pytest.mark.parametrize(
    ("data", "message"),
    {
        "reaches beyond": (tensor(ints(2, 3), ints(2, 1)), "reaches beyond"),
        "starts beyond": (tensor(ints(1), ints(1), offset=4), "reaches beyond"),
        "starts before": (tensor(ints(1), ints(1), offset=-1), "has a bad tensor: storage _Storage"),
        "steps back": (tensor(ints(2), ints(-1), offset=2), "has a bad tensor: storage _Storage"),
        "one number a billion times": (tensor(ints(10**9), ints(0)), "reaches beyond"),
        "another length": (tensor(ints(2), ints(1), count=5), "has 16 bytes, not 20"),
        "no such entry": (tensor(ints(2), ints(1), key="7"), "lacks the values"),
        "an entry elsewhere": (tensor(ints(2), ints(1), key="../data.pkl"), "lacks the values"),
        "an unknown kind": (tensor(ints(2), ints(1), kind="ComplexFloatStorage"), "save it as float32"),
        "cut short": (tensor(ints(2), ints(1))[:-40], "damaged"),
        "a table of two billion": (b"Ir\xff\xff\xff\x7f.", "damaged"),
        "another persistent id": (b"(S'module'\nNtQ.", "unknown way"),
        "nothing": (b"", "damaged"),
        "tuples of tuples": (b"(I1\ntp0\n" + b"(g0\ng0\ntp0\n" * 60 + b"(g0\nI1\nd.", "damaged"),
        "through a list": (b")p0\n" + b"(lp1\ng0\nag0\nactorch\nSize\n(g1\ntRp0\n" * 60 + b"(g0\nI1\nd.", "damaged"),
    }.values(),
)
def test_damaged_contents(tmp_path, data, message):
    with pytest.raises(ValueError, match=message):
        read_torch(archive(tmp_path / "model.pt", data, **{"0": FOUR}))


def test_files_that_are_damaged_or_something_else(tmp_path):
    whole = (FILES / "state-dict.pt").read_bytes()
    for cut in (0, 1, 100, len(whole) // 2, len(whole) - 1):
        (tmp_path / "cut.pt").write_bytes(whole[:cut])
        with pytest.raises(ValueError, match="download it again"):
            read_torch(tmp_path / "cut.pt")
    with pytest.raises(ValueError, match=r"before 1\.6"):
        read_torch(FILES / "before-1.6.pt")
    with pytest.raises(FileNotFoundError, match="there is no file"):
        read_torch(tmp_path / "none.pt")
    with zipfile.ZipFile(tmp_path / "other.pt", "w") as file:
        file.writestr("hello.txt", "hello")
    with pytest.raises(ValueError, match="not one that torch wrote"):
        read_torch(tmp_path / "other.pt")


def test_a_changed_value_is_noticed(tmp_path):
    whole = bytearray((FILES / "state-dict.pt").read_bytes())
    place = whole.index(read_torch(FILES / "state-dict.pt")["embed.weight"].tobytes())
    whole[place + 5] ^= 1
    (tmp_path / "changed.pt").write_bytes(whole)
    with pytest.raises(ValueError, match="CRC"):
        read_torch(tmp_path / "changed.pt")


def test_a_compressed_storage_is_refused(tmp_path):
    """A file of a megabyte could hold a terabyte of zeros."""
    with zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("model/data.pkl", tensor(ints(2**22), ints(1), count=2**22))
        file.writestr("model/data/0", bytes(2**24))
    with pytest.raises(ValueError, match="compressed"):
        read_torch(tmp_path / "bomb.pt")


def test_what_is_no_image_model(tmp_path, expected):
    def saved(**changes):
        """The module's file with other arrays: float64 tensors, written by hand."""
        arrays = {name: value for name, value in expected.items() if name not in ("x", "logits")} | changes
        arrays = {name: np.asarray(value, np.float64) for name, value in arrays.items() if value is not None}
        return torch_file(tmp_path / "model.pt", arrays)

    assert read_image_model(saved())[0]["d_hidden"] == 4
    with pytest.raises(ValueError, match=r"not in the file: \['head.weight'\]"):
        read_image_model(saved(**{"head.weight": None}))
    with pytest.raises(ValueError, match=r"not in the model: \['tail.weight'\]"):
        read_image_model(saved(**{"tail.weight": np.zeros(2)}))
    with pytest.raises(ValueError, match=r"blocks.1.weight has \[8, 5\], expected \[8, 4\]"):
        read_image_model(saved(**{"blocks.1.weight": np.zeros((8, 5))}))
    with pytest.raises(ValueError, match="not finite"):
        read_image_model(saved(**{"head.weight": np.full((3, 4), np.nan)}))
    numbered = archive(tmp_path / "model.pt", b"(I1\n" + tensor(ints(2), ints(1))[:-1] + b"d.", **{"0": FOUR})
    with pytest.raises(ValueError, match="are not all texts"):
        state_dict(read_torch(numbered))
    with pytest.raises(ValueError, match="holds no state dict"):
        state_dict(read_torch(archive(tmp_path / "model.pt", pickle.dumps([1, 2]))))
