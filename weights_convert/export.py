"""Write a config and params as a published folder, which the original torch code can read.

This is the inverse of ``transformer.py`` and ``sae.py``, bit for bit: reading what was written here gives the same
config and the same params.
"""

import json
import math
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from weights_convert import sae, transformer
from weights_convert.files import expanded
from weights_convert.names import SAEName, parse_sae_name
from weights_convert.weights import check_written, differences

_DEFAULTS = {"bilinear": True, "gate": None, "bias": False, "attention_bias": False, "normalization": True}
_SAE_DEFAULTS = {"bilinear_encoder": False, "encoder_bias": False, "normalize": None, "tag": None}


def write_transformer(
    folder: str | Path, config: Mapping[str, Any], params: Mapping[str, Any], *, repo: str | None = None
) -> None:
    """Write ``config.json`` and ``model.safetensors`` of a model into an existing folder. They replace older ones.

    Args:
        folder: the existing folder.
        config: the keyword arguments of ``TransformerConfig``, as from ``read_transformer``.
        params: nested dicts of arrays in any memory layout, as from ``read_transformer``. They keep their dtype.
        repo: the name under which the files will be published. None: not known.

    Warns:
        UserWarning: if the current original code would read the model differently: an attention scale of 1, only some
            norms switched off, biases of the attention, or an unknown tokenizer.

    Raises:
        ValueError: if the layout cannot describe the model: an attention scale other than 1 and
            ``1 / sqrt(2 n_layer)`` (to six digits), or biases of the attention without biases of the MLP. Also if the
            params do not match the config, are not finite, or are not float32, float16 or bfloat16. Nothing is written
            then.

    Example:
        >>> import tempfile
        >>> from weights_convert import read_transformer
        >>> d, h, v = 4, 6, 5
        >>> def ones(*shape): return np.ones(shape, np.float32)
        >>> config = dict(n_layer=1, n_head=1, d_model=d, d_hidden=h, n_ctx=8, n_vocab=v, attn_scale=0.5**0.5)
        >>> params = {"w_e": ones(v, d), "w_u": ones(v, d), "layers": {
        ...     "attention": {name: ones(1, d, d) for name in ("w_q", "w_k", "w_v", "w_o")},
        ...     "mlp": {"w_l": ones(1, h, d), "w_r": ones(1, h, d), "w_p": ones(1, d, h)}}}
        >>> folder = tempfile.mkdtemp()
        >>> write_transformer(folder, config, params)
        >>> read_transformer(folder)[0]["n_vocab"]
        5
    """
    config = _DEFAULTS | dict(config)
    raw = _transformer_config(config, repo)
    state = _state(config, params)
    dtype = _check(state, transformer.expected_shapes(config), params)
    rotary = transformer.rotary_frequencies(config["d_model"] // config["n_head"]).astype(np.float32)
    state |= {f"transformer.h.{i}.attn.rotary.inv_freq": rotary.copy() for i in range(config["n_layer"])}
    _write(expanded(folder), raw | {"torch_dtype": dtype}, state, {"format": "pt"})


def write_sae(folder: str | Path, config: Mapping[str, Any], params: Mapping[str, Any]) -> None:
    """Write ``config.json`` and ``model.safetensors`` of an SAE into an existing folder. They replace older ones.

    Args:
        folder: the existing folder, which has the name of the SAE.
        config: the keyword arguments of ``SAEConfig``, as from ``read_sae``.
        params: arrays, as from ``read_sae``.

    Warns:
        UserWarning: for ``passthrough``, which the current original code ignores.

    Raises:
        ValueError: for what the layout cannot describe (``apply_normalize``, an activation other than "topk", a target,
            a skip, an encoder that is not centred, a bias of the products, a linear term, a token lookup, an expansion
            that is not whole); for a folder that does not have the name of the SAE; and for params as in
            ``write_transformer``. Nothing is written then.
    """
    folder = expanded(folder)
    _check_sae(config)
    if config.get("apply_normalize"):
        raise ValueError(
            "the published layout has no apply_normalize: divide w_enc by normalize, multiply "
            "w_dec and b_dec by it, and leave out apply_normalize. The result is the same"
        )
    raw = {
        **{"point": [config["site"].replace("_", "-"), config["layer"]], "target": None},
        **{key: config[key] for key in ("d_model", "expansion", "k")},
        **{key: config.get(key, default) for key, default in _SAE_DEFAULTS.items()},
        "token_lookup": False,
    }
    if config.get("passthrough"):
        raw["passthrough"] = list(config["passthrough"])
        _warn("ignores passthrough: there, these coordinates of the reconstruction are wrong")
    name = SAEName(config["layer"], config["site"], config["expansion"], config["k"], config.get("tag"))
    if parse_sae_name(folder.resolve().name) != name:
        raise ValueError(f"the folder of an SAE must have its name, but {folder} is not a name of {name}: rename it")
    state = {key: np.asarray(params[name]) for key, name in sae.PARAMS.items() if name in params}
    _check(state, sae.expected_shapes(config), params)
    _write(folder, raw, state, None)


def _check_sae(config: Mapping[str, Any]) -> None:
    """Raise ``ValueError`` for what the published layout cannot describe."""
    for option in ("token_lookup", "inputs"):
        if config.get(option) is not None:
            raise ValueError(
                f"the published layout cannot say {option} {config[option]}: keep it as a checkpoint of this library"
            )
    target = config.get("target")
    wrong = {
        "activation": config.get("activation", "topk") != "topk",
        "target": target not in (None, config["site"]),
        "skip": bool(config.get("skip")),
        "centred": config.get("centred", True) is False,
        "product_bias": bool(config.get("product_bias")),
        "linear_term": bool(config.get("linear_term")),
        "expansion": config["expansion"] != int(config["expansion"]),
    }
    if named := [f"{key} {config[key]!r}" for key, is_wrong in wrong.items() if is_wrong]:
        raise ValueError(
            f"the published layout has only top-k SAEs, and cannot say {', '.join(named)}: keep it as a checkpoint of "
            "this library, or write it for another library with --format"
        )


def save_tensors(path: Path, tensors: Mapping[str, np.ndarray], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file. The arrays may have any memory layout (views, slices, Fortran order) and byte order.

    The package safetensors itself writes raw memory, which is right only for arrays in C order.

    Raises:
        OSError: if the file cannot be written. The message has the path.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    plain = {name: np.asarray(value, value.dtype.newbyteorder("<"), order="C") for name, value in tensors.items()}
    try:
        save_file(plain, path, metadata=metadata)
    except SafetensorError as error:
        raise OSError(f"could not write {path} ({error}): free disk space, or check what is at that path") from error
    os.chmod(path, path.parent.stat().st_mode & 0o644)  # safetensors makes it readable for its owner only


def _write(folder: Path, raw: Mapping[str, Any], state: dict[str, np.ndarray], metadata: Any) -> None:
    save_tensors(folder / "model.safetensors", state, metadata)
    (folder / "config.json").write_text(json.dumps(raw, indent=2) + "\n", encoding="utf-8")


def _check(state: dict[str, np.ndarray], expected: Mapping[str, tuple[int, ...]], params: Mapping[str, Any]) -> str:
    """The dtype of the weights. Raises ``ValueError`` unless they match the config and every param is among them."""
    missing, extra, wrong = differences({key: value.shape for key, value in state.items()}, expected)
    numbers = [sum(value.size for value in _leaves(tree)) for tree in (params, state)]
    if missing or extra or wrong or numbers[0] != numbers[1]:
        raise ValueError(
            "the params do not match the config: give the config of these params. In the model but not in the "
            f"params: {', '.join(missing) or 'nothing'}; in the params but not in the model: "
            f"{', '.join(extra) or 'nothing'}; shapes: {'; '.join(wrong) or 'as expected'}; numbers: {numbers[0]} in "
            f"the params, {numbers[1]} in the files"
        )
    check_written(state)
    return next(iter(state.values())).dtype.name


def _leaves(tree: Any) -> list[Any]:
    return [leaf for value in tree.values() for leaf in _leaves(value)] if isinstance(tree, Mapping) else [tree]


def _warn(what: str) -> None:
    warnings.warn(f"the current code of the original {what}", stacklevel=4)


_ONE_VALUE = {
    **{"n_kv_head": 0, "d_head": 0, "gains": False, "rms_eps": 1e-8, "rope_theta": 10_000.0, "rope_scaling": None},
    **{
        "qk_norm": False,
        "embed_scale": 1.0,
        "tied": False,
        "linear": False,
        "original_gate": None,
        "original_above": False,
    },
}
"""What the published layout cannot say, with the one value that its models have. 0: as ``TransformerConfig`` has it."""


def _transformer_config(config: Mapping[str, Any], repo: str | None) -> dict[str, Any]:
    usual = {"n_kv_head": config["n_head"], "d_head": config["d_model"] // config["n_head"]}
    for key, value in _ONE_VALUE.items():
        if config.get(key, value) not in (value, usual.get(key, value)):
            raise ValueError(
                f"the published layout cannot describe a model with {key} {config[key]!r}: keep it as a checkpoint of "
                "this library, with save_model"
            )
    if config["attention_bias"] and not config["bias"]:
        raise ValueError(
            "the published layout cannot have biases in the attention only: add biases of 0 to the MLP, with bias=True"
        )
    if config["gate"] not in transformer.GATES:
        raise ValueError(f"unknown gate {config['gate']!r}; known: {transformer.GATES}")
    tokenizer, norms = config.get("tokenizer"), config["normalization"]
    norms = [norms] * 3 if isinstance(norms, bool) else list(norms)
    if len(set(norms)) > 1:
        _warn("has either all norms or none: there, the norms that are off in this model are on")
    if config["attention_bias"]:
        _warn("has no biases on queries, keys and values: it cannot load this model")
    if tokenizer not in (None, *transformer.PAD_IDS):
        _warn(f"knows the tokenizers {', '.join(transformer.PAD_IDS)}, but not {tokenizer}: publish the tokenizer too")
    optional = {"dataset": config.get("dataset"), "pad_token_id": config.get("pad_id")}
    return {
        "architectures": ["Transformer"],
        **{key: config[key] for key in ("n_head", "n_layer", "n_ctx", "d_model", "d_hidden", "n_vocab")},
        **{key: config[key] for key in ("bilinear", "gate", "bias")},
        "normalization": norms[0] if len(set(norms)) == 1 else norms,
        "scale_attn": _scaled(config),
        "tokenizer": tokenizer,
        "repo": repo,
        **{key: value for key, value in optional.items() if value is not None},
    }


def _scaled(config: Mapping[str, Any]) -> bool:
    """The value of ``scale_attn`` for the factor on the attention's output."""
    factor, scaled = config.get("attn_scale"), 1 / math.sqrt(2 * config["n_layer"])
    if factor is None or math.isclose(factor, scaled, rel_tol=1e-6):
        return True
    if factor == 1:
        _warn(
            f"always scales the attention by {scaled:.6g}, but this model has scale 1: to run it there, multiply w_o "
            f"by {1 / scaled:.6g} and set attn_scale to None"
        )
        return False
    raise ValueError(
        f"attn_scale is {factor:.6g}, but the published layout only allows 1 and {scaled:.6g}: "
        f"multiply w_o by {factor / scaled:.6g} and set attn_scale to None. The result is the same"
    )


def _state(config: Mapping[str, Any], params: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """All weights under their published names. Params that are missing are also missing here."""
    whole = {"transformer.wte.weight": "w_e", "lm_head.weight": "w_u"}
    state = {key: np.asarray(params[name]) for key, name in whole.items() if name in params}
    layers = params.get("layers", {})
    attention, mlp = layers.get("attention", {}), layers.get("mlp", {})
    sides = "lr" if config["bilinear"] else "l"
    joined = {"attn.qkv": (attention, "qkv"), "attn.o": (attention, "o"), "mlp.w": (mlp, sides), "mlp.p": (mlp, "p")}
    for key, (part, letters) in joined.items():
        for kind, mark in (("weight", "w"), ("bias", "b")):
            rows = [part[name] for letter in letters if (name := f"{mark}_{letter}") in part]
            for i in range(min(map(len, rows), default=0)):
                state[f"transformer.h.{i}.{key}.{kind}"] = np.concatenate([row[i] for row in rows])
    return state
