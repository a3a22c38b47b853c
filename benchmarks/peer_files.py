"""Dictionaries that this library writes, read by the libraries whose formats they are: the same codes and outputs.

For each format and each kind of dictionary that it can say, a random one is written. The peer reads it, computes codes
and reconstructions of the same inputs, and saves what it read. From that, this library must read the params again, bit
for bit. The errors are the largest differences from the formula in ``weights_convert.dictionaries``, in float64.

    python benchmarks/peer_files.py --torch PYTHON

PYTHON is an interpreter with torch, sae-lens 6.54, dictionary-learning 0.1.0 and eai-sparsify 1.3.3; by default this
one. A peer that it lacks is left out, and said. Gemma Scope's files are read by the loader of SAELens, which cannot
write them.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

D, F, K, ROWS = 16, 64, 6, 200
TOLERANCE = 1e-5
TRANSCODER = {"site": "mlp_in", "target": "mlp_out", "centred": False}
CASES = [
    ("saelens", {"activation": "relu"}),
    ("saelens", {"activation": "relu", "centred": False}),
    ("saelens", {"activation": "topk_relu"}),
    ("saelens", {"activation": "jumprelu"}),
    ("saelens", {"activation": "batchtopk", "centred": False}),
    ("saelens", {"activation": "relu", **TRANSCODER}),
    ("saelens", {"activation": "relu", "skip": True, **TRANSCODER}),
    ("saelens", {"activation": "jumprelu", **TRANSCODER}),
    ("saelens", {"activation": "jumprelu", "skip": True, **TRANSCODER}),
    ("gemma-scope", {"activation": "jumprelu", "centred": False}),
    ("sparsify", {"activation": "topk_relu"}),
    ("sparsify", {"activation": "topk_relu", "skip": True}),
    ("sparsify", {"activation": "topk_relu", **TRANSCODER}),
    ("sparsify", {"activation": "topk_relu", "skip": True, **TRANSCODER}),
    ("dictionary_learning", {"activation": "relu"}),
    ("dictionary_learning", {"activation": "relu", "centred": False}),
    ("dictionary_learning", {"activation": "topk_relu"}),
    ("dictionary_learning", {"activation": "batchtopk"}),
    ("dictionary_learning", {"activation": "jumprelu", "centred": False}),
]


def made(seed: int, **options: Any) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """A random dictionary in float32."""
    place = {"site": "resid_post", "layer": 2, "d_model": D, "expansion": F // D}
    kind = {"encoder_bias": True, "target": None, "skip": False, "centred": True, "tag": None}
    config = {**place, "k": K, **kind, **options}
    shapes: dict[str, tuple[int, ...]] = {"w_enc": (F, D), "b_enc": (F,), "w_dec": (D, F), "b_dec": (D,)}
    shapes |= {"w_skip": (D, D)} if config["skip"] else {}
    rng = np.random.default_rng(seed)
    params = {key: (rng.normal(size=shape) / 4).astype(np.float32) for key, shape in shapes.items()}
    if config["activation"] in ("jumprelu", "batchtopk"):
        shape = (F,) if config["activation"] == "jumprelu" else ()
        params["threshold"] = np.asarray(rng.uniform(0.3, 1, shape), np.float32)
    return config, params


def computed(config: dict[str, Any], params: dict[str, np.ndarray], x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Codes and reconstructions by the formula, in float64."""
    p = {key: value.astype(np.float64) for key, value in params.items()}
    z = (x - config["centred"] * p["b_dec"]) @ p["w_enc"].T + p["b_enc"]
    if config["activation"] == "topk_relu":
        least = np.sort(z, axis=1)[:, [-config["k"]]]
    else:
        least = np.nextafter(p.get("threshold", 0), np.inf)
    codes = np.where((z >= least) & (z > 0), z, 0)
    return codes, codes @ p["w_dec"].T + p["b_dec"] + (x @ p["w_skip"].T if config["skip"] else 0)


# The peers, in the other interpreter


def saelens(folder: Path, again: Path, x):
    from sae_lens import SAE

    sae = SAE.load_from_disk(folder)
    sae.save_model(again)
    return sae.encode(x), sae(x)


def gemma_scope(folder: Path, again: Path, x):
    from sae_lens import SAE
    from sae_lens.loading import pretrained_sae_loaders as loaders

    loaders.hf_hub_download = lambda *args, **options: str(folder / "params.npz")  # what the hub would give
    sizes = {"d_in": D, "d_sae": F}
    place = {"repo_id": "gemma-scope-2b-pt-res", "folder_name": "layer_2/width_16k/average_l0_71"}
    config, state, _ = loaders.gemma_2_sae_huggingface_loader(**place, cfg_overrides=sizes)
    sae = SAE.from_dict(loaders.handle_config_defaulting(config))
    sae.load_state_dict(state)
    return sae.encode(x), sae(x)


def sparsify(folder: Path, again: Path, x):
    os.environ["SPARSIFY_DISABLE_TRITON"] = "1"  # which needs a GPU
    import torch
    from sparsify import SparseCoder

    coder = SparseCoder.load_from_disk(folder)
    coder.save_to_disk(again)
    values, indices, _ = coder.encode(x)
    return torch.zeros(len(x), F).scatter(1, indices, values), coder(x, x).sae_out


def dictionary_learning(folder: Path, again: Path, x):
    import torch
    from dictionary_learning.dictionary import AutoEncoder
    from dictionary_learning.utils import load_dictionary

    dictionary, config = load_dictionary(str(folder), "cpu")
    if config["trainer"]["dict_class"] == "AutoEncoder":  # which scales the decoder, and with it the codes
        dictionary = AutoEncoder.from_pretrained(folder / "ae.pt", normalize_decoder=False)
    again.mkdir()
    torch.save(dictionary.state_dict(), again / "ae.pt")
    (again / "config.json").write_text(json.dumps(config))
    return dictionary.encode(x), dictionary(x)


PEERS = {
    "saelens": (saelens, "sae-lens"),
    "gemma-scope": (gemma_scope, "sae-lens"),
    "sparsify": (sparsify, "eai-sparsify"),
    "dictionary_learning": (dictionary_learning, "dictionary-learning"),
}


def peer(root: Path) -> None:
    """Read all folders and compute; prints the version of each peer, or None where it cannot be imported."""
    import importlib.metadata

    import torch

    answer, sys.stdout = sys.stdout, sys.stderr  # what libraries print is no answer
    x = torch.from_numpy(np.load(root / "x.npy"))
    versions: dict[str, str | None] = {}
    for i, (form, _) in enumerate(CASES):
        run, package = PEERS[form]
        if form in versions and versions[form] is None:
            continue
        try:
            with torch.no_grad():
                codes, reconstruction = run(root / str(i), root / f"{i}-again", x)
        except ModuleNotFoundError as error:
            versions[form] = None
            print(f"{form}: left out, {error}")
            continue
        np.savez(root / f"{i}.npz", codes=codes.numpy(), reconstruction=reconstruction.numpy())
        try:
            versions[form] = f"{package} {importlib.metadata.version(package)}"
        except importlib.metadata.PackageNotFoundError:
            versions[form] = package
    print(json.dumps(versions), file=answer)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--torch", default=sys.executable, metavar="PYTHON", help="an interpreter that has the peers")
    parser.add_argument("--peer", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peer:
        return peer(args.peer)

    from weights_convert import read_dictionary, write_dictionary

    x = np.random.default_rng(0).normal(size=(ROWS, D)).astype(np.float32)
    cases = []
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        np.save(root / "x.npy", x)
        dictionaries = [made(i, **options) for i, (_, options) in enumerate(CASES)]
        for i, (config, params) in enumerate(dictionaries):
            (root / str(i)).mkdir()
            write_dictionary(root / str(i), CASES[i][0], config, params)
        command = [args.torch, __file__, "--peer", str(root)]
        output = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
        versions = json.loads(output.splitlines()[-1])
        for i, (config, params) in enumerate(dictionaries):
            form, options = CASES[i]
            label = f"{form}: {', '.join(f'{key} {value}' for key, value in options.items())}"
            if versions[form] is None:
                continue
            theirs = np.load(root / f"{i}.npz")
            ours = dict(zip(("codes", "reconstruction"), computed(config, params, x.astype(np.float64)), strict=True))
            error = {key: float(np.abs(theirs[key] - value).max()) for key, value in ours.items()}
            again, equal = root / f"{i}-again", None
            if again.is_dir():
                place = {"site": config["site"], "layer": config["layer"]}
                got = read_dictionary(again, **place).params
                equal = got.keys() == params.keys() and all(np.array_equal(got[key], params[key]) for key in params)
            used = int((ours["codes"] != 0).sum())
            print(f"{label}: {versions[form]}, {used} codes, errors {error}, saved again {equal}", flush=True)
            cases.append({"case": label, "peer": versions[form], "active": used, **error, "saved_again_equal": equal})
    wrong = [
        c["case"] for c in cases if max(c["codes"], c["reconstruction"]) > TOLERANCE or c["saved_again_equal"] is False
    ]
    print(json.dumps({"benchmark": "peer_files", "cases": cases, "wrong": wrong}))
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
