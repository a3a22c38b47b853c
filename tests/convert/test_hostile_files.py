"""Files that are broken, or made to harm: an error that says so, at once, in little memory, and nothing is run.

The fuzzing takes 100 examples of each kind here; ``pytest tests/test_hostile_files.py --hypothesis-profile=long`` takes
20,000.
"""

import json
import os
import pickle
import re
import shutil
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import published
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import bilinear_jax as bj
import weights_convert
from weights_convert.files import LARGEST_JSON
from weights_convert.pickled import read_torch

STATE = published.state(published.CONFIG)


def model(folder: Path, **options) -> Path:
    return published.write(folder, published.CONFIG, STATE, **options)


# Bombs, traps and lies: each is read in a process that may take two gigabytes, of which numpy reserves one


def header_of(folder: Path, header: dict | bytes, claimed: int | None = None, data: bytes = bytes(64)) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    length = struct.pack("<Q", len(text) if claimed is None else claimed)
    (folder / "model.safetensors").write_bytes(length + text + data)


def entry(shape, begin: int, end: int, dtype: str = "F32") -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def with_config(**changes):
    return lambda folder: (folder / "config.json").write_text(json.dumps(published.CONFIG | changes))


def with_header(header, **options):
    return lambda folder: header_of(folder, header, **options)


def with_pickle(data: bytes, **entries: bytes):
    def write(folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        published.archive(folder / "pytorch_model.bin", data, **entries)

    return write


def deflated(folder: Path) -> None:
    """A kilobyte of zip holds a gigabyte of pickle."""
    (folder / "model.safetensors").unlink()
    path = folder / "pytorch_model.bin"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file, file.open("model/data.pkl", "w") as part:
        for _ in range(1024):
            part.write(bytes(2**20))


def index_of(*names, suffix: str = "safetensors"):
    def write(folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        stem = "model" if suffix == "safetensors" else "pytorch_model"
        weights = {f"w{i}": name for i, name in enumerate(names)}
        (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps({"weight_map": weights}))

    return write


def linked(name: str, target: str):
    def write(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).symlink_to(target)

    return write


HOSTILE = {
    "a header of 2^60 bytes": (with_header({}, claimed=2**60), "cut short or not a safetensors"),
    "a header of 64 MB": (with_header(b" " * 2**26), "cut short or not a safetensors"),
    "a tensor of 2^40 numbers": (with_header({"a": entry([2**40], 0, 2**42)}), "cut short or not a safetensors"),
    "a shape that overflows": (with_header({"a": entry([2**40, 2**40], 0, 64)}), "cut short or not a safetensors"),
    "a negative size": (with_header({"a": entry([-1], 0, 64)}), "cut short or not a safetensors"),
    "tensors that overlap": (
        with_header({"a": entry([16], 0, 64), "b": entry([8], 32, 64)}),
        "cut short or not a safetensors",
    ),
    "a gap between tensors": (
        with_header({"a": entry([4], 0, 16), "b": entry([8], 32, 64)}),
        "cut short or not a safetensors",
    ),
    "a type that is none": (with_header({"a": entry([16], 0, 64, "F99")}), "cut short or not a safetensors"),
    "a header that is a list": (with_header(b"[1, 2]"), "cut short or not a safetensors"),
    "deep brackets": (with_header(b"[" * 100_000), "cut short or not a safetensors"),
    "a config of 17 MB": (
        lambda folder: (folder / "config.json").write_bytes(b'{"a": "' + bytes(LARGEST_JSON) + b'"}'),
        "it is not the file that belongs here",
    ),
    "a config of brackets": (lambda folder: (folder / "config.json").write_text("[" * 200_000), "is not JSON"),
    "a config in no encoding": (lambda folder: (folder / "config.json").write_bytes(b"\xff\xfe\x00"), "is not UTF-8"),
    "a config that is a pipe": (
        lambda folder: ((folder / "config.json").unlink(), os.mkfifo(folder / "config.json")),
        "has no config.json",
    ),
    "a config of 8 GB of zeros": (lambda folder: os.truncate(folder / "config.json", 2**33), "at most"),
    "a billion layers": (with_config(n_layer=10**9), "n_layer 1000000000"),
    "a width of 10^12": (with_config(d_model=4 * 10**12), r"expected \[11, 4000000000000\]"),
    "a vocabulary of 10^12": (with_config(n_vocab=10**12), r"expected \[1000000000000, 8\]"),
    "true as a number": (with_config(n_layer=True), "must be whole numbers"),
    "a text for a truth": (with_config(bias="false"), "bias is 'false', but must be bool"),
    "a list for a name": (with_config(tokenizer=["ts-4096"]), "tokenizer is .*, but must be str"),
    "an index out of its folder": (index_of("../elsewhere/model.safetensors"), "names files outside its folder"),
    "an index of an absolute path": (index_of("/etc/passwd"), "names files outside its folder"),
    "an index of a path of another system": (index_of("..\\model.safetensors"), "names files outside its folder"),
    "an index of a pickle": (index_of("model.bin"), r"not \.safetensors files"),
    "an index of numbers": (index_of(5), "is not an index of shards"),
    "an index of nothing": (index_of(), "is not an index of shards"),
    "weights that are a link": (linked("model.safetensors", "/etc/passwd"), "is a link to something outside"),
    "a config that is a link": (linked("config.json", "/etc/passwd"), "is a link to something outside"),
    "a config that is a folder": (
        lambda folder: ((folder / "config.json").unlink(), (folder / "config.json").mkdir()),
        "has no config.json",
    ),
    "a zip of a gigabyte": (deflated, "has 1073741824 bytes, but at most"),
    "a string of 2^62 bytes": (with_pickle(b"\x80\x05\x8d" + struct.pack("<Q", 2**62) + b"a."), "damaged"),
    "an array of 2^40 bytes": (
        with_pickle(b"\x80\x05\x96" + struct.pack("<Q", 2**40) + b"a."),
        "damaged|cannot be read",
    ),
    "a long number": (with_pickle(b"\x80\x02\x8b" + struct.pack("<i", 2**30) + b"a."), "damaged"),
    "tuples of tuples": (with_pickle(b"(I1\ntp0\n" + b"(g0\ng0\ntp0\n" * 60 + b"(g0\nI1\nd."), "parts"),
    "one number 2^50 times": (
        with_pickle(
            b"(S'lm_head.weight'\n" + published.tensor(published.ints(2**50), published.ints(0))[:-1] + b"d.",
            **{"0": bytes(16)},
        ),
        "expanded tensors",
    ),
    "no pickle": (with_pickle(b"hello"), "damaged"),
}

READ = """
import resource, sys, time, warnings
resource.setrlimit(resource.RLIMIT_AS, (3 << 30, 3 << 30))
import weights_convert
warnings.simplefilter("ignore")
for folder in sys.argv[1:]:
    start = time.monotonic()
    try:
        weights_convert.read_transformer(folder)
        print("read", flush=True)
    except Exception as error:
        print(type(error).__name__, time.monotonic() - start < 10, " ".join(str(error).split()), flush=True)
"""


def test_bombs_traps_and_lies(tmp_path):
    folders = []
    for number, (write, _) in enumerate(HOSTILE.values()):
        folders.append(model(tmp_path / str(number)))
        write(folders[-1])
    environment = os.environ | {"OPENBLAS_NUM_THREADS": "1", "PYTHONPATH": str(Path(bj.__file__).parents[1])}
    command = [sys.executable, "-c", READ, *map(str, folders)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0, done.stderr
    for (name, (_, message)), line in zip(HOSTILE.items(), done.stdout.splitlines(), strict=True):
        assert line.startswith(("ValueError True ", "FileNotFoundError True ")), (name, line)
        assert re.search(message, line), (name, line)


def test_links_within_a_folder_and_into_the_cache_are_followed(tmp_path):
    """The hub's cache has snapshots/<commit>/model.safetensors -> ../../blobs/<hash>."""
    home = tmp_path / "models--someone--small"
    folder = model(home / "snapshots" / ("0" * 40))
    (home / "blobs").mkdir()
    for name in ("config.json", "model.safetensors"):
        (folder / name).rename(home / "blobs" / name)
        (folder / name).symlink_to(f"../../blobs/{name}")
    (tmp_path / "link").symlink_to(folder)
    for place in (folder, tmp_path / "link"):
        assert weights_convert.read_transformer(place)[0]["n_layer"] == 2


def test_a_tokenizer_that_is_a_link_is_not_copied(tmp_path):
    """Or any file of this machine could be sent along with a converted model."""
    folder = model(tmp_path / "model")
    (tmp_path / "secret").write_text("{}")
    (folder / "tokenizer.json").symlink_to("../secret")
    from bilinear_jax.store.convert import convert

    with pytest.raises(ValueError, match=r"tokenizer\.json is a link to something outside"):
        convert(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# Fuzzing


def unharmed(folder: Path) -> None:
    """Reading gives what the config describes, or an error of the two kinds that say what is wrong."""
    try:
        config, params = weights_convert.read_transformer(folder)
    except (ValueError, FileNotFoundError) as error:
        assert str(error)
        return
    assert params["w_e"].shape == (config["n_vocab"], config["d_model"])
    assert len(params["layers"]["mlp"]["w_p"]) == config["n_layer"]
    assert all(np.isfinite(value.astype(np.float32)).all() for value in params["layers"]["mlp"].values())


def changed(data: bytes, changes) -> bytes:
    """Bytes with parts overwritten, cut out, or put in."""
    for kind, place, content in changes:
        at = int(place * len(data))
        data = data[:at] + content + data[at + (0, len(content), 2 * len(content))[kind] :]
    return data


CHANGES = st.lists(
    st.tuples(st.integers(0, 2), st.floats(0, 1), st.binary(min_size=1, max_size=9)), min_size=1, max_size=4
)
FUZZ = settings(
    deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow], print_blob=True
)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "pytorch_model.bin", "data.pkl", "index"])
def test_changed_bytes(tmp_path, name):
    """Of every kind of file, a few bytes are changed anywhere."""
    pickled = name in ("pytorch_model.bin", "data.pkl")
    folder = model(tmp_path / "model", pickled=pickled)
    if name == "index":
        shutil.rmtree(folder)
        published.write_sharded(folder, published.CONFIG, STATE)
        name = "model.safetensors.index.json"
    path = folder / (name if name != "data.pkl" else "pytorch_model.bin")
    whole = path.read_bytes()
    with zipfile.ZipFile(path) if pickled else open(path) as file:
        entries = {each: file.read(each) for each in file.namelist()} if pickled else {}

    @FUZZ
    @given(CHANGES)
    def check(changes):
        if name == "data.pkl":
            data = changed(entries["model/data.pkl"], changes)
            storages = {key.rpartition("/")[2]: value for key, value in entries.items() if key != "model/data.pkl"}
            published.archive(path, data, **storages)
        else:
            path.write_bytes(changed(whole, changes))
        unharmed(folder)

    check()


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(["silu", "ts-4096"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)


@pytest.mark.filterwarnings("ignore")
def test_any_config(tmp_path):
    """Any JSON values for any keys, of models and of SAEs; what is read can be made a config."""
    from bilinear_jax.nn.sae import SAEConfig
    from bilinear_jax.nn.transformer import TransformerConfig
    from weights_convert import sae, transformer

    known = sorted(transformer._MEANT | transformer._OLDER), sorted(sae._MEANT | sae._TRAINING | {"kwargs"})
    folders = model(tmp_path / "model"), published.write(tmp_path / "1-mlp-out-x4-k6", *published.sae())
    readers = (weights_convert.read_transformer, TransformerConfig), (weights_convert.read_sae, SAEConfig)

    @FUZZ
    @given(st.integers(0, 1), st.data())
    def check(which, data):
        folder, (read, config) = folders[which], readers[which]
        right = json.loads(json.dumps(published.CONFIG)) if which == 0 else published.sae()[0]
        changes = data.draw(st.dictionaries(st.sampled_from(known[which]), VALUES, min_size=1, max_size=3))
        (folder / "config.json").write_text(json.dumps(right | changes))
        try:
            config(**read(folder)[0])
        except (ValueError, FileNotFoundError) as error:
            assert str(error)

    check()


OPCODES = st.sampled_from(
    [
        *(b"(", b")", b"]", b"}", b"N", b"t", b"l", b"d", b"0", b"1", b"2", b"a", b"e", b"s", b"u", b"R", b"b", b"o"),
        *(
            b"Q",
            b"I7\n",
            b"I0\n",
            b"S'storage'\n",
            b"S'0'\n",
            b"S'cpu'\n",
            b"S'a'\n",
            b"p0\n",
            b"g0\n",
            b"p1\n",
            b"g1\n",
        ),
        *(b"ctorch\nFloatStorage\n", b"ctorch\nSize\n", b"ctorch._utils\n_rebuild_tensor_v2\n", b"cos\nsystem\n"),
        *(
            b"ccollections\nOrderedDict\n",
            b"ctorch._utils\n_rebuild_parameter\n",
            b"cbuiltins\nlist\n",
            b"\x85",
            b"\x86",
        ),
        *(
            b"\x81",
            b"\x92",
            b"\x8f",
            b"\x90",
            b"\x91",
            b"\x93",
            b"\x94",
            b"ibuiltins\neval\n",
            b"Pa\n",
            b"\x95" + bytes(8),
        ),
        published.tensor(published.ints(4), published.ints(1))[:-1],
    ]
)


def test_any_pickle(tmp_path, monkeypatch):
    """Programs of a pickle's own instructions: they end, and run nothing."""
    monkeypatch.setattr(os, "system", lambda *_: pytest.fail("it ran"))
    monkeypatch.setattr("builtins.eval", lambda *_: pytest.fail("it ran"))
    assert pickle.loads(b"cbuiltins\nlist\n.") is list

    @FUZZ
    @given(st.lists(OPCODES, max_size=30))
    def check(parts):
        path = published.archive(tmp_path / "a.pt", b"".join(parts) + b".", **{"0": bytes(16)})
        try:
            read_torch(path)
        except ValueError as error:
            assert str(error)

    check()
