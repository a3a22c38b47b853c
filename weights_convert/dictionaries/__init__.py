"""Read and write the dictionaries (SAEs and transcoders) of other libraries. Needs neither torch nor JAX.

    read_dictionary(folder)                   -> (config, params)
    write_dictionary(folder, format, config, params)
    describe_dictionary(folder)               -> config, without the weights
    dictionary_format(folder)                 -> "saelens", "gemma-scope", "sparsify", "dictionary_learning", or None

    z     = w_enc (x - b_dec) + b_enc             w_enc x + b_enc if the config is not centred
    codes = activation(z)                         topk_relu, batchtopk, jumprelu or relu
    x_hat = w_dec codes + b_dec                   and + w_skip x with a skip

A format is an entry of ``FORMATS``: its files, a function that reads them, and one that writes them.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from weights_convert.dictionaries import dictionary_learning, gemma_scope, saelens, sparsify
from weights_convert.files import expanded
from weights_convert.weights import ReadModel

__all__ = ["FORMATS", "describe_dictionary", "dictionary_format", "read_dictionary", "write_dictionary"]


class Format(NamedTuple):
    """One format of dictionaries."""

    files: tuple[str, ...]  # a folder with all of these is of this format
    describe: Callable[[Path, str | None, int | None, str | None], dict[str, Any]]
    read: Callable[[Path, str | None, int | None, str | None], ReadModel]
    write: Callable[[Path, Mapping[str, Any], Mapping[str, Any]], None]


FORMATS = {
    "saelens": Format(saelens.FILES, saelens.describe, saelens.read, saelens.write),
    "gemma-scope": Format(gemma_scope.FILES, gemma_scope.describe, gemma_scope.read, gemma_scope.write),
    "sparsify": Format(sparsify.FILES, sparsify.describe, sparsify.read, sparsify.write),
    "dictionary_learning": Format(
        dictionary_learning.FILES, dictionary_learning.describe, dictionary_learning.read, dictionary_learning.write
    ),
}
"""The formats, by the names that ``write_dictionary`` takes."""


def dictionary_format(folder: str | Path) -> str | None:
    """The format of the dictionary in a folder, by its files. None: it holds none.

    Raises:
        ValueError: if it has the files of more than one format.
    """
    folder = expanded(folder)
    found = [name for name, form in FORMATS.items() if all((folder / file).is_file() for file in form.files)]
    if len(found) > 1:
        raise ValueError(f"{folder} has the files of {' and '.join(found)}: keep one dictionary in a folder")
    return found[0] if found else None


def read_dictionary(
    folder: str | Path, *, site: str | None = None, layer: int | None = None, target: str | None = None
) -> ReadModel:
    """Read an SAE or a transcoder of SAELens, Gemma Scope, sparsify or dictionary_learning.

    Args:
        folder: the folder of one dictionary. Gemma Scope has no config: there, the folder's path may say the site and
            the layer, as in ``gemma-scope-2b-pt-res/layer_20/width_16k/average_l0_71``.
        site: where it reads, for files that do not say it: "mlp_in" (after the norm), "mlp_out", "resid_post", ...
        layer: the layer of that site, from 0, for files that do not say it.
        target: what a transcoder reconstructs, for files that do not say it. None: "mlp_out" if the site is "mlp_in".

    Returns:
        ``(config, params)``: keyword arguments of ``SAEConfig``; and arrays in the stored dtype: ``w_enc [F, d]``,
        ``b_enc [F]``, ``w_dec [d, F]``, ``b_dec [d]``; ``threshold [F]`` for "jumprelu" and ``[]`` for "batchtopk"; and
        ``w_skip [d, d]``, which has outputs as rows, with a skip.

    Raises:
        FileNotFoundError: if the folder holds no dictionary of these formats.
        ValueError: for architectures and options that cannot be read, unknown config keys, a hook without a site, a
            site, layer or target that contradicts the file, weights that do not match the config or are not finite, and
            damaged files.

    Example:
        >>> import tempfile
        >>> import numpy as np
        >>> config = dict(site="mlp_in", layer=3, d_model=2, expansion=2, k=None, activation="relu", target="mlp_out")
        >>> params = {"w_enc": np.ones((4, 2), "f4"), "w_dec": np.ones((2, 4), "f4"), "b_dec": np.ones(2, "f4")}
        >>> folder = tempfile.mkdtemp()
        >>> write_dictionary(folder, "saelens", config, params)
        >>> config, params = read_dictionary(folder)
        >>> config["site"], config["target"], config["activation"], sorted(params)
        ('mlp_in', 'mlp_out', 'relu', ['b_dec', 'b_enc', 'w_dec', 'w_enc'])
    """
    folder = expanded(folder)
    name = dictionary_format(folder)
    if name is None:
        there = sorted(entry.name for entry in folder.iterdir()) if folder.is_dir() else "no such folder"
        sought = "; ".join(f"{', '.join(form.files)} ({name})" for name, form in FORMATS.items())
        raise FileNotFoundError(f"{folder} holds no dictionary, which are files {sought}. It holds: {there}")
    return FORMATS[name].read(folder, site, layer, target)


def describe_dictionary(
    folder: str | Path,
    format: str,
    *,
    site: str | None = None,
    layer: int | None = None,
    target: str | None = None,
) -> dict[str, Any]:
    """The config of a dictionary of a format, without its weights, which need not be there.

    The arguments and errors are those of ``read_dictionary``. Of Gemma Scope, which has no config, it is what the
    path says: no ``d_model`` and no ``expansion``, and the folder need not be there.

    Example:
        >>> describe_dictionary("gemma-scope-2b-pt-res/layer_20/width_16k/average_l0_71", "gemma-scope")["layer"]
        20
    """
    return FORMATS[format].describe(expanded(folder), site, layer, target)


def write_dictionary(folder: str | Path, format: str, config: Mapping[str, Any], params: Mapping[str, Any]) -> None:
    """Write an SAE or a transcoder for another library into an existing folder. The files replace older ones.

    Reading what was written gives the same params, bit for bit. Without an encoder bias, one of zeros is written.

    Args:
        folder: the existing folder.
        format: "saelens", "gemma-scope", "sparsify" or "dictionary_learning".
        config: keyword arguments of ``SAEConfig``, as from ``read_dictionary``.
        params: arrays in any memory layout, as from ``read_dictionary``. They keep their dtype.

    Warns:
        UserWarning: for activation "topk": the formats with a top-k set negative codes to 0.

    Raises:
        FileNotFoundError: if the folder does not exist.
        ValueError: for a format that there is not, for what the format cannot say, and for params that do not match the
            config, are not finite, or are not float32, float16 or bfloat16. Nothing is written then.
    """
    folder = expanded(folder)
    if format not in FORMATS:
        raise ValueError(f"unknown format {format!r}: give one of {', '.join(FORMATS)}")
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}: make it first")
    FORMATS[format].write(folder, config, params)
