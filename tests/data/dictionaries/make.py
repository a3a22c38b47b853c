"""Make small random dictionaries as the peers save them, with what the peers compute from them.

Run it in an environment with torch 2.13, sae-lens 6.54 and dictionary-learning 0.1.0:

    python tests/data/dictionaries/make.py OUT

It writes OUT/NAME with the files of the peer, and OUT/NAME/expected.safetensors: ``x [24, 16]``, ``codes [24, 64]``,
``recon [24, 16]`` (what the decoder makes of the codes) and, for SAELens, ``forward [24, 16]`` (with the skip). Gemma
Scope's file and that of sparsify are laid out by hand, and computed by the formulas of their sources. Another script
made the folders beside this file in the same way; the numbers of this one are others.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from dictionary_learning.trainers.batch_top_k import BatchTopKSAE
from sae_lens import SAE
from safetensors.torch import save_file

D, F, K = 16, 64, 6
HOOK = {"hook_name": "blocks.2.hook_mlp_out", "model_name": "tiny"}


def fill(values) -> None:
    """Random numbers, in place."""
    for name, value in values:
        value.copy_(torch.rand_like(value) if name == "threshold" else 0.3 * torch.randn_like(value))


def expect(folder: Path, x, codes, recon, **others) -> None:
    arrays = {"x": x, "codes": codes, "recon": recon, **others}
    save_file({key: value.contiguous() for key, value in arrays.items()}, folder / "expected.safetensors")


def saelens(out: Path, architecture: str, x) -> None:
    options = {"k": K} if architecture == "topk" else {"d_out": D} if "transcoder" in architecture else {}
    centred = architecture in ("standard", "jumprelu")
    config = {"d_in": D, "d_sae": F, "architecture": architecture, "apply_b_dec_to_input": centred, "metadata": HOOK}
    sae = SAE.from_dict(config | options)
    fill(sae.named_parameters())
    folder = out / f"saelens-{architecture.replace('_', '-')}"
    sae.save_model(folder)
    codes = sae.encode(x)
    expect(folder, x, codes, sae.decode(codes), forward=sae(x))


def dictionary_learning(out: Path, x) -> None:
    sae = BatchTopKSAE(D, F, K)
    fill(sae.named_parameters())
    sae.threshold.fill_(0.5)
    folder = out / "dl-batchtopk"
    folder.mkdir(parents=True)
    torch.save(sae.state_dict(), folder / "ae.pt")
    trainer = {"dict_class": "BatchTopKSAE", "activation_dim": D, "dict_size": F, "k": K, "layer": 2}
    trainer |= {"submodule_name": "resid_post_layer_2", "lm_name": "tiny"}
    (folder / "config.json").write_text(json.dumps({"trainer": trainer, "buffer": {}}))
    codes = sae.encode(x, use_threshold=True)
    expect(folder, x, codes, sae.decode(codes))


def gemma_scope(out: Path, x) -> None:
    shapes = {"W_enc": (D, F), "W_dec": (F, D), "b_enc": (F,), "b_dec": (D,), "threshold": (F,)}
    p = {name: torch.zeros(shape) for name, shape in shapes.items()}
    fill(p.items())
    folder = out / "gemma-scope"
    folder.mkdir(parents=True)
    np.savez(folder / "params.npz", **{name: value.numpy() for name, value in p.items()})
    z = x @ p["W_enc"] + p["b_enc"]
    codes = z.relu() * (z > p["threshold"])
    expect(folder, x, codes, codes @ p["W_dec"] + p["b_dec"])


def sparsify(out: Path, x) -> None:
    shapes = {"encoder.weight": (F, D), "encoder.bias": (F,), "W_dec": (F, D), "b_dec": (D,)}
    p = {name: torch.zeros(shape) for name, shape in shapes.items()}
    fill(p.items())
    folder = out / "sparsify"
    folder.mkdir(parents=True)
    save_file(p, folder / "sae.safetensors")
    config = {"activation": "topk", "expansion_factor": F // D, "normalize_decoder": True, "num_latents": F, "k": K}
    config |= {"multi_topk": False, "skip_connection": False, "transcode": False, "d_in": D}
    (folder / "cfg.json").write_text(json.dumps(config))
    z = ((x - p["b_dec"]) @ p["encoder.weight"].T + p["encoder.bias"]).relu()
    values, indices = z.topk(K)
    codes = torch.zeros_like(z).scatter(1, indices, values)
    expect(folder, x, codes, codes @ p["W_dec"] + p["b_dec"])


def main():
    out = Path(sys.argv[1])
    torch.manual_seed(0)
    x = torch.randn(24, D)
    with torch.no_grad():
        for architecture in ("standard", "topk", "jumprelu", "transcoder", "skip_transcoder"):
            saelens(out, architecture, x)
        for make in (dictionary_learning, gemma_scope, sparsify):
            make(out, x)


if __name__ == "__main__":
    main()
