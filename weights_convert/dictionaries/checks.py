"""What the formats of dictionaries share: sizes and weights when reading, and what cannot be said when writing."""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from weights_convert.sae import SITES
from weights_convert.weights import Weights, check_written, differences

LARGEST_SIZE = 2**40
"""The largest width or number of features. Beyond it, a config is damaged."""

_REQUIRED = {"site", "layer", "d_model", "expansion"}
_DEFAULTS = {
    **{
        "bilinear_encoder": False,
        "encoder_bias": False,
        "passthrough": (),
        "normalize": None,
        "apply_normalize": False,
    },
    **{"tag": None, "activation": "topk", "target": None, "skip": False, "centred": None, "k": None},
    **{"product_bias": False, "linear_term": False, "token_lookup": None},
    **{"inputs": None, "inputs_k": None, "reads": None},
    "max_active": None,  # not a matter of files
}


def expansion(path: Path, features: int, d_model: int) -> int | float:
    """``features / d_model``, an int where it is one. Raises ``ValueError`` if a size is beyond ``LARGEST_SIZE``.

    Example:
        >>> expansion(Path("cfg.json"), 64, 16), expansion(Path("cfg.json"), 24, 16)
        (4, 1.5)
    """
    if max(features, d_model) > LARGEST_SIZE:
        raise ValueError(f"{path} has a size beyond {LARGEST_SIZE}: it is damaged, download it again")
    return features // d_model if features % d_model == 0 else features / d_model


def features_of(config: Mapping[str, Any]) -> int:
    """The number of features of a config."""
    return round(config["d_model"] * config["expansion"])


def expected_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """The params of a config and their shapes."""
    d, features = config["d_model"], features_of(config)
    shapes: dict[str, tuple[int, ...]] = {"w_enc": (features, d), "w_dec": (d, features), "b_dec": (d,)}
    shapes |= {"b_enc": (features,)} if config["encoder_bias"] else {}
    shapes |= (
        {"threshold": {"jumprelu": (features,), "batchtopk": ()}[config["activation"]]}
        if (config["activation"] in ("jumprelu", "batchtopk"))
        else {}
    )
    return shapes | ({"w_skip": (d, d)} if config["skip"] else {})


def read_params(
    weights: Weights,
    config: Mapping[str, Any],
    names: Mapping[str, str],
    flipped: tuple[str, ...],
    ignored: tuple[str, ...] = (),
) -> dict[str, np.ndarray]:
    """The params of a config, in the stored dtype.

    Args:
        weights: the tensors of the file.
        config: the config of the dictionary.
        names: the names of the params in the file.
        flipped: the params that the file has transposed.
        ignored: tensors that may be there and do not matter.

    Raises:
        ValueError: unless the file has exactly these tensors, of the right shapes, and all are finite.
    """
    shapes = expected_shapes(config)
    weights.check({names[key]: shape[::-1] if key in flipped else shape for key, shape in shapes.items()}, ignored)
    return {key: turned(weights.read(names[key]), key in flipped) for key in shapes}


def turned(value: np.ndarray, flip: bool) -> np.ndarray:
    """A copy of an array in C order, transposed if ``flip``."""
    return np.array(value.T if flip else value, order="C")


def check_k(path: Path, k: Any, features: int) -> int:
    """A number of active features. Raises ``ValueError`` unless it is a whole number in 1 ... ``features``."""
    if type(k) is not int or not 1 <= k <= features:
        raise ValueError(f"{path}: k is {k!r:.100}, but must be a whole number in 1 ... {features}: correct it")
    return k


class Checked(NamedTuple):
    """A config with all options, and its params with ``b_enc``, that a format can say."""

    config: dict[str, Any]
    params: dict[str, np.ndarray]
    transcoder: bool


def checked(
    form: str, config: Mapping[str, Any], params: Mapping[str, Any], activations: tuple[str, ...], *, one_dtype: bool
) -> Checked:
    """What is written. Without an encoder bias it is written as zeros.

    Args:
        form: the name of the format, for messages.
        config: keyword arguments of ``SAEConfig``.
        params: its arrays.
        activations: what the format can say. Without "topk" but with "topk_relu", "topk" is taken with a warning.
        one_dtype: whether all params must have one dtype, because the peer casts them.

    Raises:
        ValueError: for an option that no peer has, another activation, and params that do not match the config, are not
            finite, or have a dtype other than float32, float16 and bfloat16.
    """
    config = _DEFAULTS | dict(config)
    _refuse(form, config)
    signed = config["activation"] == "topk" and "topk_relu" in activations
    if config["activation"] not in activations and not signed:
        raise ValueError(
            f"{form} has no activation {config['activation']!r} for {_what(config)}, only {', '.join(activations)}: "
            "write another format"
        )
    if config["activation"] in ("topk", "topk_relu", "batchtopk") and type(config["k"]) is not int:
        raise ValueError(f"{form} needs k for {config['activation']}, but k is {config['k']!r}: give it in the config")
    if config["k"] is not None and not 1 <= config["k"] <= features_of(config):
        raise ValueError(f"k is {config['k']!r}, but must be in 1 ... {features_of(config)}, the number of features")
    arrays = {key: np.asarray(value) for key, value in params.items()}
    _match(config, arrays, one_dtype, form)
    if signed:
        warnings.warn(f"{form} sets negative codes to 0, which top-k codes of this SAE may be", stacklevel=4)
    if not config["encoder_bias"]:
        arrays["b_enc"] = np.zeros(features_of(config), arrays["w_enc"].dtype)
    transcoder = config["target"] not in (None, config["site"])
    centred = not transcoder if config["centred"] is None else config["centred"]
    if transcoder and centred:
        raise ValueError(
            f"{form} cannot say a transcoder that is centred: its b_dec belongs to the target: centred=False"
        )
    activation = "topk_relu" if signed else config["activation"]
    return Checked(config | {"centred": centred, "activation": activation}, arrays, transcoder)


def need_centring(form: str, config: Mapping[str, Any], centred: bool) -> None:
    """Raise ``ValueError`` if a format has only the other way to feed the encoder."""
    if config["centred"] is not centred:
        raise ValueError(
            f"{form} cannot say centred={config['centred']} for {_what(config)} with {config['activation']}: "
            f"{how_to_centre(centred)}"
        )


def refuse(form: str, option: str, value: Any, fix: str) -> ValueError:
    """The error for an option that a format cannot say."""
    return ValueError(f"{form} cannot say {option} {value!r}: {fix}")


def _what(config: Mapping[str, Any]) -> str:
    return "a transcoder" if config["target"] not in (None, config["site"]) else "an SAE"


def _refuse(form: str, config: Mapping[str, Any]) -> None:
    lacking, unknown = sorted(_REQUIRED - config.keys()), sorted(config.keys() - _REQUIRED - _DEFAULTS.keys())
    if lacking or unknown:
        raise ValueError(f"the config lacks {lacking} and has unknown options {unknown}: give that of these params")
    sizes = config["d_model"], config["expansion"]
    if (
        type(sizes[0]) is not int
        or type(sizes[1]) not in (int, float)
        or not min(sizes) > 0
        or not max(sizes) < LARGEST_SIZE
    ):
        raise ValueError(f"d_model and expansion are {sizes}: give a whole number and a number, both above 0")
    if config["apply_normalize"]:
        raise ValueError(
            f"{form} has no apply_normalize: divide w_enc by normalize, multiply w_dec and b_dec by it, and leave out "
            "apply_normalize. The result is the same"
        )
    for option in ("token_lookup", "inputs"):
        if config[option] is not None:
            raise refuse(form, option, config[option], "keep it as a checkpoint of this library")
    for option in ("passthrough", "bilinear_encoder", "product_bias", "linear_term"):
        if config[option]:
            raise refuse(form, option, config[option], "keep it as a checkpoint of this library, or use write_sae")
    for option in ("site", "target"):
        if config[option] not in (*SITES, *((None,) if option == "target" else ())):
            raise refuse(form, option, config[option], f"give one of {', '.join(SITES)}")
    if type(config["layer"]) is not int or config["layer"] < 0:
        raise refuse(form, "layer", config["layer"], "give a whole number of at least 0")


def _match(config: Mapping[str, Any], arrays: Mapping[str, np.ndarray], one_dtype: bool, form: str) -> None:
    missing, extra, wrong = differences({key: value.shape for key, value in arrays.items()}, expected_shapes(config))
    if missing or extra or wrong:
        raise ValueError(
            "the params do not match the config: give the config of these params. Missing: "
            f"{', '.join(missing) or '-'}; extra: {', '.join(extra) or '-'}; shapes: {'; '.join(wrong) or 'right'}"
        )
    check_written(arrays)
    kinds = sorted({value.dtype.name for value in arrays.values()})
    if one_dtype and len(kinds) > 1:
        raise ValueError(f"{form} has one dtype for all params, but these have {', '.join(kinds)}: cast them to one")


def how_to_centre(centred: bool) -> str:
    """How a dictionary is written as one that is centred, or as one that is not."""
    sign = "add w_enc @ b_dec to" if centred else "subtract w_enc @ b_dec from"
    return f"{sign} b_enc, with encoder_bias=True, and set centred to {centred}. The result is the same"
