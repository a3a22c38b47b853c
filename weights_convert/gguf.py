"""Read a GGUF file, the format of llama.cpp, as a config and params: Llama, Mistral, Qwen 2, Qwen 3 and Gemma.

The architecture "llama" is both Llama and Mistral. In its files the rows of each head of w_q and w_k are in another
order, which is undone: there, the rotary positions pair neighbours, (2 i, 2 i + 1); here i with i + d_head / 2. The
norms of Gemma already hold 1 + the weight. A file without ``output.weight`` has a tied embedding.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from weights_convert.families import FAMILIES, GATES, common, file_shapes, filled
from weights_convert.files import check_kinds, check_sizes
from weights_convert.gguf_file import GGUFFile
from weights_convert.weights import ReadModel, differences

ARCHITECTURES = tuple(name for name in FAMILIES if name != "mistral")
"""The values of general.architecture that can be read."""

NAMES = {
    "w_e": "token_embd.weight",
    "w_u": "output.weight",
    "final_gain": "output_norm.weight",
    **{f"layers.attention.w_{n}": f"blk.{{}}.attn_{n}.weight" for n in "qkv"},
    **{f"layers.attention.b_{n}": f"blk.{{}}.attn_{n}.bias" for n in "qkv"},
    **{f"layers.attention.{n}_gain": f"blk.{{}}.attn_{n}_norm.weight" for n in "qk"},
    "layers.attention.w_o": "blk.{}.attn_output.weight",
    "layers.mlp.w_l": "blk.{}.ffn_gate.weight",
    "layers.mlp.w_r": "blk.{}.ffn_up.weight",
    "layers.mlp.w_p": "blk.{}.ffn_down.weight",
    "layers.attention_gain": "blk.{}.attn_norm.weight",
    "layers.mlp_gain": "blk.{}.ffn_norm.weight",
}
"""The name in the file of each param, as ``families.NAMES``."""

_ROPE_FACTORS = "rope_freqs.weight"
_PERMUTED = ("layers.attention.w_q", "layers.attention.w_k")

_SIZES = {
    "block_count": "n_layer",
    "attention.head_count": "n_head",
    "embedding_length": "d_model",
    "feed_forward_length": "d_hidden",
    "context_length": "n_ctx",
}
_COMPUTES = {
    *_SIZES,
    *("attention.head_count_kv", "attention.key_length", "attention.layer_norm_rms_epsilon", "rope.freq_base"),
    *("attention.sliding_window", "vocab_size"),
}
_ONLY = {"rope.scaling.type": "none", "attention.causal": True, "expert_count": 0, "expert_used_count": 0}
"""Metadata that may only have one value."""
_HARMLESS = {"tensor_data_layout", "attention.value_length", "rope.dimension_count", "rope.scaling.finetuned"}
"""Metadata that changes nothing, or whose value is checked against the others."""


def read_gguf(path: str | Path) -> ReadModel:
    """Read the config and the params of a model in a GGUF file. Needs the package gguf.

    Args:
        path: the file.

    Returns:
        ``(config, params)``, as ``read_gated``. Quantised tensors become float32, the others keep their dtype.

    Raises:
        FileNotFoundError: if the file does not exist.
        ImportError: if the package gguf is not installed.
        ValueError: if the file is damaged, has another architecture, metadata that change what the model computes and
            are not known, or tensors that are missing, unexpected, of another shape or not finite.
    """
    file = GGUFFile(Path(path))
    config = _config(file)
    expected = file_shapes(config, NAMES)
    missing, extra, wrong = differences(
        {name: tensor.shape for name, tensor in file.tensors.items()}, expected, [_ROPE_FACTORS]
    )
    if missing or extra or wrong:
        raise ValueError(
            f"the tensors in {path} are not those of the {config['family']} that its header describes. Missing: "
            f"{_some(missing)}; not understood: {_some(extra)}; shapes: {_some(wrong, 'as expected')}. Download it "
            "again, or name another file"
        )
    heads = {"layers.attention.w_q": config["n_head"], "layers.attention.w_k": config["n_kv_head"]}

    def read(name: str, key: str, out: np.ndarray) -> None:
        if config["family"] != "llama" or name not in _PERMUTED:
            file.read(key, out)
            return
        stored = np.empty_like(out)
        file.read(key, stored)
        pairs = (heads[name], config["d_head"] // 2, 2, -1)
        out.reshape(pairs[0], 2, pairs[1], -1)[...] = stored.reshape(pairs).swapaxes(1, 2)

    return ReadModel(config, filled(config, NAMES, lambda name, key: file.dtype(key), read))


def _some(names: list[str], none: str = "nothing", most: int = 12) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return (", ".join(names[:most]) or none) + more


def _config(file: GGUFFile) -> dict[str, Any]:
    path, metadata = file.path, file.metadata
    known = f"Architectures that can be loaded: {', '.join(ARCHITECTURES)} (llama is also Mistral)"
    architecture = metadata.get("general.architecture")
    if architecture not in ARCHITECTURES:
        raise ValueError(f"{path} has the architecture {architecture!r:.100}, which cannot be loaded. {known}")
    if metadata.get("split.count", 1) not in (0, 1):
        raise ValueError(f"{path} is one of {metadata['split.count']!r:.20} parts of a model: merge them to one file")
    begin = f"{architecture}."
    raw = {key.removeprefix(begin): value for key, value in metadata.items() if key.startswith(begin)}
    unknown = {key: raw[key] for key in sorted(raw.keys() - _COMPUTES - _ONLY.keys() - _HARMLESS)}
    refused = {key: raw[key] for key, allowed in _ONLY.items() if raw.get(key, allowed) != allowed}
    if found := unknown | refused:
        listed = ", ".join(f"{begin}{key} {value!r:.100}" for key, value in found.items())
        raise ValueError(f"{path} has metadata that change what the model computes, and are not understood: {listed}")
    embedding = file.tensors.get(NAMES["w_e"])
    if lacking := [*sorted(begin + key for key in _SIZES.keys() - raw.keys()), *([] if embedding else [NAMES["w_e"]])]:
        raise ValueError(f"{path} lacks {', '.join(lacking)}: download it again, or name another file")
    raw.setdefault("attention.head_count_kv", raw["attention.head_count"])
    check_sizes(path, raw, [*_SIZES, "attention.head_count_kv"])
    if raw["block_count"] > len(file.tensors):
        raise ValueError(f"{path} has {begin}block_count {raw['block_count']}, but only {len(file.tensors)} tensors")
    family, d_model, n_head = FAMILIES[architecture], raw["embedding_length"], raw["attention.head_count"]
    d_head = raw.get("attention.key_length", d_model // n_head)
    n_vocab = embedding.shape[0] if embedding else 0
    optional = {"attention.sliding_window": raw["context_length"], "attention.key_length": d_head}
    optional |= {"attention.value_length": d_head, "rope.dimension_count": d_head, "vocab_size": n_vocab}
    optional = {key: raw.get(key, usual) for key, usual in optional.items()}
    check_sizes(path, optional, optional)
    same = {"attention.value_length": d_head, "rope.dimension_count": d_head, "vocab_size": n_vocab}
    if other := {begin + key: optional[key] for key in same if optional[key] != same[key]}:
        raise ValueError(f"{path} has {other!r:.200}, but its other sizes give {list(same.values())}")
    theta = _number(path, raw, "rope.freq_base", 10_000.0)
    pad_id = metadata.get("tokenizer.ggml.padding_token_id")
    return {
        **{name: raw[key] for key, name in _SIZES.items()},
        "n_ctx": min(raw["context_length"], optional["attention.sliding_window"]),
        "n_kv_head": raw["attention.head_count_kv"],
        "d_head": d_head,
        "n_vocab": n_vocab,
        "gate": GATES[family.act],
        "bias": False,
        **common(architecture),
        "rms_eps": _number(path, raw, "attention.layer_norm_rms_epsilon", 1e-6),
        "rope_theta": theta,
        "rope_scaling": _scaling(file, d_head, theta),
        "tied": NAMES["w_u"] not in file.tensors,
        "embed_scale": math.sqrt(d_model) if family.scaled else 1.0,
        "pad_id": pad_id if isinstance(pad_id, int) and 0 <= pad_id < n_vocab else None,
    }


def _number(path: Path, raw: Mapping[str, Any], key: str, usual: float) -> float:
    """A number above 0: the shortest decimal that is this number in float32, as which it is stored."""
    check_kinds(path, raw, {key: (float, int)})
    with np.errstate(over="ignore"):
        value = float(str(np.float32(raw.get(key, usual))))
    if not 0 < value < math.inf:
        raise ValueError(f"{path}: {key} is {value}, but must be above 0, and a number in float32")
    return value


def _scaling(file: GGUFFile, d_head: int, theta: float) -> tuple[float, float, float, float] | None:
    """The rope scaling of Llama 3 from ``rope_freqs.weight [d_head / 2]``, the factors that divide the frequencies.

    The file holds the factors only. They are compared with those of every original context that is a power of two,
    with low_freq_factor 1 and high_freq_factor 4: multiplying all three by one number changes nothing.
    """
    if _ROPE_FACTORS not in file.tensors:
        return None
    half = d_head // 2
    if (shape := file.tensors[_ROPE_FACTORS].shape) != (half,):
        raise ValueError(f"{_ROPE_FACTORS} in {file.path} has the shape {list(shape)}, expected {[half]}")
    stored = np.empty(half, np.float32)
    file.read(_ROPE_FACTORS, stored)
    if (stored == 1).all():
        return None
    factor = float(stored.max())
    for power in range(4, 24):
        found = (factor, 1.0, 4.0, float(2**power))
        if np.allclose(stored, rope_factors(d_head, theta, found), rtol=1e-4, atol=0):
            return found
    raise ValueError(
        f"{_ROPE_FACTORS} in {file.path} is not the rope scaling of Llama 3 (low_freq_factor 1, high_freq_factor 4, an "
        "original context that is a power of two): other scalings cannot be loaded"
    )


def rope_factors(d_head: int, theta: float, scaling: tuple[float, float, float, float]) -> np.ndarray:
    """What the rope scaling "llama3" divides the frequencies ``f_i = theta^(-2 i / d_head)`` by, in float64.

    With ``factor, low, high, context = scaling`` and the turns ``t = context f / (2 pi)`` that a frequency makes in the
    original context: 1 where t > high, ``factor`` where t < low, and between them ``1 / ((1 - s) / factor + s)`` with
    ``s = (t - low) / (high - low)``.

    Example:
        >>> rope_factors(4, 10_000.0, (8.0, 1.0, 4.0, 8192.0)).tolist()
        [1.0, 1.0]
        >>> rope_factors(4, 10_000.0, (8.0, 1.0, 4.0, 64.0)).tolist()
        [1.0, 8.0]
    """
    factor, low, high, context = scaling
    turns = context * theta ** -(np.arange(d_head // 2) / (d_head / 2)) / (2 * math.pi)
    between = np.clip((turns - low) / (high - low), 0, 1)
    return 1 / ((1 - between) / factor + between)
