"""Read the folder of a published SAE as a config and params."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from weights_convert.files import check_keys, check_kinds, check_sizes, read_config, weight_files
from weights_convert.names import parse_sae_name
from weights_convert.weights import ReadModel, Weights

SITES = ("resid_pre", "attn_out", "resid_mid", "mlp_in", "mlp_out", "resid_post")

_REQUIRED = {"point", "expansion", "k", "d_model"}
_MEANT = _REQUIRED | {"bilinear_encoder", "encoder_bias", "passthrough", "normalize", "tag", "target", "token_lookup"}
_TRAINING = {
    *("lr", "in_batch", "out_batch", "n_buffers", "n_batches", "n_ctx", "val_steps", "dead_thresh", "init_scale"),
    *("decoder_decay", "normalize_decoder"),
}


def read_sae(folder: str | Path) -> ReadModel:
    """Read the config and the params of a published SAE.

    ``passthrough`` becomes a tuple. ``normalize`` is kept but, as in the original, not applied.

    Args:
        folder: a folder named ``<layer>-<point>-x<expansion>-k<k>[-<tag>]``, with ``config.json`` and
            ``model.safetensors``.

    Returns:
        ``(config, params)``: keyword arguments of ``SAEConfig``; and arrays in the stored dtype: ``w_enc [F, d]``
        (``[2 F, d]`` for a bilinear encoder), ``w_dec [d, F]``, ``b_dec [d]`` and, with an encoder bias, ``b_enc``.

    Raises:
        FileNotFoundError: if a file does not exist.
        ValueError: for unknown config keys, for options that are not supported, if the config contradicts the folder's
            name or the weights, if weights are not finite, and for damaged files.
    """
    folder = Path(folder)
    path = folder / "config.json"
    raw = _flattened(read_config(folder))
    check_keys(path, raw, _MEANT | _TRAINING, _REQUIRED)
    check_kinds(path, raw, {"bilinear_encoder": bool, "encoder_bias": bool, "token_lookup": bool, "tag": str})
    check_sizes(path, raw, ("d_model", "expansion", "k"))
    site, layer = _point(path, raw["point"])
    if raw.get("target") is not None and _point(path, raw["target"]) != (site, layer):
        raise ValueError(
            f"{path}: target {raw['target']} differs from point {raw['point']}: transcoders of this layout cannot be "
            "loaded, because they subtract the bias of what they reconstruct from what they read"
        )
    if raw.get("token_lookup"):
        raise ValueError(f"{path} has token_lookup: SAEs with a table of tokens cannot be loaded")
    config = {
        "site": site,
        "layer": layer,
        "d_model": raw["d_model"],
        "expansion": raw["expansion"],
        "k": raw["k"],
        "bilinear_encoder": bool(raw.get("bilinear_encoder", False)),
        "encoder_bias": bool(raw.get("encoder_bias", False)),
        "passthrough": _passthrough(path, raw.get("passthrough"), raw["d_model"]),
        "normalize": _normalize(path, raw.get("normalize")),
        "tag": raw.get("tag") or None,
    }
    _check_name(folder, config)
    weights = Weights(weight_files(folder), r"w_enc\.|w_dec\.|b_dec$")
    shapes = expected_shapes(config)
    weights.check(shapes)
    return ReadModel(config, {PARAMS[key]: np.array(weights.read(key)) for key in shapes})


PARAMS = {"w_enc.weight": "w_enc", "w_dec.weight": "w_dec", "b_dec": "b_dec", "w_enc.bias": "b_enc"}
"""The names of the params in the published files, with those of this library."""


def expected_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """The weights of an SAE and their shapes, under their published names."""
    d, features = config["d_model"], config["d_model"] * config["expansion"]
    rows = features * (2 if config.get("bilinear_encoder") else 1)
    shapes: dict[str, tuple[int, ...]] = {"w_enc.weight": (rows, d), "w_dec.weight": (d, features), "b_dec": (d,)}
    return shapes | ({"w_enc.bias": (rows,)} if config.get("encoder_bias") else {})


def _flattened(raw: dict[str, Any]) -> dict[str, Any]:
    """The config with the keys under ``kwargs`` moved to the top. The original put unknown keys there at every save."""
    flat: dict[str, Any] = {}
    level: Any = raw
    while isinstance(level, dict):
        flat = {key: value for key, value in level.items() if key != "kwargs"} | flat
        level = level.get("kwargs")
    return flat


def _point(path: Path, point: Any) -> tuple[str, int]:
    """``["mlp-out", 7]``, with hyphens or underscores, as a site and a layer."""
    if isinstance(point, list) and len(point) == 2 and isinstance(point[0], str) and type(point[1]) is int:
        site = point[0].replace("-", "_")
        if site in SITES and point[1] >= 0:
            return site, point[1]
    raise ValueError(
        f"{path}: point must be a site and a layer, such as ['mlp-out', 7], got {point!r}; sites: {', '.join(SITES)}"
    )


def _passthrough(path: Path, value: Any, d_model: int) -> tuple[int, ...]:
    """An int, a list of ints, or None, as a tuple."""
    dims = [] if value is None else [value] if type(value) is int else value
    if not isinstance(dims, list) or any(type(dim) is not int or not 0 <= dim < d_model for dim in dims):
        raise ValueError(
            f"{path}: passthrough must be a coordinate in 0 ... {d_model - 1} or a list of them, got {value!r}"
        )
    return tuple(dims)


def _normalize(path: Path, value: Any) -> float | None:
    if value is None or value is False:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{path}: normalize must be a number or null, got {value!r}")
    return float(value)


def _check_name(folder: Path, config: dict[str, Any]) -> None:
    """Raise ``ValueError`` if the folder's name contradicts its config. A missing tag is taken from the name."""
    named = parse_sae_name(folder.resolve().name)
    if named is None:
        return
    config["tag"] = config["tag"] or named.tag
    said = {key: config[key] for key in ("layer", "site", "expansion", "k", "tag")}
    wrong = [
        f"{key} {value!r} but the name says {getattr(named, key)!r}"
        for key, value in said.items()
        if value != getattr(named, key)
    ]
    if wrong:
        raise ValueError(f"{folder / 'config.json'} has {'; '.join(wrong)}: rename the folder, or correct its config")
