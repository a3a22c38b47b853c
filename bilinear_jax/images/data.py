"""Datasets of labelled images: IDX files (MNIST, Fashion-MNIST and similar), and scikit-learn's digits without a file.

An IDX file is a magic number (two zero bytes, 8 for unsigned bytes, the number of axes), the size of each axis as a
big-endian 32-bit number, and the values. A dataset is four of these files, plain or gzipped:

    train-images-idx3-ubyte    train-labels-idx1-ubyte    t10k-images-idx3-ubyte    t10k-labels-idx1-ubyte

Source: LeCun, Cortes and Burges, "The MNIST database of handwritten digits"; Xiao, Rasul and Vollgraf 2017,
"Fashion-MNIST"; the digits are those of Alpaydin and Kaynak 1998, as scikit-learn has them.
"""

import dataclasses
import gzip
import hashlib
import io
import math
import os
import struct
import urllib.error
import urllib.request
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np

from bilinear_jax.store.files import atomic_folder
from weights_convert.files import expanded

FOLDER_VARIABLE = "BILINEAR_JAX_DATA"
"""The environment variable with the folder in which datasets are searched, and to which they are downloaded."""

LARGEST = 2**31
"""The largest size of an IDX file, in bytes. The largest file of the datasets named here has 47 MB."""

FILES = {
    "train_images": "train-images-idx3-ubyte",
    "train_labels": "train-labels-idx1-ubyte",
    "test_images": "t10k-images-idx3-ubyte",
    "test_labels": "t10k-labels-idx1-ubyte",
}

DIGITS = tuple("0123456789")
GARMENTS = ("T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")


class _Published(NamedTuple):
    """A dataset that can be downloaded."""

    classes: tuple[str, ...]
    mirrors: tuple[str, ...]  # the file's name and .gz are appended
    sha256: tuple[str, ...]  # of the decompressed files, in the order of FILES


PUBLISHED = {
    "mnist": _Published(
        DIGITS,
        ("https://ossci-datasets.s3.amazonaws.com/mnist/", "https://storage.googleapis.com/cvdf-datasets/mnist/"),
        (
            "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
            "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
            "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
            "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
        ),
    ),
    "fashion-mnist": _Published(
        GARMENTS,
        (
            "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
            "https://github.com/zalandoresearch/fashion-mnist/raw/master/data/fashion/",
        ),
        (
            "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
            "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
            "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
            "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
        ),
    ),
}


@dataclasses.dataclass(frozen=True, eq=False)
class ImageData:
    """A dataset of labelled images: a training part and a test part."""

    name: str
    train_images: np.ndarray  # [n, pixels], uint8 in 0 ... 255 or float32 in 0 ... 1
    train_labels: np.ndarray  # [n] int32
    test_images: np.ndarray  # [m, pixels], of the same type; n or m may be 0, a part that is not used
    test_labels: np.ndarray  # [m] int32
    shape: tuple[int, int]  # rows and columns of an image
    classes: tuple[str, ...]  # the name of each label


def load_images(name: str = "digits", folder: str | Path | None = None, *, download: bool = False) -> ImageData:
    """Load a dataset of labelled images.

    Args:
        name: "digits" (1,797 images of 8 x 8; needs no file; the last 360, by other writers, are the test part),
            "mnist" or "fashion-mnist" (60,000 and 10,000 images of 28 x 28), or the name of another folder of IDX
            files.
        folder: a folder that holds the four files, or that holds a folder ``<name>`` with them. None: the folder in the
            environment variable ``BILINEAR_JAX_DATA``.
        download: if the files are not there, download "mnist" or "fashion-mnist" to ``<folder>/<name>``. The SHA-256 of
            every file is checked.

    Raises:
        FileNotFoundError: if the files are not there; the message says where they were searched.
        ConnectionError: if no mirror can be reached.
        ValueError: if a file is cut short or has another format, if there is no image at all, if images and labels do
            not fit each other, or if a downloaded file has another SHA-256.

    Example:
        >>> data = load_images()
        >>> data.train_images.shape, data.test_images.shape, data.shape
        ((1437, 64), (360, 64), (8, 8))
    """
    if name == "digits" and folder is None:
        return _digits()
    given = os.environ.get(FOLDER_VARIABLE) if folder is None else folder
    if not given:
        raise FileNotFoundError(
            f"no folder is given for the IDX files of {name}: pass folder=, or set the environment variable "
            f"{FOLDER_VARIABLE}"
        )
    base = expanded(given)
    places = [place for place in (base / name, base) if _found(place, "train_images")]
    if not places and download:
        _download(name, base / name)
        places = [base / name]
    if not places:
        can = f": pass download=True to download {name}" if name in PUBLISHED else ""
        raise FileNotFoundError(f"there is no {FILES['train_images']} (plain or .gz) in {base / name} or {base}{can}")
    parts = {}
    for part, file in FILES.items():
        path = _found(places[0], part)
        if path is None:
            raise FileNotFoundError(f"there is no {file} (plain or .gz) in {places[0]}: add it")
        parts[part] = read_idx(path)
    return _checked(name, places[0], parts)


def read_idx(path: str | Path) -> np.ndarray:
    """Read the unsigned bytes of an IDX file, plain or gzipped, in the shape that the file states.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: for another format or type, or if the file has more or fewer values than it states. Not more than
            the stated number of values is kept.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    with open(path, "rb") as file:
        zipped = file.read(2) == b"\x1f\x8b"
    try:
        with gzip.open(path) if zipped else open(path, "rb") as file:
            magic = file.read(4)
            if len(magic) < 4 or magic[:2] != b"\0\0" or magic[2] != 8 or not 1 <= magic[3] <= 3:
                raise ValueError(
                    f"{path} begins with {magic.hex()}, but an IDX file of unsigned bytes begins with 0000080n: check "
                    "the file"
                )
            axes = file.read(4 * magic[3])
            shape = struct.unpack(f">{magic[3]}I", axes) if len(axes) == 4 * magic[3] else ()
            size = math.prod(shape) if shape else -1
            if not 0 <= size <= LARGEST:
                raise ValueError(f"{path} is cut short, or states an impossible shape, {shape}: download it again")
            values = file.read(size + 1)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{path} is damaged ({error}): download it again") from error
    if len(values) != size:
        more = "more" if len(values) > size else f"only {len(values)}"
        raise ValueError(f"{path} states {shape} values, {size} in all, but has {more}: download it again")
    return np.frombuffer(values, np.uint8).reshape(shape)


def _digits() -> ImageData:
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    images, labels = (images / 16).astype(np.float32), labels.astype(np.int32)
    return ImageData("digits", images[:1437], labels[:1437], images[1437:], labels[1437:], (8, 8), DIGITS)


def _found(folder: Path, part: str) -> Path | None:
    paths = (folder / f"{FILES[part]}{ending}" for ending in ("", ".gz"))
    return next((path for path in paths if path.is_file()), None)


def _checked(name: str, folder: Path, parts: dict[str, np.ndarray]) -> ImageData:
    shapes = {}
    for kind in ("train", "test"):
        images, labels = parts[f"{kind}_images"], parts[f"{kind}_labels"]
        if images.ndim != 3 or labels.ndim != 1:
            raise ValueError(
                f"{FILES[f'{kind}_images']} in {folder} has {images.ndim} axes and its labels have {labels.ndim}, "
                "but they must have 3 and 1: check whether the two files are swapped"
            )
        if len(images) != len(labels):
            raise ValueError(f"{folder} has {len(images)} {kind} images and {len(labels)} labels: download both again")
        if len(images):  # a part without images may state any size
            shapes[kind] = images.shape[1:]
    if not shapes:
        raise ValueError(f"{folder} has no image, neither to train nor to test: add at least one")
    if len(set(shapes.values())) > 1:
        raise ValueError(
            f"the train and test images in {folder} have {shapes['train']} and {shapes['test']} pixels, but they must "
            "have the same"
        )
    shape = next(iter(shapes.values()))
    number = int(max(parts["train_labels"].max(initial=0), parts["test_labels"].max(initial=0))) + 1
    classes = PUBLISHED[name].classes if name in PUBLISHED else tuple(map(str, range(number)))
    if number > len(classes):
        raise ValueError(
            f"the labels in {folder} go up to {number - 1}, but those of {name} go up to {len(classes) - 1}: check the "
            "files"
        )
    pixels = math.prod(shape)
    flat = {part: a.reshape(len(a), pixels) if a.ndim == 3 else a.astype(np.int32) for part, a in parts.items()}
    return ImageData(name, **flat, shape=shape, classes=classes)


def _download(name: str, folder: Path) -> None:
    """Download all four files, or none."""
    if name not in PUBLISHED:
        raise ValueError(f"{name} cannot be downloaded, only {', '.join(PUBLISHED)}: put its IDX files into {folder}")
    published = PUBLISHED[name]
    with atomic_folder(folder) as temporary:
        for file, expected in zip(FILES.values(), published.sha256, strict=True):
            (temporary / f"{file}.gz").write_bytes(_fetched(file, published.mirrors, expected))


def _fetched(file: str, mirrors: tuple[str, ...], expected: str) -> bytes:
    problems = []
    for mirror in mirrors:
        try:
            with urllib.request.urlopen(f"{mirror}{file}.gz", timeout=60) as answer:
                zipped = answer.read(LARGEST)
            content = gzip.GzipFile(fileobj=io.BytesIO(zipped)).read(LARGEST)
        except (OSError, urllib.error.URLError, EOFError, zlib.error) as error:
            problems.append(f"{mirror}: {error}")
            continue
        if hashlib.sha256(content).hexdigest() == expected:
            return zipped
        problems.append(f"{mirror}: {file} does not have the expected SHA-256")
    message = f"{file} cannot be downloaded: {'; '.join(problems)}. Download it in another way, and pass its folder="
    raise (ValueError if any("SHA-256" in problem for problem in problems) else ConnectionError)(message)
