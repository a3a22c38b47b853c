"""The names of weights in files, and of SAE folders: ``<layer>-<point>-x<expansion>-k<k>[-<tag>]``."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

_PATTERN = re.compile(r"(\d+)-([a-z][a-z-]*?)-x(\d+)-k(\d+)(?:-(.+))?")

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
    expansion: int
    k: int
    tag: str | None


def parse_sae_name(name: str) -> SAEName | None:
    """The parts of an SAE folder's name. None if it is not such a name.

    Example:
        >>> parse_sae_name("12-mlp-out-x16-k30-v0")
        SAEName(layer=12, site='mlp_out', expansion=16, k=30, tag='v0')
    """
    match = _PATTERN.fullmatch(name)
    if match is None:
        return None
    layer, site, expansion, k, tag = match.groups()
    return SAEName(int(layer), site.replace("-", "_"), int(expansion), int(k), tag)


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
