"""Read a published image classifier, saved by torch, as a config and params."""

import re
from pathlib import Path
from typing import Any

import numpy as np

from weights_convert.pickled import Foreign, read_torch, state_dict
from weights_convert.weights import ReadModel

_LAYER = re.compile(r"blocks\.(\d+)\.(weight|bias)")


def read_image_model(path: str | Path, *, residual: bool | None = None) -> ReadModel:
    """Read the config and the params of an image classifier from a file of ``torch.save``: a state dict or a module.

    The keys of the state dict become, with h = d_hidden:

        embed.weight        [h, inputs]     w_e
        blocks.{i}.weight   [2 h, h]        layers.w_l, layers.w_r  (left rows first)
        blocks.{i}.bias     [2 h]           layers.b_l, layers.b_r
        head.weight         [classes, h]    w_u

    Args:
        path: the file.
        residual: whether each layer adds its input to its output. The weights do not show this. None: as the config in
            the file says; False if it has none.

    Returns:
        ``(config, params)``: keyword arguments of ``ImageConfig``, and a nested dict of float32 arrays.

    Raises:
        FileNotFoundError: if the file does not exist.
        ValueError: if the file is damaged, its keys or shapes are those of another model, weights are not finite, or
            ``residual`` contradicts the config in the file.
    """
    loaded = read_torch(path)
    found = state_dict(loaded)
    layers = sorted({int(match[1]) for key in found if (match := _LAYER.fullmatch(key))})
    bias = "blocks.0.bias" in found
    kinds = ("weight", "bias") if bias else ("weight",)
    expected = {"embed.weight", "head.weight"} | {f"blocks.{n}.{kind}" for n in range(len(layers)) for kind in kinds}
    if not layers or expected != found.keys():
        raise ValueError(
            f"{path} is not an image classifier with bilinear layers. In the model but not in the file: "
            f"{sorted(expected - found.keys())}; in the file but not in the model: {sorted(found.keys() - expected)}"
        )
    arrays = {key: _checked(path, key, value) for key, value in found.items()}
    hidden, inputs = arrays["embed.weight"].shape if arrays["embed.weight"].ndim == 2 else (0, 0)
    classes = arrays["head.weight"].shape[0]
    shapes = {"embed.weight": (hidden, inputs), "head.weight": (classes, hidden)}
    shapes |= {f"blocks.{n}.weight": (2 * hidden, hidden) for n in range(len(layers))}
    shapes |= {f"blocks.{n}.bias": (2 * hidden,) for n in range(len(layers)) if bias}
    wrong = [
        f"{key} has {list(arrays[key].shape)}, expected {list(shape)}"
        for key, shape in sorted(shapes.items())
        if arrays[key].shape != shape
    ]
    if wrong:
        raise ValueError(f"shapes in {path} contradict each other: {'; '.join(wrong)}")
    config = {
        "n_inputs": inputs,
        "d_hidden": hidden,
        "n_classes": classes,
        "n_layer": len(layers),
        "bias": bias,
        "residual": _residual(path, loaded, residual),
    }
    stacked = {}
    for kind, letter in (("weight", "w"), ("bias", "b"))[: len(kinds)]:
        whole = np.stack([arrays[f"blocks.{n}.{kind}"] for n in range(len(layers))])
        stacked |= {f"{letter}_l": whole[:, :hidden], f"{letter}_r": whole[:, hidden:]}
    return ReadModel(config, {"w_e": arrays["embed.weight"], "layers": stacked, "w_u": arrays["head.weight"]})


def _checked(path: str | Path, key: str, value: np.ndarray) -> np.ndarray:
    if value.dtype.kind not in "fV" and value.dtype.name != "bfloat16":
        raise ValueError(f"{key} in {path} is {value.dtype}, but must be floating point")
    value = np.ascontiguousarray(value, np.float32)
    if not np.isfinite(value).all():
        raise ValueError(f"{key} in {path} has values that are not finite: the file is damaged; download it again")
    return value


def _residual(path: str | Path, loaded: Any, given: bool | None) -> bool:
    """The given value, or the one in the config of the file."""
    holder = loaded.get("config") if isinstance(loaded, dict) else getattr(loaded, "state", {}).get("config")
    fields = holder.state if isinstance(holder, Foreign) else holder
    stated = fields.get("residual") if isinstance(fields, dict) else None
    if given is not None and stated is not None and bool(given) != bool(stated):
        raise ValueError(f"the config in {path} says residual={bool(stated)}: leave out the argument residual")
    return bool(stated if given is None else given)
