"""Read the folder of a published transformer as a config and params.

The keys of the state dict become, with d = d_model, h = d_hidden (``mlp.w`` has ``[h, d]`` if it is not bilinear):

    transformer.wte.weight          [V, d]     w_e
    transformer.h.{i}.attn.qkv      [3 d, d]   layers.attention.w_q, w_k, w_v  (rows in this order)
    transformer.h.{i}.attn.o        [d, d]     layers.attention.w_o
    transformer.h.{i}.mlp.w         [2 h, d]   layers.mlp.w_l, w_r  (the gated side first)
    transformer.h.{i}.mlp.p         [d, h]     layers.mlp.w_p
    lm_head.weight                  [V, d]     w_u
"""

import math
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from weights_convert.files import check_keys, check_kinds, check_sizes, read_config, weight_files
from weights_convert.weights import ReadModel, Weights

PAD_IDS = {"ts-4096": 2, "mistral": 2, "gpt2": 50256}
"""The padding token id of each known tokenizer."""

GATES = (None, "relu", "silu", "gelu")

_REQUIRED = {"n_head", "n_layer", "n_ctx", "d_model", "d_hidden"}
_MEANT = _REQUIRED | {
    "bilinear",
    "gate",
    "bias",
    "normalization",
    "tokenizer",
    "dataset",
    "n_vocab",
    "repo",
    "pad_token_id",
}
_OLDER = {"scale_attn", "attention2", "norm_bias", "mlp", "rms"}
_HARMLESS = {
    *("architectures", "model_type", "torch_dtype", "dtype", "transformers_version", "_name_or_path"),
    *("modifier", "noise"),  # a suffix of the name; the noise of the training
    *("use_cache", "return_dict", "output_attentions", "output_hidden_states", "tie_word_embeddings"),
    *("bos_token_id", "eos_token_id"),
}
_KINDS = {
    **dict.fromkeys(("bilinear", "bias", "scale_attn", "attention2", "norm_bias", "rms"), bool),
    **dict.fromkeys(("tokenizer", "dataset", "repo", "mlp"), str),
    **{"gate": (str, bool), "n_vocab": int, "pad_token_id": int},
}
_DEAD = re.compile(r"transformer\.(h\.\d+\.n[12]|n_f)\.norm\.linear\.weight")


def read_transformer(folder: str | Path, *, attn_scale: float | None = None, name: str | None = None) -> ReadModel:
    """Read the config and the params of a published model.

    Args:
        folder: a folder with ``config.json`` and ``model.safetensors`` or ``pytorch_model.bin``. The weights are one
            file, or shards with an index such as ``model.safetensors.index.json``. No code in a pickle is run: see
            ``read_torch``.
        attn_scale: the factor on the attention's output. None: from ``scale_attn`` in the config; if it is missing,
            from the model's name, with a warning: 1 for ts-*, 1/sqrt(2 n_layer) for all others.
        name: the model's name. Default: ``repo`` in the config, or the folder's name.

    Returns:
        ``(config, params)``: keyword arguments of ``TransformerConfig``, and a nested dict of arrays in the stored
        dtype, bit for bit. One exception: gains of an older file's norms are folded into the weights, with a warning.

    Raises:
        FileNotFoundError: if a file does not exist.
        ValueError: for unknown config keys, for an architecture that is not supported, for weights that are missing,
            unexpected, of the wrong shape or not finite, and for damaged files.
    """
    folder = Path(folder)
    raw = read_config(folder)
    path = folder / "config.json"
    check_keys(path, raw, _MEANT | _OLDER | _HARMLESS, _REQUIRED)
    check_kinds(path, raw, _KINDS)
    check_sizes(path, raw, _REQUIRED)
    _refuse(path, raw)
    weights = Weights(weight_files(folder), r"transformer\.|lm_head\.")
    config = _config(path, raw, weights)
    gains = [key for key in _gain_keys(config) if key in weights.shapes]
    buffers = [key for i in range(config["n_layer"]) if (key := _layer(i, "attn.rotary.inv_freq")) in weights.shapes]
    dead = [key for key in weights.shapes if _DEAD.fullmatch(key)]
    expected = expected_shapes(config) | {key: (config["d_model"],) for key in gains}
    weights.check(expected, [*buffers, *dead])
    for key in buffers:
        _check_rotary(weights, key, config)
    params = _params(config, weights)
    if gains:
        _fold(params, {key: weights.read(key) for key in gains})
        warnings.warn(
            f"{folder} has norms with gains, which are folded into the weights that read them: {', '.join(gains)}",
            stacklevel=2,
        )
    known_as = name or raw.get("repo") or folder.resolve().name
    config["attn_scale"] = _attention_scale(attn_scale, raw.get("scale_attn"), known_as, config["n_layer"])
    return ReadModel(config, params)


def _refuse(path: Path, raw: dict[str, Any]) -> None:
    if raw.get("attention2"):
        raise ValueError(
            f"{path} has attention2: five projections and no softmax. Only softmax attention (attention2 false) can be "
            "loaded"
        )
    if raw.get("norm_bias"):
        raise ValueError(f"{path} has norm_bias: norms with a bias cannot be loaded, only RMSNorm without one")


def _config(path: Path, raw: dict[str, Any], weights: Weights) -> dict[str, Any]:
    """The config without ``attn_scale``."""
    config = {key: raw[key] for key in sorted(_REQUIRED)}
    if config["n_layer"] > len(weights.shapes):
        raise ValueError(
            f"{path} has n_layer {config['n_layer']}, but there are only {len(weights.shapes)} weights: correct it"
        )
    if config["d_model"] % (2 * config["n_head"]):
        raise ValueError(f"{path}: d_model {config['d_model']} is not a multiple of 2 n_head, {2 * config['n_head']}")
    if raw.get("bilinear") is not None:
        config["bilinear"] = raw["bilinear"]
    elif (raw.get("mlp") or "bilinear") in ("bilinear", "blp"):
        config["bilinear"] = True
    else:
        raise ValueError(f"{path} has mlp {raw['mlp']!r} but no bilinear: add the keys bilinear and gate")
    config["gate"] = raw.get("gate") or None  # false in mid-2024
    if config["gate"] not in GATES:
        raise ValueError(f"{path}: unknown gate {config['gate']!r}; known: {GATES}")
    config["bias"] = bool(raw.get("bias", False))
    config["attention_bias"] = config["bias"] and any(key.endswith(".attn.qkv.bias") for key in weights.shapes)
    config["normalization"] = _normalization(path, raw)
    config["n_vocab"] = raw.get("n_vocab") or weights.shapes.get("transformer.wte.weight", (1,))[0]
    config["tokenizer"], config["dataset"] = raw.get("tokenizer"), raw.get("dataset")
    pad_id = raw.get("pad_token_id")
    config["pad_id"] = PAD_IDS.get(config["tokenizer"] or "") if pad_id is None else pad_id
    return config


def _normalization(path: Path, raw: dict[str, Any]) -> tuple[bool, bool, bool]:
    value = raw.get("normalization", raw.get("rms", True))
    if "normalization" in raw and "rms" in raw and bool(raw["rms"]) != bool(raw["normalization"]):
        raise ValueError(f"{path}: rms {raw['rms']!r} and normalization {value!r} contradict each other: keep one")
    if isinstance(value, bool):
        return value, value, value
    if isinstance(value, list) and len(value) == 3 and all(isinstance(part, bool) for part in value):
        return value[0], value[1], value[2]
    raise ValueError(f"{path}: normalization must be true, false or three (attention, MLP, final), got {value!r}")


def _layer(index: int, name: str) -> str:
    return f"transformer.h.{index}.{name}"


def _gain_keys(config: dict[str, Any]) -> list[str]:
    """The keys of the gains that an older file may have, for the norms that are switched on."""
    attention, mlp, final = config["normalization"]
    keys = [
        _layer(i, n) for i in range(config["n_layer"]) for n, on in (("n1.weight", attention), ("n2.weight", mlp)) if on
    ]
    return keys + (["transformer.n_f.weight"] if final else [])


def expected_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """The weights of a model and their shapes, under their published names."""
    d, h, n_vocab = config["d_model"], config["d_hidden"], config["n_vocab"]
    rows = 2 * h if config["bilinear"] else h
    layer = {
        "attn.qkv.weight": (3 * d, d),
        "attn.o.weight": (d, d),
        "mlp.w.weight": (rows, d),
        "mlp.p.weight": (d, h),
    }
    if config["bias"]:
        layer |= {"mlp.w.bias": (rows,), "mlp.p.bias": (d,)}
    if config["attention_bias"]:
        layer |= {"attn.qkv.bias": (3 * d,)}
    layers = {_layer(i, key): shape for i in range(config["n_layer"]) for key, shape in layer.items()}
    return {"transformer.wte.weight": (n_vocab, d), "lm_head.weight": (n_vocab, d), **layers}


def rotary_frequencies(d_head: int) -> np.ndarray:
    """The ``inv_freq`` of the published models, in float64: ``10000^(-2 i / d_head)``, ``i = 0 ... d_head / 2 - 1``."""
    half = d_head // 2
    return 10_000.0 ** -(np.arange(half) / half)


def _check_rotary(weights: Weights, key: str, config: dict[str, Any]) -> None:
    """Raise ``ValueError`` unless the stored frequencies are those that the model computes."""
    frequencies = rotary_frequencies(config["d_model"] // config["n_head"])
    stored = weights.read(key)
    tolerance = 1e-5 if stored.dtype == np.float32 else 1e-2
    if stored.shape != frequencies.shape or not np.allclose(
        stored.astype(np.float64), frequencies, rtol=tolerance, atol=0
    ):
        raise ValueError(
            f"{key} is not the {len(frequencies)} frequencies of the rotary base 10000: other bases cannot be loaded"
        )


def _params(config: dict[str, Any], weights: Weights) -> dict[str, Any]:
    def stacked(key: str, *names: str) -> dict[str, np.ndarray]:
        """Split the rows of a weight evenly among ``names``, with the layers stacked."""
        keys = [_layer(i, key) for i in range(config["n_layer"])]
        dtypes = {weights.dtype(key) for key in keys}
        if len(dtypes) > 1:
            raise ValueError(
                f"{key} is stored as {' and as '.join(sorted(dtypes))}: save all layers again in one dtype"
            )
        first = weights.read(keys[0])
        rows = first.shape[0] // len(names)
        parts = {n: np.empty((config["n_layer"], rows, *first.shape[1:]), first.dtype) for n in names}
        for i in range(config["n_layer"]):
            value = first if i == 0 else weights.read(keys[i])
            for j, part in enumerate(parts.values()):
                part[i] = value[j * rows : (j + 1) * rows]
        return parts

    # The largest first: during its copy a tensor is in memory twice.
    embeddings = {
        name: np.array(weights.read(key))
        for name, key in (("w_e", "transformer.wte.weight"), ("w_u", "lm_head.weight"))
    }
    sides = ("l", "r") if config["bilinear"] else ("l",)
    attention = stacked("attn.qkv.weight", "w_q", "w_k", "w_v") | stacked("attn.o.weight", "w_o")
    mlp = stacked("mlp.w.weight", *(f"w_{side}" for side in sides)) | stacked("mlp.p.weight", "w_p")
    if config["attention_bias"]:
        attention |= stacked("attn.qkv.bias", "b_q", "b_k", "b_v")
    if config["bias"]:
        mlp |= stacked("mlp.w.bias", *(f"b_{side}" for side in sides)) | stacked("mlp.p.bias", "b_p")
    return embeddings | {"layers": {"attention": attention, "mlp": mlp}}


def _fold(params: dict[str, Any], gains: dict[str, np.ndarray]) -> None:
    """Multiply each norm's gain into the columns of the weights that read it: ``W (g * x) = (W g) x``."""
    for key, gain in gains.items():
        if key == "transformer.n_f.weight":
            params["w_u"] = params["w_u"] * gain
            continue
        _, _, index, norm, _ = key.split(".")
        part, names = ("attention", ("w_q", "w_k", "w_v")) if norm == "n1" else ("mlp", ("w_l", "w_r"))
        for name in names:
            if name in params["layers"][part]:
                params["layers"][part][name][int(index)] *= gain


def _attention_scale(given: float | None, scale_attn: bool | None, name: str, n_layer: int) -> float:
    """The factor on the attention's output: as given, from the config, or from the model's name with a warning."""
    scaled = 1 / math.sqrt(2 * n_layer)
    if given is not None:
        return float(given)
    if scale_attn is not None:
        return scaled if scale_attn else 1.0
    short = name.rstrip("/").split("/")[-1]
    if short.startswith("ts-"):
        chosen, why = 1.0, "1, because models named ts-* were trained with it"
    elif short.startswith("fw-"):
        chosen, why = scaled, f"1/sqrt(2 n_layer) = {scaled:.4g}, because models named fw-* were trained with it"
    else:
        chosen, why = scaled, f"1/sqrt(2 n_layer) = {scaled:.4g}, the current default of the original"
    warnings.warn(
        f"the files of {name} do not give the scale of its attention's output; chosen: {why}. To check, run "
        "`bilinear-jax eval --attn-scale auto --data TEXT` on text like its training text. It compares the losses of "
        f"attn_scale=1 and attn_scale={scaled:.6g}: the right one is clearly lower. Then give that attn_scale",
        stacklevel=3,
    )
    return chosen
