"""Gemma Scope: ``params.npz``, in a folder such as ``layer_20/width_16k/average_l0_71``. There is no config.

    z     = W_enc^T x + b_enc                     the file has the matrices transposed
    codes = z where z > threshold and z > 0
    x_hat = W_dec^T codes + b_dec

Source: Lieberum et al. 2024 ("Gemma Scope"), and the files of google/gemma-scope-2b-pt-res.
"""

import io
import math
import re
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from weights_convert.dictionaries import checks, hooks
from weights_convert.files import inside
from weights_convert.weights import FLOATS, ReadModel, differences

(WEIGHTS,) = FILES = ("params.npz",)

LARGEST_RATIO = 4
"""Most bytes for each byte of a compressed array. Weights hardly get smaller, so a larger one is a bomb or empty."""

_NAMES = {"w_enc": "W_enc", "b_enc": "b_enc", "w_dec": "W_dec", "b_dec": "b_dec", "threshold": "threshold"}
_FLIPPED = ("w_enc", "w_dec")
_HEADER = 128 + 10_000
_SITES = {"res": ("resid_post", None), "mlp": ("mlp_out", None), "transcoders": ("mlp_in", "mlp_out")}
"""The sites and targets by the end of a repository's name. "att" reads the heads before they are joined."""

_REPOSITORY = re.compile(r"gemma-scope-[\w.-]*?(res|mlp|att|transcoders)")
_LAYER = re.compile(r"layer_(\d{1,9})")
_TAG = re.compile(r"average_l0_\d+|canonical")


def describe(folder: Path, site: str | None, layer: int | None, target: str | None) -> dict[str, Any]:
    """What the path of one dictionary says. See ``describe_dictionary``."""
    place, target = _place(folder, site, layer, target)
    return {
        **{"site": place[0], "layer": place[1], "activation": "jumprelu", "k": None, "target": target},
        "tag": _tag(folder),
    }


def read(folder: Path, site: str | None, layer: int | None, target: str | None) -> ReadModel:
    """Read one dictionary. See ``read_dictionary``."""
    path = inside(folder, WEIGHTS)
    arrays = {f"W_{key[2:]}" if key.startswith("w_") else key: value for key, value in read_npz(path).items()}
    if "W_enc" not in arrays or arrays["W_enc"].ndim != 2 or not arrays["W_enc"].size:
        raise ValueError(f"{path} has no matrix W_enc, but {sorted(arrays)}: it is no dictionary of Gemma Scope")
    d, features = arrays["W_enc"].shape
    place, target = _place(folder, site, layer, target)
    config = {
        "site": place[0],
        "layer": place[1],
        "d_model": d,
        "expansion": checks.expansion(path, features, d),
        "k": None,
        "encoder_bias": True,
        "activation": "jumprelu",
        "target": target,
        "skip": False,
        "centred": False,
        "tag": _tag(folder),
    }
    shapes = {
        _NAMES[key]: shape[::-1] if key in _FLIPPED else shape for key, shape in checks.expected_shapes(config).items()
    }
    missing, extra, wrong = differences({key: value.shape for key, value in arrays.items()}, shapes)
    if missing or extra or wrong:
        raise ValueError(
            f"{path} is no dictionary of Gemma Scope. Missing: {', '.join(missing) or 'nothing'}; unknown: "
            f"{', '.join(extra) or 'nothing'}; shapes: {'; '.join(wrong) or 'as expected'}. Download it again"
        )
    for key, value in arrays.items():
        if not np.isfinite(value).all():
            raise ValueError(f"{key} in {path} has values that are not finite: download it again")
    return ReadModel(
        config, {key: checks.turned(arrays[_NAMES[key]], key in _FLIPPED) for key in checks.expected_shapes(config)}
    )


def write(folder: Path, config: Mapping[str, Any], params: Mapping[str, Any]) -> None:
    """Write one dictionary. See ``write_dictionary``."""
    config, params, transcoder = checks.checked("Gemma Scope", config, params, ("jumprelu",), one_dtype=False)
    checks.need_centring("Gemma Scope", config, False)
    if config["skip"]:
        raise checks.refuse("Gemma Scope", "skip", True, "write the format of SAELens")
    if config["tag"] and config["tag"] != _tag(folder):
        raise checks.refuse("Gemma Scope", "tag", config["tag"], "give the folder this name, or leave out the tag")
    for key, value in params.items():
        if value.dtype.name == "bfloat16":
            raise ValueError(f"{key} is bfloat16, which npz files do not have: give it as float32")
    _, aim = _place(folder, config["site"], config["layer"], config["target"])
    if transcoder != (aim is not None):
        raise ValueError(f"{folder} has the name of transcoders to {aim!r}, but this is an SAE: rename it")
    state = {_NAMES[key]: value.T if key in _FLIPPED else value for key, value in params.items()}
    plain = {key: np.asarray(value, value.dtype.newbyteorder("<"), order="C") for key, value in state.items()}
    np.savez(folder / WEIGHTS, allow_pickle=False, **plain)


def read_npz(path: Path) -> dict[str, np.ndarray]:
    """The arrays in an npz file, none of them a pickle, and none larger than its file can hold.

    Raises:
        ValueError: for a damaged file, objects, other dtypes than float32 and float16, and arrays that unfold to many
            times their size.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            if len(entries) > 100 or len({entry.filename for entry in entries}) != len(entries):
                raise ValueError(f"{path} has {len(entries)} entries, or some twice: download it again")
            return {entry.filename.removesuffix(".npy"): _array(path, archive, entry) for entry in entries}
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, NotImplementedError, RuntimeError, SyntaxError) as error:
        if isinstance(error, FileNotFoundError):
            raise
        raise ValueError(f"{path} is cut short or not an npz file ({error}): download it again") from error


def _array(path: Path, archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> np.ndarray:
    if entry.file_size > LARGEST_RATIO * entry.compress_size + 2**20:
        raise ValueError(
            f"{entry.filename} in {path} unfolds from {entry.compress_size} to {entry.file_size} bytes: if you trust "
            "it, save it again with np.savez"
        )
    with archive.open(entry) as file:
        start = io.BytesIO(file.read(_HEADER))
        try:
            version = np.lib.format.read_magic(start)
            reader = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}[version]
            shape, fortran, dtype = reader(start)
        except Exception as error:  # a broken header can raise any error here
            raise ValueError(
                f"{entry.filename} in {path} is not an array ({error!r:.200}): download it again"
            ) from error
        if dtype.name not in FLOATS:
            raise ValueError(f"{entry.filename} in {path} has the dtype {dtype}: save it as float32 or float16")
        size = math.prod(shape) * dtype.itemsize
        if min(shape, default=0) < 0 or start.tell() + size != entry.file_size:
            raise ValueError(f"{entry.filename} in {path} has another size than its header says: download it again")
        data = start.read() + file.read(size + 1)
    if len(data) != size:
        raise ValueError(f"{entry.filename} in {path} is cut short: download it again")
    value = np.frombuffer(bytearray(data), dtype).reshape(shape, order="F" if fortran else "C")
    return value.astype(dtype.newbyteorder("="), copy=False)


def _place(folder: Path, site: str | None, layer: int | None, target: str | None) -> tuple[tuple[str, int], str | None]:
    """The site and the layer, and the target, from the folder's path and from what the caller gave."""
    path = folder.resolve()
    layers = [match[1] for part in path.parts if (match := _LAYER.fullmatch(part))]
    repositories = [match for part in path.parts if (match := _REPOSITORY.search(part))]
    end = repositories[-1][1] if repositories else None
    named = "/".join([repositories[-1][0] if repositories else "...", f"layer_{layers[-1]}" if layers else "..."])
    if end == "att" and site is None:
        raise ValueError(
            f"{folder} is of {repositories[-1][0]}, which reads the heads of the attention before they are joined: no "
            "site of this library has that. To read it anyway, pass site= and layer="
        )
    said, aim = _SITES.get(end or "", (None, None))
    found = said, int(layers[-1]) if layers else None
    place = hooks.placed(folder, named if repositories or layers else None, found, site, layer)
    if aim and target not in (None, aim):
        raise ValueError(f"{folder} is of transcoders to {aim!r}, but target={target!r} was given: leave out target=")
    if said and not aim:
        hooks.own(folder, place, target)
    hooks.check_given(target, None, "target")
    target = aim or target
    return place, None if target == place[0] else target


def _tag(folder: Path) -> str | None:
    name = folder.resolve().name
    return name if _TAG.fullmatch(name) else None
