"""EleutherAI's sparsify: ``cfg.json`` and ``sae.safetensors``, in a folder with the name of a module.

    z     = relu(W_e (x - b_dec) + b_e)           a transcoder reads x
    codes = the k largest of z
    x_hat = W_dec^T codes + b_dec                 and + W_skip x with a skip

A transcoder reads the input of its module and reconstructs the module's output; an SAE has the output.

Source: eai-sparsify 1.3.3 (``sparse_coder.py``, ``fused_encoder.py``, ``trainer.py``).
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from weights_convert.dictionaries import checks, hooks
from weights_convert.export import save_tensors
from weights_convert.files import check_keys, check_kinds, check_sizes, inside, read_config
from weights_convert.weights import ReadModel, Weights

CONFIG, WEIGHTS = FILES = ("cfg.json", "sae.safetensors")

_NAMES = {"w_enc": "encoder.weight", "b_enc": "encoder.bias", "w_dec": "W_dec", "b_dec": "b_dec", "w_skip": "W_skip"}
_FLIPPED = ("w_dec",)
_MEANT = {"d_in", "k", "num_latents", "expansion_factor", "activation", "transcode", "skip_connection", "signed"}
_TRAINING = {"normalize_decoder", "multi_topk"}
_OURS = {"hook_name", "hook_name_out", "tag"}
"""Keys that this library adds. sparsify drops keys that it does not know."""


def describe(folder: Path, site: str | None, layer: int | None, target: str | None) -> dict[str, Any]:
    """The config of one dictionary, without its weights. See ``describe_dictionary``."""
    path = folder / CONFIG
    raw = read_config(folder, CONFIG)
    check_keys(path, raw, _MEANT | _TRAINING | _OURS, ("d_in", "k"))
    flags = ("transcode", "skip_connection", "signed")
    check_kinds(path, raw, dict.fromkeys(flags, bool) | dict.fromkeys(("activation", *_OURS), str))
    if raw.get("activation", "topk") != "topk":
        raise ValueError(f"{path}: activation is {raw['activation']!r:.100}, but only 'topk' can be read")
    if raw.get("signed"):
        raise ValueError(f"{path} has signed: codes that are largest by absolute value cannot be read")
    features = _features(path, raw)
    transcoder = bool(raw.get("transcode"))
    inner, outer = _ends(folder, raw, transcoder)
    place = hooks.placed(path if raw.get("hook_name") else folder, *inner, site, layer)
    aim = hooks.aimed(path, *outer, place, target) if transcoder else hooks.own(path, place, target)
    return {
        "site": place[0],
        "layer": place[1],
        "d_model": raw["d_in"],
        "expansion": checks.expansion(path, features, raw["d_in"]),
        "k": checks.check_k(path, raw["k"], features),
        "encoder_bias": True,
        "activation": "topk_relu",
        "target": aim,
        "skip": bool(raw.get("skip_connection")),
        "centred": not transcoder,
        "tag": raw.get("tag") or None,
    }


def read(folder: Path, site: str | None, layer: int | None, target: str | None) -> ReadModel:
    """Read one dictionary. See ``read_dictionary``."""
    config = describe(folder, site, layer, target)
    weights = Weights([inside(folder, WEIGHTS)], "encoder", config=CONFIG)
    return ReadModel(config, checks.read_params(weights, config, _NAMES, _FLIPPED))


def write(folder: Path, config: Mapping[str, Any], params: Mapping[str, Any]) -> None:
    """Write one dictionary. See ``write_dictionary``."""
    config, params, transcoder = checks.checked("sparsify", config, params, ("topk_relu",), one_dtype=True)
    transcoder = transcoder or not config["centred"]
    place = config["site"], config["layer"]
    raw: dict[str, Any] = {
        **{"activation": "topk", "expansion_factor": round(config["expansion"]), "normalize_decoder": False},
        **{"num_latents": checks.features_of(config), "k": config["k"], "multi_topk": False},
        **{"skip_connection": config["skip"], "transcode": transcoder, "d_in": config["d_model"]},
        "hook_name": hooks.hook_name(*place),
    }
    if transcoder:
        raw["hook_name_out"] = hooks.hook_name(config["target"] or config["site"], config["layer"])
    if config["tag"]:
        raw["tag"] = config["tag"]
    ends = hooks.ends_of(folder.resolve().name)
    if ends and (ends[0 if transcoder else 1], ends[2]) != place:
        raise ValueError(
            f"the folder {folder} has the name of another module than site {place[0]!r} of layer {place[1]}: rename it"
        )
    state = {_NAMES[key]: value.T if key in _FLIPPED else value for key, value in params.items()}
    save_tensors(folder / WEIGHTS, state)
    (folder / CONFIG).write_text(json.dumps(raw) + "\n", encoding="utf-8")


def _features(path: Path, raw: Mapping[str, Any]) -> int:
    """``num_latents``, or where that is 0 or missing, ``d_in * expansion_factor``."""
    check_sizes(path, raw, ("d_in",))
    key = "num_latents" if raw.get("num_latents") else "expansion_factor"
    if key not in raw:
        raise ValueError(f"{path} lacks num_latents and expansion_factor: add one of them")
    check_sizes(path, raw, (key,))
    return raw[key] * (1 if key == "num_latents" else raw["d_in"])


_Hook = tuple[str | None, tuple[str, int] | None]


def _ends(folder: Path, raw: Mapping[str, Any], transcoder: bool) -> tuple[_Hook, _Hook]:
    """The hooks of what is read and of what is reconstructed, from the config or else from the folder's name."""
    if raw.get("hook_name"):
        inner, outer = raw["hook_name"], raw.get("hook_name_out")
        return (inner, hooks.site_of(inner)), (outer, hooks.site_of(outer) if outer else None)
    name = folder.resolve().name
    ends = hooks.ends_of(name)
    if ends is None:
        return (None, None), (None, None)
    before, after, layer = ends
    inner = before if transcoder else after
    return (name, (inner, layer) if inner else None), (name, (after, layer))
