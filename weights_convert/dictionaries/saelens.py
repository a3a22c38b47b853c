"""SAELens: ``cfg.json`` and ``sae_weights.safetensors``.

    z     = W_enc^T (x - b_dec) + b_enc           the file has the matrices transposed
    codes = relu, top-k then relu, or z where z > threshold and z > 0
    x_hat = W_dec^T codes + b_dec                 and + W_skip x for transcoders with a skip

SAELens saves a trained batch top-k SAE as "jumprelu" with equal thresholds, and its metadata says how it was trained.
It is read as "batchtopk" with one threshold.

Source: SAELens 6.54 (``saes/``, ``loading/pretrained_sae_loaders.py``).
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from weights_convert.dictionaries import checks, hooks
from weights_convert.export import save_tensors
from weights_convert.files import check_keys, check_kinds, check_sizes, inside, read_config
from weights_convert.weights import FLOATS, ReadModel, Weights

CONFIG, WEIGHTS = FILES = ("cfg.json", "sae_weights.safetensors")
VERSION = "6.54.0"
"""The version whose layout is written."""


class _Architecture(NamedTuple):
    activation: str
    transcoder: bool = False
    skip: bool = False


ARCHITECTURES = {
    "standard": _Architecture("relu"),
    "topk": _Architecture("topk_relu"),
    "jumprelu": _Architecture("jumprelu"),
    "batchtopk": _Architecture("batchtopk"),
    "matryoshka_batchtopk": _Architecture("batchtopk"),
    "transcoder": _Architecture("relu", transcoder=True),
    "skip_transcoder": _Architecture("relu", transcoder=True, skip=True),
    "jumprelu_transcoder": _Architecture("jumprelu", transcoder=True),
    "jumprelu_skip_transcoder": _Architecture("jumprelu", transcoder=True, skip=True),
}
"""The architectures that can be read. "gated", "abstopk", "temporal" and "matching_pursuit" compute something else."""

_TRAINED_BATCHTOPK = ("batchtopk", "matryoshka_batchtopk")
_NAMES = {
    **{"w_enc": "W_enc", "b_enc": "b_enc", "w_dec": "W_dec", "b_dec": "b_dec", "w_skip": "W_skip"},
    "threshold": "threshold",
}
_FLIPPED = ("w_enc", "w_dec")
_MEANT = {
    *("d_in", "d_sae", "d_out", "k", "architecture", "apply_b_dec_to_input", "normalize_activations", "metadata"),
    *("reshape_activations", "rescale_acts_by_decoder_norm", "dtype", "device"),
}
_TRAINING = {
    *("decoder_init_norm", "l1_coefficient", "l1_warm_up_steps", "lp_norm", "aux_loss_coefficient", "target_l0"),
    *("use_sparse_activations", "topk_threshold_lr", "matryoshka_widths", "use_matryoshka_aux_loss", "l0_coefficient"),
    *("l0_warm_up_steps", "pre_act_loss_coefficient", "jumprelu_bandwidth", "jumprelu_init_threshold"),
    *("jumprelu_sparsity_loss_mode", "jumprelu_ste_to_input", "jumprelu_tanh_scale"),
}
_KINDS = {
    **{"architecture": str, "apply_b_dec_to_input": bool, "rescale_acts_by_decoder_norm": bool},
    **{"metadata": dict, "normalize_activations": str, "reshape_activations": str},
}


def describe(folder: Path, site: str | None, layer: int | None, target: str | None) -> dict[str, Any]:
    """The config of one dictionary, without its weights. See ``describe_dictionary``."""
    config, raw = _described(folder, site, layer, target)
    metadata = raw.get("metadata") or {}
    if config["activation"] == "jumprelu" and (k := _trained_k(folder / CONFIG, metadata, raw["d_sae"])):
        return config | {"activation": "batchtopk", "k": k}
    return config


def _described(
    folder: Path, site: str | None, layer: int | None, target: str | None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The config as the file says it, and the file's own."""
    path = folder / CONFIG
    raw = _current(path, read_config(folder, CONFIG))
    check_keys(path, raw, _MEANT | _TRAINING, ("d_in", "d_sae", "architecture"))
    check_kinds(path, raw, _KINDS)
    check_sizes(path, raw, ("d_in", "d_sae"))
    kind = _architecture(path, raw)
    metadata = raw.get("metadata") or {}
    place = hooks.placed(path, *_hook(path, metadata, ("hook_name", "hf_hook_name")), site, layer)
    config = {
        "site": place[0],
        "layer": place[1],
        "d_model": raw["d_in"],
        "expansion": checks.expansion(path, raw["d_sae"], raw["d_in"]),
        "k": _k(path, raw, kind.activation),
        "encoder_bias": True,
        "activation": kind.activation,
        "target": _target(path, metadata, kind, place, target),
        "skip": kind.skip,
        "centred": not kind.transcoder and raw.get("apply_b_dec_to_input", True) is not False,
        "tag": metadata.get("tag") if isinstance(metadata.get("tag"), str) else None,
    }
    return config, raw


def read(folder: Path, site: str | None, layer: int | None, target: str | None) -> ReadModel:
    """Read one dictionary. See ``read_dictionary``."""
    config, raw = _described(folder, site, layer, target)
    kind = ARCHITECTURES[raw["architecture"]]
    weights = Weights([inside(folder, WEIGHTS)], "W_", (*FLOATS, "float64"), config=CONFIG)
    names = _NAMES | ({"threshold": "topk_threshold"} if kind.activation == "batchtopk" else {})
    ignored = ("scaling_factor",) if _is_ones(weights, "scaling_factor") else ()
    params = checks.read_params(weights, config, names, _FLIPPED, ignored)
    if kind.activation == "batchtopk":
        params["threshold"] = params["threshold"].astype(params["b_enc"].dtype)  # SAELens keeps it in double precision
    if double := [names[key] for key, value in params.items() if value.dtype.name not in FLOATS]:
        raise ValueError(f"{folder / WEIGHTS} has {double} in float64: save them again as one of {', '.join(FLOATS)}")
    if raw.get("rescale_acts_by_decoder_norm"):
        params = _rescaled(params)
    return _as_trained(folder / CONFIG, raw.get("metadata") or {}, ReadModel(config, params))


def write(folder: Path, config: Mapping[str, Any], params: Mapping[str, Any]) -> None:
    """Write one dictionary. See ``write_dictionary``."""
    transcoder = config.get("target") not in (None, config.get("site")) or bool(config.get("skip"))
    activations = ("relu", "jumprelu") if transcoder else ("relu", "jumprelu", "topk_relu", "batchtopk")
    config, params, _ = checks.checked("SAELens", config, params, activations, one_dtype=True)
    if transcoder and config["centred"]:
        raise ValueError("SAELens has no skip for an SAE that is centred: " + checks.how_to_centre(False))
    metadata = {
        **{"sae_lens_version": VERSION, "sae_lens_training_version": None},
        "hook_name": hooks.hook_name(config["site"], config["layer"]),
    }
    if transcoder:
        metadata["hook_name_out"] = hooks.hook_name(config["target"] or config["site"], config["layer"])
    if config["tag"]:
        metadata["tag"] = config["tag"]
    architecture = _Architecture(config["activation"], transcoder, config["skip"])
    raw: dict[str, Any] = {
        **{"d_in": config["d_model"], "d_sae": checks.features_of(config)},
        **{"dtype": params["w_enc"].dtype.name, "device": "cpu", "apply_b_dec_to_input": config["centred"]},
        **{"normalize_activations": "none", "reshape_activations": "none", "metadata": metadata},
    }
    if transcoder:
        raw["d_out"] = config["d_model"]
    if architecture.activation == "topk_relu":
        raw |= {"k": config["k"], "rescale_acts_by_decoder_norm": False}
    if architecture.activation == "batchtopk":
        details = {"k": config["k"]}
        metadata |= {"training_architecture": "batchtopk", "training_architecture_details": details}
        params["threshold"] = np.full(raw["d_sae"], params["threshold"])
        architecture = architecture._replace(activation="jumprelu")
    raw["architecture"] = next(name for name, one in ARCHITECTURES.items() if one == architecture)
    state = {_NAMES[key]: value.T if key in _FLIPPED else value for key, value in params.items()}
    save_tensors(folder / WEIGHTS, state)
    (folder / CONFIG).write_text(json.dumps(raw) + "\n", encoding="utf-8")


def _current(path: Path, raw: dict[str, Any]) -> dict[str, Any]:
    """The config in the layout of SAELens 6. Before it, all settings of the training run lay beside each other.

    Of an older config, only the keys that SAELens itself takes from it are kept.
    """
    check_kinds(path, raw, {"metadata": dict, "activation_fn_kwargs": dict})
    version = raw.get("sae_lens_version") or (raw.get("metadata") or {}).get("sae_lens_version")
    major = str(version).partition(".")[0]
    if version and not major.isdecimal():
        raise ValueError(f"{path}: sae_lens_version is {version!r:.100}, which is no version: correct it")
    if version and int(major) >= 6:
        return {key: value for key, value in raw.items() if key != "sae_lens_version"}
    renamed = {
        "hook_point": "hook_name",
        "hook_point_head_index": "hook_head_index",
        "activation_fn_str": "activation_fn",
    }
    old = {renamed.get(key, key): value for key, value in raw.items()}
    current = {key: old[key] for key in _MEANT if key in old} | {"architecture": old.get("architecture", "standard")}
    function = old.get("activation_fn", "relu")
    if function == "topk":
        current |= {"architecture": "topk", "k": (old.get("activation_fn_kwargs") or {}).get("k")}
    elif function != "relu":
        raise ValueError(f"{path}: activation_fn is {function!r:.100}, but only 'relu' and 'topk' can be read")
    if old.get("finetuning_scaling_factor"):
        raise ValueError(f"{path} has finetuning_scaling_factor: multiply the rows of W_dec by it and set it to false")
    if type(old.get("normalize_activations")) is bool:
        current["normalize_activations"] = "expected_average_only_in" if old["normalize_activations"] else "none"
    named = ("hook_name", "hook_name_out", "hook_head_index", "hf_hook_name", "hf_hook_name_out", "tag")
    current["metadata"] = (old.get("metadata") or {}) | {key: old[key] for key in named if key in old}
    return current


def _architecture(path: Path, raw: Mapping[str, Any]) -> _Architecture:
    """The architecture. Raises ``ValueError`` for one that cannot be read, and for options that change what it does."""
    kind = ARCHITECTURES.get(raw["architecture"])
    if kind is None:
        raise ValueError(
            f"{path}: SAELens' architecture {raw['architecture']!r:.100} cannot be read: "
            f"it is none of {', '.join(ARCHITECTURES)}"
        )
    for key, fix in (
        ("normalize_activations", "fold the normalisation into the weights in SAELens, where that is possible"),
        ("reshape_activations", "it reads heads, and no site of this library is made of heads"),
    ):
        if raw.get(key) not in (None, "none"):
            raise ValueError(f"{path}: {key} is {raw[key]!r}, but only 'none' can be read: {fix}")
    if (raw.get("metadata") or {}).get("hook_head_index") is not None:
        raise ValueError(f"{path} has hook_head_index: dictionaries of one head cannot be read")
    if kind.transcoder and raw.get("d_out") != raw["d_in"]:
        raise ValueError(
            f"{path}: d_out is {raw.get('d_out')!r:.100} and d_in is {raw['d_in']}, but a transcoder can only be read "
            "if they are equal"
        )
    if kind.transcoder and raw.get("apply_b_dec_to_input"):
        raise ValueError(f"{path}: apply_b_dec_to_input is true, but a transcoder cannot subtract b_dec: correct it")
    if not kind.transcoder and raw.get("d_out") not in (None, raw["d_in"]):
        raise ValueError(
            f"{path}: d_out is {raw['d_out']!r:.100}, but {raw['architecture']} has the width {raw['d_in']}"
        )
    return kind


def _hook(path: Path, metadata: Mapping[str, Any], keys: tuple[str, ...]) -> tuple[str | None, tuple[str, int] | None]:
    """The first hook that is there, and its site and layer; of several, the first that has a site."""
    check_kinds(path, metadata, dict.fromkeys(keys, str))
    there = [metadata[key] for key in keys if metadata.get(key)]
    mapped = [(hook, place) for hook in there if (place := hooks.site_of(hook))]
    return mapped[0] if mapped else (there[0] if there else None, None)


def _target(
    path: Path, metadata: Mapping[str, Any], kind: _Architecture, place: tuple[str, int], target: str | None
) -> str | None:
    hook, found = _hook(path, metadata, ("hook_name_out", "hf_hook_name_out"))
    if kind.transcoder:
        return hooks.aimed(path, hook, found, place, target)
    if hook and found != place:
        raise ValueError(f"{path} has the target {hook!r}, but its architecture is one of SAEs: correct one of them")
    hooks.own(path, place, target)
    return None


def _k(path: Path, raw: Mapping[str, Any], activation: str) -> int | None:
    """The active features at a token. SAELens trains batch top-k SAEs on an average, which need not be whole."""
    k = raw.get("k")
    if activation == "batchtopk" and type(k) is float and np.isfinite(k):
        k = max(round(k), 1)
    return checks.check_k(path, k, raw["d_sae"]) if activation in ("topk_relu", "batchtopk") else None


def _as_trained(path: Path, metadata: Mapping[str, Any], model: ReadModel) -> ReadModel:
    """A jump ReLU whose metadata says that it was trained as batch top-k, as that; else the model as it is."""
    if model.config["activation"] != "jumprelu":
        return model
    threshold = model.params["threshold"]
    if not (threshold == threshold[0]).all() or not (k := _trained_k(path, metadata, len(threshold))):
        return model
    config = model.config | {"activation": "batchtopk", "k": k}
    return ReadModel(config, model.params | {"threshold": np.array(threshold[0])})


def _trained_k(path: Path, metadata: Mapping[str, Any], features: int) -> int | None:
    """The k of the batch top-k that the metadata says a jump ReLU was trained as. None: they do not say so."""
    trained, details = metadata.get("training_architecture"), metadata.get("training_architecture_details")
    if trained not in _TRAINED_BATCHTOPK or not isinstance(details, dict) or "k" not in details:
        return None
    return _k(path, {"k": details["k"], "d_sae": features}, "batchtopk")


def _is_ones(weights: Weights, key: str) -> bool:
    return key in weights.shapes and bool((weights.read(key) == 1).all())


def _rescaled(params: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The same dictionary without ``rescale_acts_by_decoder_norm``: the norms of the decoder go into the encoder.

    Weights of less than float32 become float32, so that nothing is lost.
    """
    wide = {key: value.astype(np.promote_types(value.dtype, np.float32)) for key, value in params.items()}
    norms = np.linalg.norm(wide["w_dec"].astype(np.float64), axis=0)
    folded = {
        **{"w_enc": wide["w_enc"] * norms[:, None], "b_enc": wide["b_enc"] * norms},
        "w_dec": wide["w_dec"] / np.where(norms > 0, norms, 1),
    }
    return wide | {key: value.astype(wide[key].dtype) for key, value in folded.items()}
