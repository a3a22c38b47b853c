"""IDX files as they may come: whole, gzipped, cut, mislabelled; downloads from a server on loopback."""

import dataclasses
import functools
import gzip
import hashlib
import http.server
import struct
import threading

import numpy as np
import pytest

from bilinear_jax.images import data as image_data
from bilinear_jax.images.data import FILES, PUBLISHED, load_images, read_idx
from bilinear_jax.nn.image import ImageConfig
from bilinear_jax.training.images import accuracy


def idx(array: np.ndarray) -> bytes:
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()


@pytest.fixture
def parts():
    rng = np.random.default_rng(0)
    return {
        "train_images": rng.integers(0, 256, (5, 3, 4), np.uint8),
        "train_labels": np.array([0, 1, 2, 1, 0], np.uint8),
        "test_images": rng.integers(0, 256, (2, 3, 4), np.uint8),
        "test_labels": np.array([2, 1], np.uint8),
    }


def write(folder, parts, zipped=()):
    folder.mkdir(parents=True, exist_ok=True)
    for part, array in parts.items():
        data = array if isinstance(array, bytes) else idx(array)
        if part in zipped:
            (folder / f"{FILES[part]}.gz").write_bytes(gzip.compress(data))
        else:
            (folder / FILES[part]).write_bytes(data)
    return folder


def test_plain_and_gzipped_files_hold_the_same(tmp_path, parts, monkeypatch):
    write(tmp_path / "shapes", parts, zipped=("train_images", "test_labels"))
    monkeypatch.setenv("BILINEAR_JAX_DATA", str(tmp_path))
    for data in (load_images("shapes"), load_images("shapes", tmp_path), load_images("any", tmp_path / "shapes")):
        np.testing.assert_array_equal(data.train_images, parts["train_images"].reshape(5, 12))
        np.testing.assert_array_equal(data.test_labels, [2, 1])
        assert data.shape == (3, 4) and data.classes == ("0", "1", "2") and data.train_images.dtype == np.uint8


@pytest.mark.parametrize("part", ["train", "test"])
@pytest.mark.parametrize("stated", [(3, 4), (28, 28), (0, 0)])
def test_a_part_without_images(tmp_path, parts, part, stated):
    """Whatever size its file states: the images of the other part have one."""
    empty = {f"{part}_images": np.zeros((0, *stated), np.uint8), f"{part}_labels": np.zeros(0, np.uint8)}
    data = load_images("shapes", write(tmp_path, parts | empty))
    assert getattr(data, f"{part}_images").shape == (0, 12) and getattr(data, f"{part}_labels").shape == (0,)
    other = "test" if part == "train" else "train"
    want = parts[f"{other}_images"]
    np.testing.assert_array_equal(getattr(data, f"{other}_images"), want.reshape(len(want), 12))
    assert data.shape == (3, 4) and data.classes == ("0", "1", "2")
    nothing = getattr(data, f"{part}_images"), getattr(data, f"{part}_labels")
    with pytest.raises(ValueError, match=r"images \(0, 12\) and labels \(0,\) must have shapes \[n, 12\]"):
        accuracy(ImageConfig(n_inputs=12, n_classes=3), {}, *nothing)


def test_no_images_at_all(tmp_path, parts):
    write(tmp_path, {part: array[:0] for part, array in parts.items()})
    with pytest.raises(ValueError, match="has no image, neither to train nor to test: add at least one"):
        load_images("shapes", tmp_path)


def test_digits_need_nothing():
    data = load_images()
    assert data.train_images.min() == 0 and data.train_images.max() == 1
    assert sorted(set(data.test_labels.tolist())) == list(range(10))


@pytest.mark.parametrize(
    ("change", "message"),
    {
        "cut": (lambda p: {"train_images": idx(p["train_images"])[:-1]}, "but has only 59"),
        "too long": (lambda p: {"train_images": idx(p["train_images"]) + b"x"}, "but has more"),
        "empty": (lambda p: {"train_images": b""}, "but an IDX file of unsigned bytes begins with 0000080n"),
        "floats": (lambda p: {"train_images": b"\0\0\x0d\x03" + bytes(100)}, "begins with 00000d03"),
        "no axes": (lambda p: {"train_images": b"\0\0\x08\x03\0\0"}, "cut short"),
        "enormous": (lambda p: {"train_images": b"\0\0\x08\x03" + b"\xff" * 12}, "cut short, or states"),
        "exchanged": (lambda p: {"train_images": p["train_labels"], "train_labels": p["train_images"]}, "are swapped"),
        "fewer labels": (lambda p: {"train_labels": p["train_labels"][:3]}, "5 train images and 3 labels"),
        "another size": (lambda p: {"test_images": p["test_images"][:, :2]}, r"have \(3, 4\) and \(2, 4\) pixels"),
    }.values(),
)
def test_files_that_are_wrong(tmp_path, parts, change, message):
    write(tmp_path, parts | change(parts))
    with pytest.raises(ValueError, match=message):
        load_images("shapes", tmp_path)


def test_a_damaged_gzip_file(tmp_path, parts):
    zipped = gzip.compress(idx(parts["train_images"]))
    for damaged in (zipped[:-9], zipped[:12], zipped[:15] + b"\xff\xff" + zipped[17:]):
        (tmp_path / "file.gz").write_bytes(damaged)
        with pytest.raises(ValueError, match=r"damaged|only|begins"):
            read_idx(tmp_path / "file.gz")


def test_what_isn_t_there(tmp_path, parts, monkeypatch):
    monkeypatch.delenv("BILINEAR_JAX_DATA", raising=False)
    with pytest.raises(FileNotFoundError, match="BILINEAR_JAX_DATA"):
        load_images("mnist")
    with pytest.raises(FileNotFoundError, match="pass download=True to download mnist"):
        load_images("mnist", tmp_path)
    write(tmp_path, {part: parts[part] for part in ("train_images", "train_labels")})
    with pytest.raises(FileNotFoundError, match="there is no t10k-images"):
        load_images("shapes", tmp_path)
    with pytest.raises(ValueError, match=r"labels in .* go up to 11"):
        load_images("mnist", write(tmp_path / "mnist", parts | {"test_labels": np.array([2, 11], np.uint8)}))
    with pytest.raises(ValueError, match="cannot be downloaded, only mnist, fashion-mnist"):
        load_images("other", tmp_path / "nothing", download=True)


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.fixture
def mirror(tmp_path, parts, monkeypatch):
    """A server on loopback with the four files, and "mnist" as what it has."""
    folder = write(tmp_path / "served", parts, zipped=FILES)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    address = f"http://127.0.0.1:{server.server_port}/"
    sums = tuple(hashlib.sha256(idx(parts[part])).hexdigest() for part in FILES)
    monkeypatch.setitem(
        PUBLISHED, "mnist", PUBLISHED["mnist"]._replace(mirrors=(address + "no/", address), sha256=sums)
    )
    yield folder
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_download_comes_from_the_mirror_that_has_it_and_stays(tmp_path, parts, mirror, monkeypatch):
    data = load_images("mnist", tmp_path / "data", download=True)
    np.testing.assert_array_equal(data.test_images, parts["test_images"].reshape(2, 12))
    monkeypatch.setattr(image_data.urllib.request, "urlopen", None)
    again = load_images("mnist", tmp_path / "data", download=True)
    assert all(np.array_equal(getattr(data, f.name), getattr(again, f.name)) for f in dataclasses.fields(data)[1:5])


def test_a_download_of_something_else_leaves_nothing(tmp_path, parts, mirror):
    changed = parts["test_labels"] + 1
    (mirror / f"{FILES['test_labels']}.gz").write_bytes(gzip.compress(idx(changed)))
    with pytest.raises(ValueError, match="SHA-256"):
        load_images("mnist", tmp_path / "data", download=True)
    (mirror / f"{FILES['test_labels']}.gz").unlink()
    with pytest.raises(ConnectionError, match="404"):
        load_images("mnist", tmp_path / "data", download=True)
    assert not list((tmp_path / "data").iterdir())
