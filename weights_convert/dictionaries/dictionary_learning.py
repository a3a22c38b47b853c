"""dictionary_learning: ``config.json``, with the class of the dictionary, and ``ae.pt``, a file of torch.

    AutoEncoder             relu(W_e (x - b_dec) + b_e)         AutoEncoderNew: the same without b_dec there
    AutoEncoderTopK         the k largest of that
    BatchTopKSAE            that where it is above one threshold; MatryoshkaBatchTopKSAE is the same, transposed
    JumpReluAutoEncoder     W_e^T x + b_e where it is above its threshold and 0, transposed

Codes are those of the weights in the file. The peer itself scales the decoder of an AutoEncoder to unit columns when it
loads one, so its codes are then larger by the norms of the columns, and its reconstruction is the same.

Source: dictionary_learning 0.1.0 (``dictionary.py``, ``trainers/``, ``training.py``).
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from weights_convert.dictionaries import checks, hooks
from weights_convert.files import check_keys, check_kinds, check_sizes, inside, read_config
from weights_convert.torch_file import write_torch
from weights_convert.weights import FLOATS, ReadModel, Weights

CONFIG, WEIGHTS = FILES = ("config.json", "ae.pt")


class _Class(NamedTuple):
    activation: str
    centred: bool
    names: dict[str, str]  # of the params in the file
    flipped: tuple[str, ...] = ()  # those that are transposed there
    extra: tuple[str, ...] = ()  # tensors that inference needs not


_LINEAR = {"w_enc": "encoder.weight", "b_enc": "encoder.bias", "w_dec": "decoder.weight", "b_dec": "b_dec"}
_MATRIX = {"w_enc": "W_enc", "b_enc": "b_enc", "w_dec": "W_dec", "b_dec": "b_dec"}
_THRESHOLD, _BOTH = {"threshold": "threshold"}, ("w_enc", "w_dec")

CLASSES = {
    "AutoEncoder": _Class("relu", True, _LINEAR | {"b_dec": "bias"}),
    "AutoEncoderNew": _Class("relu", False, _LINEAR | {"b_dec": "decoder.bias"}),
    "AutoEncoderTopK": _Class("topk_relu", True, _LINEAR, extra=("k", "threshold")),
    "BatchTopKSAE": _Class("batchtopk", True, _LINEAR | _THRESHOLD, extra=("k",)),
    "MatryoshkaBatchTopKSAE": _Class("batchtopk", True, _MATRIX | _THRESHOLD, _BOTH, ("k", "group_sizes")),
    "JumpReluAutoEncoder": _Class("jumprelu", False, _MATRIX | _THRESHOLD, _BOTH),
}
"""The classes that can be read. "GatedAutoEncoder" has a second encoder, and "IdentityDict" no weights."""

_MEANT = {"dict_class", "activation_dim", "dict_size", "k", "layer", "submodule_name", "lm_name", "tag"}
_TRAINING = {
    *("trainer_class", "lr", "steps", "seed", "device", "wandb_name", "norm_factor", "warmup_steps", "decay_start"),
    *("auxk_alpha", "threshold_beta", "threshold_start_step", "top_k_aux", "group_fractions", "group_weights"),
    *("group_sizes", "bandwidth", "sparsity_penalty", "sparsity_warmup_steps", "target_l0", "l1_penalty"),
    *("resample_steps", "sparsity_function", "p_start", "p_end", "anneal_start", "sparsity_queue_length"),
    *("n_sparsity_updates",),
}


def describe(folder: Path, site: str | None, layer: int | None, target: str | None) -> dict[str, Any]:
    """The config of one dictionary, without its weights. See ``describe_dictionary``."""
    return _described(folder, site, layer, target)[0]


def _described(folder: Path, site: str | None, layer: int | None, target: str | None) -> tuple[dict[str, Any], _Class]:
    """The config of one dictionary, and its class."""
    path = folder / CONFIG
    whole = read_config(folder, CONFIG)
    check_keys(path, whole, ("trainer", "buffer"), ("trainer",))
    check_kinds(path, whole, {"trainer": dict, "buffer": dict})
    raw = whole["trainer"] or {}
    check_keys(path, raw, _MEANT | _TRAINING, ("dict_class", "activation_dim", "dict_size"))
    check_kinds(path, raw, {"dict_class": str, "layer": int, "submodule_name": str, "tag": str})
    check_sizes(path, raw, ("activation_dim", "dict_size"))
    kind = CLASSES.get(raw["dict_class"])
    if kind is None:
        raise ValueError(
            f"{path}: dict_class {raw['dict_class']!r:.100} cannot be read: it is none of {', '.join(CLASSES)}"
        )
    d, features = raw["activation_dim"], raw["dict_size"]
    place = _place(path, raw, whole.get("buffer") or {}, site, layer)
    hooks.own(path, place, target)
    config = {
        "site": place[0],
        "layer": place[1],
        "d_model": d,
        "expansion": checks.expansion(path, features, d),
        "k": checks.check_k(path, raw.get("k"), features) if "k" in kind.extra else None,
        "encoder_bias": True,
        "activation": kind.activation,
        "target": None,
        "skip": False,
        "centred": kind.centred,
        "tag": raw.get("tag") or None,
    }
    return config, kind


def read(folder: Path, site: str | None, layer: int | None, target: str | None) -> ReadModel:
    """Read one dictionary. See ``read_dictionary``."""
    config, kind = _described(folder, site, layer, target)
    part = r"encoder\.|decoder\.|W_enc|W_dec"
    weights = Weights([inside(folder, WEIGHTS)], part, (*FLOATS, "int32", "int64"))
    params = checks.read_params(weights, config, kind.names, kind.flipped, kind.extra)
    if whole_numbers := [kind.names[key] for key, value in params.items() if value.dtype.name not in FLOATS]:
        raise ValueError(f"{folder / WEIGHTS} has whole numbers in {whole_numbers}: it is damaged, download it again")
    if "k" in kind.extra and "k" in weights.shapes and (there := weights.read("k").tolist()) != config["k"]:
        raise ValueError(f"{folder / CONFIG}: k is {config['k']}, but {WEIGHTS} has {there}: correct one of them")
    return ReadModel(config, params)


def write(folder: Path, config: Mapping[str, Any], params: Mapping[str, Any]) -> None:
    """Write one dictionary. See ``write_dictionary``."""
    form = "dictionary_learning"
    written = ("relu", "topk_relu", "batchtopk", "jumprelu")
    config, params, transcoder = checks.checked(form, config, params, written, one_dtype=False)
    if transcoder or config["skip"]:
        option = "target" if transcoder else "skip"
        raise checks.refuse(
            form, option, config[option], "it has no transcoders: write the format of SAELens or sparsify"
        )
    found = [(name, kind) for name, kind in CLASSES.items() if kind.activation == config["activation"]]
    if config["activation"] == "relu":
        found = [(name, kind) for name, kind in found if kind.centred == config["centred"]]
    name, kind = found[0]
    checks.need_centring(form, config, kind.centred)
    place = config["site"], config["layer"]
    trainer = {
        **{"dict_class": name, "activation_dim": config["d_model"], "dict_size": checks.features_of(config)},
        **({"k": config["k"]} if "k" in kind.extra else {}),
        **{"layer": place[1], "submodule_name": f"{place[0]}_layer_{place[1]}", "lm_name": None},
        **({"tag": config["tag"]} if config["tag"] else {}),
    }
    state = {kind.names[key]: value.T if key in kind.flipped else value for key, value in params.items()}
    if "k" in kind.extra:
        state["k"] = np.array(config["k"], np.int32)
        state.setdefault("threshold", np.array(-1, np.float32))  # of AutoEncoderTopK, which does not use it
    write_torch(folder / WEIGHTS, state)
    raw = {"trainer": trainer, "buffer": {}}
    (folder / CONFIG).write_text(json.dumps(raw, indent=4) + "\n", encoding="utf-8")


def _place(
    path: Path, raw: Mapping[str, Any], buffer: Mapping[str, Any], site: str | None, layer: int | None
) -> tuple[str, int]:
    """The site and the layer, from ``submodule_name`` and ``layer``. The input of a module has no site in its name."""
    name = raw.get("submodule_name")
    if buffer.get("io", "out") not in ("in", "out"):
        raise ValueError(f"{path}: io of the buffer is {buffer['io']!r:.100}: only SAEs, of 'in' or 'out', can be read")
    found = hooks.site_of_submodule(name) or hooks.site_of(name) if name and buffer.get("io") != "in" else None
    found_site, found_layer = found or (None, None)
    if found_layer is not None and raw.get("layer") not in (None, found_layer):
        raise ValueError(f"{path}: layer is {raw['layer']}, but submodule_name is {name!r}: correct one of them")
    found_layer = raw.get("layer") if found_layer is None else found_layer
    return hooks.placed(
        path, name or ("layer" if found_layer is not None else None), (found_site, found_layer), site, layer
    )
