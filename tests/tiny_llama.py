"""A tiny random Llama with a tokenizer, as Hugging Face stores it, and a text that it can read."""

import json
import shutil
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from bilinear_jax.store.tokenizers import save_tokenizer, train_tokenizer

FAMILY = Path(__file__).parent / "data" / "families" / "llama-tied" / "model"
TEXT = " ".join(f"The {a} {b} saw {c} things." for a in ("big", "old") for b in ("dog", "cat") for c in range(9))
N_VOCAB = 290


def write(folder: Path) -> Path:
    """Write the model of the golden case, with embeddings of ``N_VOCAB`` tokens in place of its own."""
    shutil.copytree(FAMILY, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": N_VOCAB}))
    weights, name = load_file(folder / "model.safetensors"), "model.embed_tokens.weight"
    rows = np.random.default_rng(0).normal(size=(N_VOCAB, weights[name].shape[1])) * 0.3
    save_file(weights | {name: rows.astype(np.float32)}, folder / "model.safetensors")
    save_tokenizer(train_tokenizer([TEXT] * 3, N_VOCAB), folder)
    return folder
