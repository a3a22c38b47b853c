"""Safetensors files and config files, with every way in which they can be wrong said plainly."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

_FLOATS = {"F32", "F16", "BF16"}

_TORCH_PICKLE = (
    "weights_convert reads safetensors only. Where torch is installed, re-save it: "
    "import torch, safetensors.torch as s; "
    "s.save_file(torch.load('pytorch_model.bin', weights_only=True), 'model.safetensors')"
)


def read_config(folder: Path) -> dict[str, Any]:
    """The JSON object in ``folder/config.json``."""
    path = folder / "config.json"
    if not path.is_file():
        there = sorted(entry.name for entry in folder.iterdir()) if folder.is_dir() else "no such folder"
        raise FileNotFoundError(f"{folder} has no config.json (it holds: {there}): name the folder of one model")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}): download it again") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} holds a {type(config).__name__}, expected a JSON object: download it again")
    return config


def check_keys(path: Path, config: Mapping[str, Any], known: Iterable[str], required: Iterable[str]) -> None:
    """Raises ``ValueError`` for keys that aren't known, and for required ones that aren't there."""
    unknown = sorted(config.keys() - set(known))
    if unknown:
        raise ValueError(
            f"{path} has unknown keys {unknown}: the weights may mean something that isn't known here. If they change "
            f"nothing in how the model runs, take them out of the file. Known: {sorted(known)}"
        )
    lacking = sorted(set(required) - config.keys())
    if lacking:
        raise ValueError(f"{path} lacks {lacking}: add them")


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model: ``model.safetensors``, or the shards that its index names."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if not index.is_file():
        pickled = (folder / "pytorch_model.bin").is_file()
        raise FileNotFoundError(
            f"{folder} has no model.safetensors and no model.safetensors.index.json"
            + (
                f", only pytorch_model.bin. {_TORCH_PICKLE}"
                if pickled
                else f". If the model is pickled: {_TORCH_PICKLE}"
            )
        )
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ValueError(f"{index} is no index of safetensors shards ({error!r}): download it again") from error
    bad = [name for name in names if Path(name).name != name]
    if bad:
        raise ValueError(f"{index} names files outside its folder: {bad}")
    lacking = [name for name in names if not (folder / name).is_file()]
    if lacking:
        raise FileNotFoundError(f"{folder} lacks shards that {index.name} names: {lacking}. Download them")
    return [folder / name for name in names]


class Weights:
    """The tensors of one or more safetensors files: shapes at once, values when asked for."""

    def __init__(self, files: Iterable[Path]):
        from safetensors import SafetensorError, safe_open

        self.files = list(files)
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._handles: dict[str, tuple[Path, Any]] = {}
        for path in self.files:
            try:
                handle = safe_open(path, framework="numpy")
                parts = {key: handle.get_slice(key) for key in handle.keys()}  # noqa: SIM118 (not a mapping)
            except SafetensorError as error:
                size = path.stat().st_size
                raise ValueError(
                    f"{path} ({size} bytes) is cut short or no safetensors file ({error}): download it again"
                ) from error
            for key, part in parts.items():
                if key in self.shapes:
                    raise ValueError(f"{key} is in {self._handles[key][0].name} and in {path.name}: delete one of them")
                self.shapes[key] = tuple(part.get_shape())
                self._handles[key] = path, handle

    def check(self, expected: Mapping[str, tuple[int, ...]], ignored: Iterable[str] = ()) -> None:
        """Raises ``ValueError`` unless the tensors are exactly the expected ones, ``ignored`` aside."""
        where = ", ".join(path.name for path in self.files) + f" in {self.files[0].parent}"
        missing = sorted(expected.keys() - self.shapes.keys())
        extra = sorted(self.shapes.keys() - expected.keys() - set(ignored))
        if missing or extra:
            raise ValueError(
                f"the weights in {where} are not those that config.json describes. In the model but not in the "
                f"checkpoint: {_listing(missing)}; in the checkpoint but not in the model: {_listing(extra)}. "
                "Check that config.json belongs to these weights, and download both again"
            )
        wrong = [
            f"{key} has {list(self.shapes[key])}, expected {list(shape)}"
            for key, shape in sorted(expected.items())
            if self.shapes[key] != tuple(shape)
        ]
        if wrong:
            raise ValueError(
                f"shapes in {where} disagree with config.json: {'; '.join(wrong)}. "
                "Check that config.json belongs to these weights"
            )

    def read(self, key: str) -> np.ndarray:
        """One tensor, as stored; raises ``ValueError`` if it is no floating point, or not finite."""
        path, handle = self._handles[key]
        stored = handle.get_slice(key).get_dtype()
        if stored not in _FLOATS:
            raise ValueError(f"{key} in {path} is stored as {stored}; re-save it as one of {sorted(_FLOATS)}")
        value = handle.get_tensor(key)
        if not np.isfinite(value).all():
            kind = "NaN" if np.isnan(value).any() else "infinite"
            count = int(value.size - np.isfinite(value).sum())
            raise ValueError(
                f"{key} in {path} has {count} values that are not finite ({kind}): the file is damaged or its training "
                "diverged; download it again"
            )
        return value


def _listing(names: list[str], most: int = 40) -> str:
    if not names:
        return "nothing"
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
