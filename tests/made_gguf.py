"""Small GGUF files for tests, written by the package gguf from the params of a model, as llama.cpp's converter does."""

from pathlib import Path

import gguf
import jax
import numpy as np

from weights_convert.families import filled
from weights_convert.gguf import NAMES, rope_factors

F32 = gguf.GGMLQuantizationType.F32

CONFIG = {
    **{"n_layer": 2, "n_head": 4, "n_kv_head": 2, "d_head": 64, "d_model": 256, "d_hidden": 256, "n_ctx": 32},
    **{"n_vocab": 40, "gate": "silu", "bias": False, "attention_bias": False, "qk_norm": False, "tied": True},
    **{"rope_scaling": None, "rope_theta": 10_000.0, "rms_eps": 1e-5, "family": "llama"},
}
"""A tiny Llama whose rows are as long as the longest block of all quantisations, 256."""


def random_params(config: dict, seed: int = 0) -> dict:
    rng = np.random.default_rng(seed)

    def fill(name, key, out):
        out[...] = rng.normal(size=out.shape)

    return filled(config, NAMES, lambda name, key: "float32", fill)


def leaves(params) -> dict[str, np.ndarray]:
    found = jax.tree_util.tree_leaves_with_path(params)
    return {jax.tree_util.keystr(key, simple=True, separator="."): leaf for key, leaf in found}


def interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows in the order of the architecture llama: row ``2 i + j`` of a head is its row ``i + j d_head / 2``."""
    rows = weight.reshape(heads, -1, weight.shape[-1])
    half = rows.shape[1] // 2
    out = np.empty_like(rows)
    for i in range(half):
        out[:, 2 * i], out[:, 2 * i + 1] = rows[:, i], rows[:, half + i]
    return out.reshape(weight.shape)


def tensors_of(config: dict, params: dict, architecture: str, turn=interleaved) -> dict[str, np.ndarray]:
    """The tensors by their names in the file."""
    attention, mlp = params["layers"]["attention"], params["layers"]["mlp"]
    found = {"token_embd.weight": params["w_e"], "output_norm.weight": params["final_gain"]}
    if "w_u" in params:
        found["output.weight"] = params["w_u"]
    for i in range(config["n_layer"]):
        q, k = attention["w_q"][i], attention["w_k"][i]
        if architecture == "llama":
            q, k = turn(q, config["n_head"]), turn(k, config["n_kv_head"])
        layer = {
            **{"attn_q.weight": q, "attn_k.weight": k, "attn_v.weight": attention["w_v"][i]},
            **{"attn_output.weight": attention["w_o"][i], "ffn_gate.weight": mlp["w_l"][i]},
            **{"ffn_up.weight": mlp["w_r"][i], "ffn_down.weight": mlp["w_p"][i]},
            **{"attn_norm.weight": params["layers"]["attention_gain"][i]},
            **{"ffn_norm.weight": params["layers"]["mlp_gain"][i]},
            **{f"attn_{n}.bias": attention[f"b_{n}"][i] for n in "qkv" if f"b_{n}" in attention},
            **{f"attn_{n}_norm.weight": attention[f"{n}_gain"][i] for n in "qk" if f"{n}_gain" in attention},
        }
        found |= {f"blk.{i}.{name}": value for name, value in layer.items()}
    if config["rope_scaling"]:
        factors = rope_factors(config["d_head"], config["rope_theta"], config["rope_scaling"])
        found["rope_freqs.weight"] = factors.astype(np.float32)
    return found


def write(
    path: Path,
    config: dict,
    params: dict,
    *,
    kind=F32,
    metadata=None,
    turn=interleaved,
    change=None,
    packed=None,
    alignment=None,
) -> Path:
    """Write a model.

    Args:
        kind: how matrices are stored. Vectors are always F32.
        metadata: more keys, or others; ``...`` leaves a key out.
        turn: the order of rows of q and k in the architecture llama.
        change: is given the dict of tensors, to break it.
        alignment: of the tensors in the file. None: the usual.
        packed: a function of a matrix that gives its bytes. None: as the package quantises it.
    """
    architecture = "llama" if config["family"] == "mistral" else config["family"]
    keys = {
        "block_count": config["n_layer"],
        "context_length": config["n_ctx"],
        "embedding_length": config["d_model"],
        "feed_forward_length": config["d_hidden"],
        "attention.head_count": config["n_head"],
        "attention.head_count_kv": config["n_kv_head"],
        "attention.key_length": config["d_head"],
        "attention.value_length": config["d_head"],
        "attention.layer_norm_rms_epsilon": config["rms_eps"],
        "rope.freq_base": config["rope_theta"],
        "rope.dimension_count": config["d_head"],
        "vocab_size": config["n_vocab"],
    }
    values = {f"{architecture}.{key}": value for key, value in keys.items()} | (metadata or {})
    writer = gguf.GGUFWriter(path, architecture)
    if alignment is not None:
        writer.add_custom_alignment(alignment)
    for key, value in values.items():
        add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
        if value is not ...:
            add.get(type(value), writer.add_array)(key, value)
    tensors = tensors_of(config, params, architecture, turn)
    if change is not None:
        change(tensors)
    for name, value in tensors.items():
        stored = kind if value.ndim == 2 else F32
        data = value.astype(np.float32)
        data = packed(data) if packed and stored != F32 else gguf.quants.quantize(data, stored)
        writer.add_tensor(name, data, raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
