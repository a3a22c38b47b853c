"""Read a published image classifier, saved by torch or as safetensors, as a config and params."""

import re
from pathlib import Path
from typing import Any

import numpy as np

from weights_convert.names import WRAPPERS
from weights_convert.pickled import Foreign, read_torch
from weights_convert.weights import FLOATS, ReadModel, Weights

_LAYER = re.compile(r"blocks\.(\d+)\.(weight|bias)")


def read_image_model(path: str | Path, *, residual: bool | None = None) -> ReadModel:
    """Read the config and the params of an image classifier from a file of ``torch.save`` or of safetensors.

    A file of ``torch.save`` holds a state dict or a module, or a dict with one of them (``pickled.state_dict``). The
    keys of the state dict become, with h = d_hidden:

        embed.weight        [h, inputs]     w_e
        blocks.{i}.weight   [2 h, h]        layers.w_l, layers.w_r  (left rows first)
        blocks.{i}.bias     [2 h]           layers.b_l, layers.b_r
        head.weight         [classes, h]    w_u

    Args:
        path: the file. A safetensors file has a name that ends in ``.safetensors``.
        residual: whether each layer adds its input to its output. The weights do not show this. None: as the config in
            the file says; False if it has none.

    Returns:
        ``(config, params)``: keyword arguments of ``ImageConfig``, and a nested dict of float32 arrays.

    Raises:
        FileNotFoundError: if the file does not exist.
        ValueError: if the file is damaged, its keys or shapes are those of another model, weights are not finite, or
            ``residual`` contradicts the config in the file.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    weights = Weights([path], r"embed\.|blocks\.|head\.", (*FLOATS, "float64"))
    found = weights.shapes
    layers = sorted({int(match[1]) for key in found if (match := _LAYER.fullmatch(key))})
    bias = "blocks.0.bias" in found
    kinds = ("weight", "bias") if bias else ("weight",)
    expected = {"embed.weight", "head.weight"} | {f"blocks.{n}.{kind}" for n in range(len(layers)) for kind in kinds}
    if not layers or expected != found.keys():
        raise ValueError(
            f"{path} is not an image classifier with bilinear layers. In the model but not in the file: "
            f"{sorted(expected - found.keys())}; in the file but not in the model: {sorted(found.keys() - expected)}"
        )
    arrays = {key: _float32(path, key, weights.read(key)) for key in found}
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
        "residual": _residual(path, residual),
    }
    stacked = {}
    for kind, letter in (("weight", "w"), ("bias", "b"))[: len(kinds)]:
        whole = np.stack([arrays[f"blocks.{n}.{kind}"] for n in range(len(layers))])
        stacked |= {f"{letter}_l": whole[:, :hidden], f"{letter}_r": whole[:, hidden:]}
    return ReadModel(config, {"w_e": arrays["embed.weight"], "layers": stacked, "w_u": arrays["head.weight"]})


def _float32(path: Path, key: str, value: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        value = np.ascontiguousarray(value, np.float32)
    if not np.isfinite(value).all():
        raise ValueError(f"{key} in {path} has values that are not finite in float32: save it again in that dtype")
    return value


def _residual(path: Path, given: bool | None) -> bool:
    """The given value, or the one in the config of the file."""
    stated = None if path.suffix == ".safetensors" else _stated(read_torch(path))
    if given is not None and stated is not None and bool(given) != bool(stated):
        raise ValueError(f"the config in {path} says residual={bool(stated)}: leave out the argument residual")
    return bool(stated if given is None else given)


def _stated(loaded: Any, depth: int = 0) -> Any:
    """``residual`` in the config beside the state dict, or of the module, which may be wrapped or in a dict."""
    held = loaded.state if isinstance(loaded, Foreign) else loaded
    if not isinstance(held, dict) or depth > 10:
        return None
    config = held.get("config")
    fields = config.state if isinstance(config, Foreign) else config
    if isinstance(fields, dict) and "residual" in fields:
        return fields["residual"]
    inside = [held[name] for name in ("_modules", *WRAPPERS) if name in held]
    if depth == 0 and isinstance(loaded, dict):
        inside = [one for one in loaded.values() if isinstance(one, Foreign)]
    return next((found for one in inside if (found := _stated(one, depth + 1)) is not None), None)
