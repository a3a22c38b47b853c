"""The names of weights in files, and of SAE folders: ``<layer>-<point>-x<expansion>-k<k>[-<tag>]``.

For what the published files do not have, names have more: ``<layer>-<point>[-to-<target>]-x<expansion>-<mark>[<k>]``.
"""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

ACTIVATIONS = {"topk": "k", "topk_relu": "reluk", "batchtopk": "batchk", "jumprelu": "jumprelu", "relu": "relu"}
"""The activations of dictionaries, each with its mark in names of folders."""

_SITE = "[a-z][a-z-]*?"
_MARKS = "|".join(ACTIVATIONS.values())
_PATTERN = re.compile(rf"(\d+)-({_SITE})(?:-to-({_SITE}))?-x(\d+(?:\.\d+)?)-({_MARKS})(\d*)(?:-(.+))?")

WRAPPERS = ("_orig_mod", "module")
"""What torch.compile and DataParallel put into the names of the weights of what they wrap. No model has such a part."""


def unwrapped(name: str) -> str:
    """The name of a weight without the parts in ``WRAPPERS``, wherever they stand.

    Example:
        >>> unwrapped("module._orig_mod.blocks.0._orig_mod.weight")
        'blocks.0.weight'
    """
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


class SAEName(NamedTuple):
    """The parts of an SAE folder's name."""

    layer: int
    site: str  # with underscores: "mlp_out"
    expansion: int | float
    k: int | None
    tag: str | None
    activation: str = "topk"
    target: str | None = None  # the site that a transcoder reconstructs


def parse_sae_name(name: str) -> SAEName | None:
    """The parts of an SAE folder's name. None if it is not such a name.

    Example:
        >>> parse_sae_name("12-mlp-out-x16-k30-v0")
        SAEName(layer=12, site='mlp_out', expansion=16, k=30, tag='v0', activation='topk', target=None)
    """
    match = _PATTERN.fullmatch(name)
    if match is None:
        return None
    layer, site, target, expansion, mark, k, tag = match.groups()
    activation = next(activation for activation, its in ACTIVATIONS.items() if its == mark)
    if not k and mark.endswith("k"):
        return None
    return SAEName(
        int(layer),
        site.replace("-", "_"),
        float(expansion) if "." in expansion else int(expansion),
        int(k) if k else None,
        tag,
        activation,
        target and target.replace("-", "_"),
    )


def sae_folder_name(parts: SAEName) -> str:
    """The folder name of an SAE with these parts: the inverse of ``parse_sae_name``, with six digits of the expansion.

    Example:
        >>> sae_folder_name(SAEName(12, "mlp_out", 16, 30, "v0"))
        '12-mlp-out-x16-k30-v0'
    """
    sites = [site.replace("_", "-") for site in (parts.site, parts.target) if site]
    k = "" if parts.k is None else parts.k
    width = parts.expansion if isinstance(parts.expansion, int) else f"{parts.expansion:.6g}"
    name = f"{parts.layer}-{'-to-'.join(sites)}-x{width}-{ACTIVATIONS[parts.activation]}{k}"
    return f"{name}-{parts.tag}" if parts.tag else name


def sae_names_among(names: Iterable[str]) -> dict[str, SAEName]:
    """The names that are names of SAE folders, with their parts, in the order of their layers."""
    parsed = {name: parts for name in names if (parts := parse_sae_name(name)) is not None}
    return dict(sorted(parsed.items(), key=lambda item: (item[1].layer, item[0])))


def sae_folders(folder: str | Path) -> dict[str, SAEName]:
    """The SAE folders in ``folder``, by name, in the order of their layers. Empty if there are none."""
    folder = Path(folder)
    if not folder.is_dir():
        return {}
    return sae_names_among(entry.name for entry in folder.iterdir() if (entry / "config.json").is_file())
