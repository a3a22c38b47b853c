"""Read what others wrote as a config and arrays: the published checkpoints, the families of real models, GGUF files."""

import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

import weights_convert
from bilinear_jax.store import checksums
from bilinear_jax.store.files import read_json
from bilinear_jax.store.sources import GGUF, model_place
from weights_convert.families import is_gated
from weights_convert.files import expanded, inside, weight_files
from weights_convert.weights import FLOATS, ReadModel, aligned


def read_published(source: str | Path, place: Path, attn_scale: float | None = None) -> ReadModel:
    """The keyword arguments of ``TransformerConfig`` and the arrays, in the dtype of the files.

    Args:
        source: as given by the user.
        place: the folder or the GGUF file of this source, from ``model_place``.
        attn_scale: the factor on the attention's output. None: use the files.
    """
    if place.suffix == GGUF and place.is_file():
        read = weights_convert.read_gguf(place)
    elif is_gated(read_json(inside(place, "config.json")) or {}):
        read = weights_convert.read_gated(place)
    else:
        name = None if expanded(source).is_dir() else str(source)
        return weights_convert.read_transformer(place, attn_scale=attn_scale, name=name)
    if attn_scale is not None:
        read.config["attn_scale"] = float(attn_scale)
    return read


def config_file(place: Path) -> Path:
    """The file that holds the config of a model in this folder, or in this GGUF file."""
    return place if place.is_file() else inside(place, "config.json")


def taken(arrays: dict[str, Any], dtype: str) -> PyTree:
    """The arrays of a nested dict as JAX arrays of a dtype. It empties the dict, so only one is in memory twice.

    Example:
        >>> arrays = {"a": np.ones(2, np.float16), "b": {"c": np.zeros(3)}}
        >>> taken(arrays, "float32")["b"]["c"].dtype.name, arrays
        ('float32', {})
    """
    done: dict[str, Any] = {}
    for name in sorted(arrays, key=lambda name: isinstance(arrays[name], dict)):
        value = arrays.pop(name)
        done[name] = taken(value, dtype) if isinstance(value, dict) else as_dtype(value, dtype)
    return done


def as_dtype(array: Any, dtype: str) -> jax.Array:
    """An array as a JAX array of a dtype. On a CPU it may be the same memory, so nobody may write to it afterwards.

    Raises ``ValueError`` if a number is too large for the dtype.
    """
    array = np.asarray(array)
    if array.dtype.name != dtype:
        cast = aligned(array.shape, dtype)
        with np.errstate(over="ignore"):
            cast[...] = array
        if dtype == "float16" and not np.isfinite(cast).all():
            raise ValueError(
                f"a weight of {np.abs(array).max():.3g} is too large for float16: load it with dtype=bfloat16"
            )
        array = cast
    return jax.device_put(array)


def dtype_name(dtype: Any) -> str:
    """The name of a dtype of weights. Raises ``ValueError`` unless it is one of those that weights can have.

    Example:
        >>> dtype_name(jnp.bfloat16)
        'bfloat16'
    """
    try:
        name = jnp.dtype(dtype).name
    except TypeError:
        name = None
    if name not in FLOATS:
        raise ValueError(f"dtype is {dtype!r}, but weights can be {', '.join(FLOATS)}")
    return name


def files_of(place: Path) -> list[Path]:
    """The files that a model of others was read from."""
    return [place] if place.is_file() else [inside(place, "config.json"), *weight_files(place)]


def hashes_of(source: str | Path) -> dict[str, str]:
    """The SHA-256 of each file that the weights of a model come from, by its name.

    A file is read once in a process, at about a gigabyte a second. A checkpoint of this library has recorded those of
    the files that it was made from; {} if it has not.
    """
    place = model_place(source)
    if place.is_dir() and "format" in (record := read_json(inside(place, "config.json")) or {}):
        recorded = (record.get("origin") or {}).get("files") or {}
        return {name: value for name, value in recorded.items() if name != "config.json"}
    paths = [place] if place.is_file() else weight_files(place)
    return {path.name: _hash(path, path.stat().st_mtime_ns, path.stat().st_size) for path in paths}


def weights_of(source: str | Path) -> str:
    """One line on the files that the weights of a model come from, with their SHA-256, which is that on the hub.

    Of several files it is the SHA-256 of the JSON with that of each.
    """
    hashes = hashes_of(source)
    if not hashes:
        return "the files of its weights are not recorded"
    if len(hashes) == 1:
        ((name, value),) = hashes.items()
        return f"weights {name}, SHA-256 {value}"
    return f"weights in {len(hashes)} files, SHA-256 of the list of theirs {checksums.of_json(hashes)}"


@functools.lru_cache(maxsize=64)
def _hash(path: Path, changed: int, size: int) -> str:
    return checksums.of_file(path)
