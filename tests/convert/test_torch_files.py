"""Files of torch.save: what they hold is read, what they ask for is not done."""

import os
import pickle
import zipfile
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import published
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from published import archive, ints, tensor, torch_file
from safetensors.numpy import save_file

from bilinear_jax.images.tensor import load_image_model
from bilinear_jax.nn.image import ImageClassifier
from weights_convert.image import read_image_model
from weights_convert.pickled import LARGEST_REPEATED, Foreign, read_torch, state_dict
from weights_convert.sae import read_sae
from weights_convert.transformer import read_transformer

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
        "one number a billion times": (tensor(ints(10**9), ints(0)), "expanded tensors.*repeats 4 values"),
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


# Files as torch's users have them


def saved_as(expected) -> dict[str, np.ndarray]:
    return {name: value for name, value in expected.items() if name not in ("x", "logits")}


def same_params(path, expected) -> bool:
    """Whether a file is read as the weights of ``expected.safetensors``, to the last bit."""
    config, params = read_image_model(path)
    layers, arrays = params["layers"], saved_as(expected)
    got = {"embed.weight": params["w_e"], "head.weight": params["w_u"]}
    got |= {f"blocks.{n}.weight": np.concatenate([layers["w_l"][n], layers["w_r"][n]]) for n in range(2)}
    got |= {f"blocks.{n}.bias": np.concatenate([layers["b_l"][n], layers["b_r"][n]]) for n in range(2)}
    return config["n_layer"] == 2 and all(np.array_equal(got[name], arrays[name]) for name in arrays)


@pytest.mark.parametrize("name", ["state-dict.pt", "module.pt", "checkpoint.pt", "wrapped-module.pt"])
def test_what_torch_wrote_holds_the_same_weights(name, expected):
    """checkpoint.pt: names with module._orig_mod., beside the state of an optimiser, an epoch and a tensor."""
    assert same_params(FILES / name, expected)


def test_an_expanded_tensor_is_what_torch_loads(expected):
    params = read_image_model(FILES / "expanded.pt")[1]
    np.testing.assert_array_equal(params["w_u"], np.repeat(expected["head.weight"][1:2], 3, axis=0))
    np.testing.assert_array_equal(params["w_e"], expected["embed.weight"])


@settings(deadline=None)
@given(
    size=st.lists(st.integers(0, 4), max_size=3),
    stride=st.lists(st.integers(0, 4), min_size=3, max_size=3),
    offset=st.integers(0, 8),
)
def test_any_strides(tmp_path_factory, size, stride, offset):
    """By the definition: the value at an index is that at offset + index . stride of the storage."""
    path = tmp_path_factory.getbasetemp() / "strided.pt"
    storage = np.arange(20, dtype=np.float32)
    strides = stride[: len(size)]
    data = tensor(*(ints(*given) if given else "(t" for given in (size, strides)), offset=offset, count=20)
    archive(path, data, **{"0": storage.tobytes()})
    places = [offset + int(np.dot(index, strides)) for index in np.ndindex(*size)]
    if places and max(places) >= 20:
        with pytest.raises(ValueError, match="reaches beyond its 20 values"):
            read_torch(path)
    else:
        np.testing.assert_array_equal(read_torch(path), storage[places].reshape(size))


def test_what_expansion_may_cost(tmp_path):
    """Of all tensors together, each of which is small enough."""
    step = LARGEST_REPEATED // 4 // 4

    def expanded(number):
        parts = (f"S'{n}'\n".encode() + tensor(ints(step), ints(0))[:-1] for n in range(number))
        return archive(tmp_path / "model.pt", b"(" + b"".join(parts) + b"d.", **{"0": FOUR})

    assert read_torch(expanded(4))["3"].shape == (step,)
    with pytest.raises(ValueError, match=r"would take more than 268435456 bytes: if you trust the file"):
        read_torch(expanded(5))


PREFIXES = ["_orig_mod.", "module.", "module._orig_mod.", "_orig_mod.module."]


def image_file(path, arrays):
    if path.suffix == ".safetensors":
        save_file(arrays, path)
        return path
    return torch_file(path, arrays)


@pytest.mark.parametrize("name", ["model.pt", "model.bin", "model.pth", "model.safetensors"])
@pytest.mark.parametrize("prefix", ["", *PREFIXES])
def test_an_image_model_under_a_prefix(tmp_path, expected, name, prefix):
    arrays = {prefix + key: value for key, value in saved_as(expected).items()}
    assert same_params(image_file(tmp_path / name, arrays), expected)


@pytest.mark.parametrize("pickled", [False, True])
@pytest.mark.parametrize("prefix", PREFIXES)
def test_a_transformer_and_an_sae_under_a_prefix(tmp_path, prefix, pickled):
    for kind, config, state, read in (
        ("model", published.CONFIG, published.state(published.CONFIG), read_transformer),
        ("1-mlp-out-x4-k6", *published.sae(), read_sae),
    ):
        wrapped = {prefix + key: value for key, value in state.items()}
        plain, other = tmp_path / "plain" / kind, tmp_path / "wrapped" / kind
        published.write(plain, config, state)
        published.write(other, config, wrapped, pickled=pickled)
        assert published.same(read(plain)[1], read(other)[1])
        for path in other.iterdir():
            path.unlink()
        published.write_sharded(other, config, wrapped, pickled=pickled)
        assert published.same(read(plain)[1], read(other)[1])


def test_a_part_that_was_compiled_alone(tmp_path, expected):
    names = {"blocks.0.": "blocks.0._orig_mod.", "head.": "head._orig_mod."}
    arrays = saved_as(expected)
    for plain, compiled in names.items():
        arrays = {key.replace(plain, compiled): value for key, value in arrays.items()}
    assert same_params(image_file(tmp_path / "model.safetensors", arrays), expected)


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_a_name_with_and_without_its_prefix(tmp_path, expected, suffix):
    arrays = saved_as(expected) | {"module.head.weight": expected["head.weight"]}
    path = image_file(tmp_path / f"model.{suffix}", arrays)
    with pytest.raises(ValueError, match=r"head\.weight is there twice, as (module\.)?head\.weight in .* delete one"):
        read_image_model(path)


def nested(path, **parts):
    """A torch file with a dict of state dicts, given by name, and of other values."""
    data, storages = b"(", {}
    for name, value in parts.items():
        data += f"S'{name}'\n".encode()
        if not isinstance(value, dict):
            data += pickle.dumps(value, 0)[:-1]
            continue
        data += b"("
        for key, array in value.items():
            strides = ints(*(step // array.itemsize for step in array.strides)) if array.ndim else "(t"
            number, sizes = str(len(storages)), ints(*array.shape) if array.ndim else "(t"
            data += f"S'{key}'\n".encode() + tensor(sizes, strides, count=array.size, key=number)[:-1]
            storages[number] = array.tobytes()
        data += b"d"
    return archive(path, data + b"d.", **storages)


@pytest.mark.parametrize("name", ["model", "state_dict", "model_state_dict", "net"])
def test_a_state_dict_one_level_down(tmp_path, expected, name):
    other = {"exp_avg": np.ones(3, np.float32), "exp_avg_sq": np.ones(3, np.float32)}
    path = nested(tmp_path / "run.pt", epoch=3, **{name: saved_as(expected)}, optimizer=other, best=0.5)
    assert same_params(path, expected)
    wrapped = {f"module._orig_mod.{key}": value for key, value in saved_as(expected).items()}
    assert same_params(nested(tmp_path / "run.pt", optimizer=other, **{name: wrapped}), expected)


def test_of_several_state_dicts_none_is_guessed(tmp_path, expected):
    weights = saved_as(expected)
    path = nested(tmp_path / "run.pt", model=weights, ema=weights, epoch=3)
    with pytest.raises(ValueError, match=r"holds 2 state dicts, in \['model', 'ema'\], .* save the one that you mean"):
        read_image_model(path)
    none = nested(tmp_path / "run.pt", a={"x": FOUR_VALUES}, b={"y": FOUR_VALUES})
    with pytest.raises(ValueError, match=r"holds 2 state dicts, in \['a', 'b'\]"):
        read_image_model(none)


@pytest.mark.parametrize("name", ["model", "state_dict"])
def test_a_transformer_and_an_sae_one_level_down(tmp_path, name):
    other = {"exp_avg": FOUR_VALUES}
    for kind, config, state, read in (
        ("model", published.CONFIG, published.state(published.CONFIG), read_transformer),
        ("1-mlp-out-x4-k6", *published.sae(), read_sae),
    ):
        plain = published.write(tmp_path / "plain" / kind, config, state)
        folder = published.write(tmp_path / "run" / kind, config, state)
        (folder / "model.safetensors").unlink()
        nested(folder / "pytorch_model.bin", optimizer=other, **{name: state}, epoch=1)
        assert published.same(read(plain)[1], read(folder)[1])


def test_a_config_in_the_file_says_whether_there_is_a_residual(tmp_path, expected):
    """Beside the state dict, or that of a module that is wrapped."""
    for stated in (True, False):
        assert (
            read_image_model(nested(tmp_path / "a.pt", model=saved_as(expected), config=Config(stated)))[0]["residual"]
            is stated
        )
    with pytest.raises(ValueError, match="says residual=False"):
        read_image_model(tmp_path / "a.pt", residual=True)


class Config:
    """Pickled, it is an object of a class that the reader does not know, with its attributes."""

    def __init__(self, residual: bool):
        self.residual = residual


FOUR_VALUES = np.arange(4, dtype=np.float32)
