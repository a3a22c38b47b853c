"""The way back: a config and params as a published folder, which the original's code reads.

The inverse of ``transformer.py`` and ``sae.py``, bit for bit: what is written here and read there is the same config
and the same params.
"""

import json
import math
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from weights_convert.names import SAEName, parse_sae_name
from weights_convert.transformer import PAD_IDS, rotary_frequencies


def write_transformer(
    folder: str | Path, config: Mapping[str, Any], params: Mapping[str, Any], *, repo: str | None = None
) -> None:
    """Writes ``config.json`` and ``model.safetensors`` of a model into an existing folder.

    Args:
        config: the keyword arguments of ``TransformerConfig``, as ``read_transformer`` gives them.
        params: nested dicts of arrays, as ``read_transformer`` gives them; written in the dtype that they have.
        repo: the name under which the files will be published, if it is known.

    Warns:
        UserWarning: for what the original's present code would read otherwise: an attention scale of 1, which it
            ignores, and a tokenizer that it doesn't know.

    Raises:
        ValueError: for what the layout can't say: another attention scale than 1 and ``1 / sqrt(2 n_layer)``, biases of
            the attention without biases of the MLP.

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
    from safetensors.numpy import save_file

    raw = _transformer_config(config, params, repo)
    state = _state(config, params)
    save_file(state, Path(folder) / "model.safetensors", metadata={"format": "pt"})
    _write_config(Path(folder), raw)


def write_sae(folder: str | Path, config: Mapping[str, Any], params: Mapping[str, Any]) -> None:
    """Writes ``config.json`` and ``model.safetensors`` of an SAE into an existing folder.

    Args:
        config: the keyword arguments of ``SAEConfig``, as ``read_sae`` gives them.
        params: arrays, as ``read_sae`` gives them.

    Raises:
        ValueError: for ``apply_normalize``, which the layout can't say, and a folder that doesn't bear the SAE's name.
    """
    from safetensors.numpy import save_file

    folder = Path(folder)
    if config.get("apply_normalize"):
        raise ValueError(
            "the published layout has no apply_normalize: divide w_enc by normalize, multiply "
            "w_dec and b_dec by it, and leave it out, which computes the same"
        )
    raw = {
        **{"point": [config["site"].replace("_", "-"), config["layer"]], "target": None},
        **{key: config[key] for key in ("d_model", "expansion", "k")},
        **{key: config.get(key, default) for key, default in _SAE_DEFAULTS.items()},
        "token_lookup": False,
    }
    if config.get("passthrough"):
        raw["passthrough"] = list(config["passthrough"])
    name = SAEName(config["layer"], config["site"], config["expansion"], config["k"], config.get("tag"))
    if parse_sae_name(folder.resolve().name) != name:
        raise ValueError(f"an SAE's folder bears its name, by which it is found; {folder} is no name of {name}")
    keys = {"w_enc": "w_enc.weight", "w_dec": "w_dec.weight", "b_dec": "b_dec", "b_enc": "w_enc.bias"}
    state = {keys[name]: np.ascontiguousarray(value) for name, value in params.items()}
    save_file(state, folder / "model.safetensors")
    _write_config(folder, raw)


_SAE_DEFAULTS = {"bilinear_encoder": False, "encoder_bias": False, "normalize": None, "tag": None}


def _write_config(folder: Path, raw: Mapping[str, Any]) -> None:
    (folder / "config.json").write_text(json.dumps(raw, indent=2) + "\n", encoding="utf-8")


def _transformer_config(config: Mapping[str, Any], params: Mapping[str, Any], repo: str | None) -> dict[str, Any]:
    if config.get("attention_bias") and not config.get("bias"):
        raise ValueError(
            "the published layout has no biases of the attention alone: give the MLP biases of 0, and bias=True"
        )
    tokenizer, norms = config.get("tokenizer"), config.get("normalization", True)
    norms = [norms] * 3 if isinstance(norms, bool) else list(norms)
    if tokenizer not in (None, *PAD_IDS):
        warnings.warn(
            f"the original's code knows the tokenizers {', '.join(PAD_IDS)}, and not {tokenizer}: its users have to "
            "load it themselves",
            stacklevel=3,
        )
    return {
        "architectures": ["Transformer"],
        **{key: config[key] for key in ("n_head", "n_layer", "n_ctx", "d_model", "d_hidden", "n_vocab")},
        "bilinear": config.get("bilinear", True),
        "gate": config.get("gate"),
        "bias": config.get("bias", False),
        "normalization": norms[0] if len(set(norms)) == 1 else norms,
        "scale_attn": _scaled(config),
        "tokenizer": tokenizer,
        "repo": repo,
        "torch_dtype": params["w_e"].dtype.name,
        **{key: value for key in ("dataset",) if (value := config.get(key)) is not None},
        **({} if config.get("pad_id") is None else {"pad_token_id": config["pad_id"]}),
    }


def _scaled(config: Mapping[str, Any]) -> bool:
    """What ``scale_attn`` says of the factor on the attention's output."""
    factor, scaled = config.get("attn_scale"), 1 / math.sqrt(2 * config["n_layer"])
    if factor is None or math.isclose(factor, scaled, rel_tol=1e-6):
        return True
    if factor == 1:
        warnings.warn(
            f"this model's attention has scale 1, which scale_attn false says; the original's present code ignores "
            f"that and scales by {scaled:.6g}. For it, multiply w_o by {1 / scaled:.6g} and set attn_scale to None",
            stacklevel=4,
        )
        return False
    raise ValueError(
        f"the published layout has the attention scales 1 and {scaled:.6g} alone, this model's is {factor:.6g}: "
        f"multiply w_o by {factor / scaled:.6g} and set attn_scale to None, which computes the same"
    )


def _state(config: Mapping[str, Any], params: Mapping[str, Any]) -> dict[str, np.ndarray]:
    state = {"transformer.wte.weight": params["w_e"], "lm_head.weight": params["w_u"]}
    attention, mlp = params["layers"]["attention"], params["layers"]["mlp"]
    rotary = rotary_frequencies(config["d_model"] // config["n_head"]).astype(np.float32)
    joined = {"attn.qkv": (attention, "qkv"), "attn.o": (attention, "o"), "mlp.w": (mlp, "lr"), "mlp.p": (mlp, "p")}
    for i in range(config["n_layer"]):
        for key, (part, letters) in joined.items():
            for kind, mark in (("weight", "w"), ("bias", "b")):
                rows = [part[f"{mark}_{letter}"][i] for letter in letters if f"{mark}_{letter}" in part]
                if rows:
                    state[f"transformer.h.{i}.{key}.{kind}"] = np.concatenate(rows)
        state[f"transformer.h.{i}.attn.rotary.inv_freq"] = rotary.copy()
    return {key: np.ascontiguousarray(value) for key, value in state.items()}
