"""Dictionaries for tests: random ones of every kind, and the formula that they follow."""

from typing import Any

import numpy as np

D, F, K = 8, 20, 3
PLACE = {"site": "resid_post", "layer": 2}


def codes_of(config: dict[str, Any], params: dict[str, np.ndarray], x: np.ndarray) -> np.ndarray:
    """The codes ``[..., F]`` of inputs, in float64."""
    p = {key: np.asarray(value, np.float64) for key, value in params.items()}
    z = (x - config["centred"] * p["b_dec"]) @ p["w_enc"].T + p.get("b_enc", 0)
    match config["activation"]:
        case "topk" | "topk_relu":
            chosen = np.argsort(-z, axis=-1)[..., : config["k"]]
            kept = np.zeros(z.shape, bool)
            np.put_along_axis(kept, chosen, True, axis=-1)
            return np.where(kept & ((z > 0) | (config["activation"] == "topk")), z, 0)
        case "relu":
            return np.maximum(z, 0)
        case "jumprelu" | "batchtopk":
            return np.where((z > p["threshold"]) & (z > 0), z, 0)
    raise AssertionError(config["activation"])


def decoded(params: dict[str, np.ndarray], codes: np.ndarray) -> np.ndarray:
    """What the decoder makes of codes, without the skip."""
    return codes @ params["w_dec"].T.astype(np.float64) + params["b_dec"].astype(np.float64)


def reconstructed(config: dict[str, Any], params: dict[str, np.ndarray], x: np.ndarray) -> np.ndarray:
    """The reconstruction of inputs, with the skip."""
    skip = x @ params["w_skip"].T.astype(np.float64) if config["skip"] else 0
    return decoded(params, codes_of(config, params, x)) + skip


def made(seed: int = 0, dtype: Any = np.float32, **options: Any) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The config and the params of a random dictionary, 8 inputs and 20 features."""
    config = {
        **{"d_model": D, "expansion": F / D, "k": None, "encoder_bias": True, "activation": "relu", "target": None},
        **{"skip": False, "centred": True, "tag": None},
        **PLACE,
        **options,
    }
    config["k"] = K if config["activation"] in ("topk", "topk_relu", "batchtopk") else config["k"]
    shapes: dict[str, tuple[int, ...]] = {"w_enc": (F, D), "w_dec": (D, F), "b_dec": (D,)}
    shapes |= {"b_enc": (F,)} if config["encoder_bias"] else {}
    shapes |= {"w_skip": (D, D)} if config["skip"] else {}
    shapes |= {"threshold": ()} if config["activation"] == "batchtopk" else {}
    shapes |= {"threshold": (F,)} if config["activation"] == "jumprelu" else {}
    rng = np.random.default_rng(seed)
    return config, {key: np.asarray(rng.normal(size=shape) / 2).astype(dtype) for key, shape in shapes.items()}


TRANSCODER = {"site": "mlp_in", "target": "mlp_out", "centred": False}
WRITABLE = [
    ("saelens", {}),
    ("saelens", {"centred": False, "tag": "a"}),
    ("saelens", {"activation": "topk_relu"}),
    ("saelens", {"activation": "jumprelu", "site": "mlp_in"}),
    ("saelens", {"activation": "batchtopk", "centred": False}),
    ("saelens", TRANSCODER),
    ("saelens", TRANSCODER | {"skip": True}),
    ("saelens", TRANSCODER | {"activation": "jumprelu"}),
    ("saelens", TRANSCODER | {"activation": "jumprelu", "skip": True}),
    ("saelens", {"centred": False, "skip": True}),
    ("gemma-scope", {"activation": "jumprelu", "centred": False}),
    ("sparsify", {"activation": "topk_relu", "tag": "b"}),
    ("sparsify", {"activation": "topk_relu", "centred": False}),
    ("sparsify", {"activation": "topk_relu", "skip": True, "site": "resid_mid"}),
    ("sparsify", TRANSCODER | {"activation": "topk_relu"}),
    ("sparsify", TRANSCODER | {"activation": "topk_relu", "skip": True}),
    ("dictionary_learning", {}),
    ("dictionary_learning", {"centred": False, "tag": "c"}),
    ("dictionary_learning", {"activation": "topk_relu", "site": "attn_out"}),
    ("dictionary_learning", {"activation": "batchtopk", "site": "mlp_in"}),
    ("dictionary_learning", {"activation": "jumprelu", "centred": False}),
]
"""Every format with the options of a dictionary that it can say."""
