"""Read the folder of a gated transformer as Hugging Face stores it: Llama, Mistral, Qwen 2, Qwen 3 and Gemma.

All are one model: RMSNorms with gains, grouped-query attention with rotary positions, and the gated MLP
``W_p (gate(W_l x) * (W_r x))``. ``FAMILIES`` says what each ``model_type`` has of its own. The weights become, with
d = d_model, h = d_hidden, q = n_head d_head and k = n_kv_head d_head:

    model.embed_tokens.weight                       [V, d]         w_e
    model.layers.{i}.self_attn.{q,k,v}_proj         [q or k, d]    layers.attention.w_q, w_k, w_v
    model.layers.{i}.self_attn.o_proj               [d, q]         layers.attention.w_o
    model.layers.{i}.self_attn.{q,k}_norm           [d_head]       layers.attention.q_gain, k_gain
    model.layers.{i}.mlp.{gate,up}_proj             [h, d]         layers.mlp.w_l, w_r
    model.layers.{i}.mlp.down_proj                  [d, h]         layers.mlp.w_p
    model.layers.{i}.{input,post_attention}_layernorm   [d]        layers.attention_gain, mlp_gain
    model.norm.weight                               [d]            final_gain
    lm_head.weight                                  [V, d]         w_u, unless the embedding is tied
"""

import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from weights_convert.files import check_kinds, check_sizes, read_config, weight_files
from weights_convert.weights import ReadModel, Weights, aligned


class Family(NamedTuple):
    """What one ``model_type`` has of its own. The defaults are those of its config, where a key is missing."""

    act: str = "silu"  # hidden_act
    d_head: int | None = None  # head_dim; None: hidden_size / num_attention_heads
    tied: bool = False  # tie_word_embeddings
    window: int | None = None  # sliding_window
    window_switch: bool = False  # use_sliding_window says whether there is a window
    qkv_bias: bool = False  # biases on queries, keys and values, always
    qk_norm: bool = False  # RMSNorms on the queries and keys of each head
    one_plus: bool = False  # a norm multiplies by 1 + its weight
    scaled: bool = False  # the embeddings are multiplied by sqrt(hidden_size)
    acts: Mapping[str, str] = {}  # names of gates that mean another in this family
    keys: frozenset[str] = frozenset()  # config keys that only this family has


_WINDOW = frozenset({"sliding_window", "use_sliding_window", "layer_types"})

FAMILIES: dict[str, Family] = {
    "llama": Family(keys=frozenset({"mlp_bias"})),
    "mistral": Family(window=4096, keys=frozenset({"sliding_window", "layer_types"})),
    "qwen2": Family(qkv_bias=True, window=4096, window_switch=True, keys=_WINDOW),
    "qwen3": Family(qk_norm=True, d_head=128, window=4096, window_switch=True, keys=_WINDOW),
    "gemma": Family(
        act="gelu_pytorch_tanh",
        acts={"gelu": "gelu_pytorch_tanh"},  # the files of the first release say so and mean this
        d_head=256,
        tied=True,
        one_plus=True,
        scaled=True,
        keys=frozenset({"hidden_activation"}),
    ),
}
"""The families by ``model_type``. To add one, see docs/howto/add-a-family.md."""

GATES = {"silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "relu": "relu"}
"""The gates of ``TransformerConfig`` by the name in ``hidden_act``."""

_SIDES = {"l": "gate", "r": "up", "p": "down"}

NAMES = {
    "w_e": "model.embed_tokens.weight",
    "w_u": "lm_head.weight",
    "final_gain": "model.norm.weight",
    **{f"layers.attention.w_{n}": f"model.layers.{{}}.self_attn.{n}_proj.weight" for n in "qkvo"},
    **{f"layers.attention.b_{n}": f"model.layers.{{}}.self_attn.{n}_proj.bias" for n in "qkv"},
    **{f"layers.attention.{n}_gain": f"model.layers.{{}}.self_attn.{n}_norm.weight" for n in "qk"},
    **{f"layers.mlp.w_{n}": f"model.layers.{{}}.mlp.{f}_proj.weight" for n, f in _SIDES.items()},
    **{f"layers.mlp.b_{n}": f"model.layers.{{}}.mlp.{f}_proj.bias" for n, f in _SIDES.items()},
    "layers.attention_gain": "model.layers.{}.input_layernorm.weight",
    "layers.mlp_gain": "model.layers.{}.post_attention_layernorm.weight",
}
"""The name in the files of each param. ``{}`` stands for the number of the layer."""

_SIZES = {"num_hidden_layers", "num_attention_heads", "hidden_size", "intermediate_size", "vocab_size"}
_COMPUTES = {
    *_SIZES,
    *("model_type", "max_position_embeddings", "num_key_value_heads", "head_dim", "hidden_act", "rms_norm_eps"),
    *("rope_theta", "rope_scaling", "rope_parameters", "original_max_position_embeddings"),
    *("tie_word_embeddings", "pad_token_id"),
}
_OFF = {
    **dict.fromkeys(("attention_bias", "rope_interleaved", "use_bidirectional_attention"), (False, None)),
    "partial_rotary_factor": (1, None),
    "quantization_config": (None,),
}
"""Config keys that may only be there with one of these values."""
_HARMLESS = {
    *("architectures", "auto_map", "torch_dtype", "dtype", "transformers_version", "_name_or_path", "model_id"),
    *("_attn_implementation_autoset", "_attn_implementation", "attn_implementation", "unsloth_version"),
    *("use_cache", "return_dict", "output_attentions", "output_hidden_states", "torchscript", "use_bfloat16"),
    *("bos_token_id", "eos_token_id", "unk_token_id", "sep_token_id", "decoder_start_token_id", "id2label", "label2id"),
    *("initializer_range", "attention_dropout", "hidden_dropout", "pretraining_tp", "is_llama_config"),
    *("transformers.js_config", "task_specific_params", "problem_type", "max_window_layers", "unsloth_fixed"),
}
_KINDS = {
    **dict.fromkeys(("num_key_value_heads", "head_dim", "sliding_window", "pad_token_id"), int),
    **dict.fromkeys(("hidden_act", "hidden_activation"), str),
    **dict.fromkeys(("rope_theta", "rms_norm_eps"), (int, float)),
    **dict.fromkeys(("rope_scaling", "rope_parameters"), dict),
    **dict.fromkeys(("tie_word_embeddings", "use_sliding_window", "mlp_bias"), bool),
    **{"max_position_embeddings": int, "layer_types": list},
}
_BUFFER = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")
"""What older files have and nothing reads: the frequencies follow from the config."""


def read_gated(folder: str | Path) -> ReadModel:
    """Read the config and the params of a model of one of ``FAMILIES``.

    Args:
        folder: a folder with ``config.json`` and the weights: ``model.safetensors``, or shards with their index, or
            the same of torch.

    Returns:
        ``(config, params)``: keyword arguments of ``TransformerConfig``, and a nested dict of new arrays in the stored
        dtype. Layers in several dtypes, and the gains of Gemma, which are 1 + the stored weight, are float32. Take the
        arrays out of the dict as you convert them, and no more than one is in memory twice.

    Raises:
        FileNotFoundError: if a file does not exist.
        ValueError: for another ``model_type``, for config keys that are not known or have a value that cannot be
            computed, for weights that are missing, unexpected, of the wrong shape or not finite, and for damaged files.
    """
    folder = Path(folder)
    raw, path = read_config(folder), folder / "config.json"
    config = gated_config(path, raw)
    weights = Weights(weight_files(folder), r"model\.|lm_head\.")
    if config["n_layer"] > len(weights.shapes):
        raise ValueError(
            f"{path} has num_hidden_layers {config['n_layer']}, but the files hold {len(weights.shapes)} weights: "
            "check that config.json belongs to these weights"
        )
    ignored = [key for key in weights.shapes if _BUFFER.fullmatch(key)]
    head, embedding = NAMES["w_u"], NAMES["w_e"]
    weights.check(file_shapes(config, NAMES), [*ignored, *([head] if config["tied"] else [])])
    if config["tied"] and head in weights.shapes and not np.array_equal(weights.read(head), weights.read(embedding)):
        raise ValueError(
            f"{path} says that the embedding is tied, but the files hold another {head}: set tie_word_embeddings to "
            f"false to use it, or remove it from the files"
        )
    one_plus = FAMILIES[config["family"]].one_plus

    def dtype(name: str, key: str) -> str:
        return "float32" if one_plus and name.endswith("gain") else weights.dtype(key)

    def read(name: str, key: str, out: np.ndarray) -> None:
        out[...] = weights.read(key)
        if one_plus and name.endswith("gain"):
            out += 1

    return ReadModel(config, filled(config, NAMES, dtype, read))


def is_gated(raw: Mapping[str, Any]) -> bool:
    """Whether a ``config.json`` is one of transformers: it has a ``model_type`` and a width under the usual name."""
    return isinstance(raw.get("model_type"), str) and "hidden_size" in raw


def gated_config(path: Path, raw: Mapping[str, Any]) -> dict[str, Any]:
    """The keyword arguments of ``TransformerConfig`` from the ``config.json`` of a family. ``path`` is for errors."""
    model_type = raw.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise ValueError(f"{path} has model_type {model_type!r:.100}, which cannot be loaded. {_known()}")
    family = FAMILIES[model_type]
    given = {key: value for key, value in raw.items() if key not in _HARMLESS and value is not None}
    unknown = sorted(given.keys() - _COMPUTES - _OFF.keys() - family.keys)
    refused = {key: given[key] for key in _OFF if given.get(key) not in _OFF[key]}
    if unknown or refused:
        listed = ", ".join(
            f"{key} {value!r:.100}" for key, value in [*refused.items(), *((k, raw[k]) for k in unknown)]
        )
        raise ValueError(
            f"{path} has keys that may change what a {model_type} computes, and that are not understood: {listed}. If "
            f"they change nothing, remove them from the file. {_known()}"
        )
    if lacking := sorted(_SIZES - given.keys()):
        raise ValueError(f"{path} lacks {lacking}: add them")
    check_kinds(path, raw, _KINDS)
    sizes = {"max_position_embeddings", "num_key_value_heads", "head_dim"} & given.keys()
    check_sizes(path, given, sorted(_SIZES | sizes))
    if "max_position_embeddings" not in given:
        raise ValueError(f"{path} lacks max_position_embeddings: add it, the longest sequence in tokens")
    n_head, d_model, pad_id = given["num_attention_heads"], given["hidden_size"], given.get("pad_token_id", -1)
    epsilon = given.get("rms_norm_eps", 1e-6)
    _check_positive(path, {"rms_norm_eps": epsilon})
    theta, scaling = _rope(path, given)
    return {
        "n_layer": given["num_hidden_layers"],
        "n_head": n_head,
        "n_kv_head": given.get("num_key_value_heads", n_head),
        "d_head": given.get("head_dim", family.d_head or d_model // n_head),
        "d_model": d_model,
        "d_hidden": given["intermediate_size"],
        "n_ctx": _context(path, raw, family),
        "n_vocab": given["vocab_size"],
        "gate": _gate(path, given, family),
        "bias": given.get("mlp_bias", False),
        **common(model_type),
        "rms_eps": float(epsilon),
        "rope_theta": theta,
        "rope_scaling": scaling,
        "tied": given.get("tie_word_embeddings", family.tied),
        "embed_scale": math.sqrt(d_model) if family.scaled else 1.0,
        "pad_id": pad_id if pad_id >= 0 else None,
    }


def common(model_type: str) -> dict[str, Any]:
    """The keyword arguments of ``TransformerConfig`` that follow from the family alone."""
    family = FAMILIES[model_type]
    return {
        "bilinear": True,
        "attention_bias": family.qkv_bias,
        "qk_norm": family.qk_norm,
        "normalization": (True, True, True),
        "gains": True,
        "attn_scale": 1.0,
        "family": model_type,
    }


def _known() -> str:
    return f"Families that can be loaded: {', '.join(FAMILIES)}"


def _gate(path: Path, raw: Mapping[str, Any], family: Family) -> str:
    act = raw.get("hidden_activation") or raw.get("hidden_act", family.act)
    act = family.acts.get(act, act)
    if act not in GATES:
        raise ValueError(
            f"{path} has hidden_act {act!r:.100}, but a gate must be one of {', '.join(GATES)}. {_known()}"
        )
    return GATES[act]


def _context(path: Path, raw: Mapping[str, Any], family: Family) -> int:
    """The longest row. A row that fits a sliding window is computed exactly, whichever layers have one."""
    on = raw.get("use_sliding_window") if family.window_switch else True
    window = raw.get("sliding_window", family.window) if on else None  # null: no window
    kinds = {"full_attention", "sliding_attention"} if window else {"full_attention"}
    if other := sorted({str(kind) for kind in raw.get("layer_types") or []} - kinds):
        raise ValueError(
            f"{path} has layer_types {other!r:.200}, but may have {' and '.join(sorted(kinds))}. {_known()}"
        )
    check_sizes(path, {"sliding_window": 1 if window is None else window}, ["sliding_window"])
    longest = raw["max_position_embeddings"]
    return longest if window is None else min(window, longest)


def _check_positive(path: Path, values: Mapping[str, Any]) -> None:
    largest = float(np.finfo(np.float32).max)
    wrong = {key: value for key, value in values.items() if type(value) not in (int, float) or not 0 < value <= largest}
    if wrong:
        raise ValueError(f"{path}: {wrong!r:.200} must be numbers above 0 that float32 holds")


_LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


def _rope(path: Path, raw: Mapping[str, Any]) -> tuple[float, tuple[float, float, float, float] | None]:
    """The base of the rotary frequencies, and their scaling, in either spelling: ``rope_parameters`` is the newer."""
    old = {key: value for key, value in (raw.get("rope_scaling") or {}).items() if value is not None}
    new = {key: value for key, value in (raw.get("rope_parameters") or {}).items() if value is not None}
    theta = {key: value for key in ("rope_theta",) if (value := raw.get(key)) is not None}
    for one in (old, new):
        if "type" in one:  # the name before rope_type
            one.setdefault("rope_type", one.pop("type"))
    both = {**old, **theta, **new}
    clash = [key for one in (old, theta) for key in one if key in new and one[key] != new[key]]
    if clash:
        raise ValueError(f"{path}: rope_parameters and the older keys contradict each other in {clash}: keep one")
    kind = both.pop("rope_type", "default")
    base = both.pop("rope_theta", 10_000.0)
    scaled = kind == "llama3"
    if scaled:
        both.setdefault(_LLAMA3[-1], raw.get(_LLAMA3[-1], raw["max_position_embeddings"]))
    if both.get("partial_rotary_factor") == 1:
        del both["partial_rotary_factor"]
    unknown, lacking = sorted(both.keys() - set(_LLAMA3 if scaled else ())), sorted(set(_LLAMA3 * scaled) - both.keys())
    if kind not in ("default", "llama3") or unknown or lacking:
        raise ValueError(
            f"{path} has rotary positions of type {kind!r:.100} with {dict(both)!r:.200}, but must have type 'default' "
            f"without more, or 'llama3' with {', '.join(_LLAMA3)}. {_known()}"
        )
    _check_positive(path, {"rope_theta": base, **both})
    if not scaled:
        return float(base), None
    factor, low, high, longest = (float(both[key]) for key in _LLAMA3)
    if low >= high:
        raise ValueError(f"{path}: low_freq_factor ({low}) must be below high_freq_factor ({high})")
    return float(base), (factor, low, high, longest)


# The params of a gated model, from any file that holds them


def gated_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """The params of a gated model and their shapes. Those under "layers." have another axis, n_layer, before these."""
    d, h, d_head, n_vocab = (config[key] for key in ("d_model", "d_hidden", "d_head", "n_vocab"))
    q, k = config["n_head"] * d_head, config["n_kv_head"] * d_head
    shapes: dict[str, tuple[int, ...]] = {"w_e": (n_vocab, d)}
    if not config["tied"]:
        shapes["w_u"] = (n_vocab, d)
    shapes |= {"layers.mlp.w_l": (h, d), "layers.mlp.w_r": (h, d), "layers.mlp.w_p": (d, h)}
    shapes |= {
        f"layers.attention.w_{name}": shape
        for name, shape in {"q": (q, d), "k": (k, d), "v": (k, d), "o": (d, q)}.items()
    }
    shapes |= {"layers.attention_gain": (d,), "layers.mlp_gain": (d,), "final_gain": (d,)}
    if config["attention_bias"]:
        shapes |= {"layers.attention.b_q": (q,), "layers.attention.b_k": (k,), "layers.attention.b_v": (k,)}
    if config["qk_norm"]:
        shapes |= {"layers.attention.q_gain": (d_head,), "layers.attention.k_gain": (d_head,)}
    if config["bias"]:
        shapes |= {"layers.mlp.b_l": (h,), "layers.mlp.b_r": (h,), "layers.mlp.b_p": (d,)}
    return shapes


def file_shapes(config: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, tuple[int, ...]]:
    """The weights in the files of a model and their shapes. ``names``: as ``NAMES``."""
    return {key: shape for name, shape in gated_shapes(config).items() for key in _keys(names[name], config["n_layer"])}


def filled(
    config: Mapping[str, Any],
    names: Mapping[str, str],
    dtype: Callable[[str, str], str],
    read: Callable[[str, str, np.ndarray], None],
) -> dict[str, Any]:
    """The params of a gated model as a nested dict of new arrays, read one weight at a time.

    Args:
        config: the keyword arguments of ``TransformerConfig``.
        names: the name in the files of each param, as ``NAMES``.
        dtype: the dtype to keep a weight in, from the names of the param and of the weight.
        read: writes a weight, by the same two names, into the array for it.
    """
    params: dict[str, Any] = {}
    for name, shape in gated_shapes(config).items():  # the largest first: while it is read it is there twice
        keys, stacked = _keys(names[name], config["n_layer"]), "{}" in names[name]
        dtypes = {dtype(name, key) for key in keys}
        array = aligned((len(keys), *shape), dtypes.pop() if len(dtypes) == 1 else "float32")
        for key, part in zip(keys, array, strict=True):
            read(name, key, part)
        *above, last = name.split(".")
        place = params
        for part in above:
            place = place.setdefault(part, {})
        place[last] = array if stacked else array[0]
    return params


def _keys(name: str, n_layer: int) -> list[str]:
    return [name.format(layer) for layer in range(n_layer)] if "{}" in name else [name]
