"""Runs of recipes that several tests share."""

import sys

import numpy as np
import pytest
from small_recipes import NO_SAMPLES, RUN, TINY, WeightsAndBiases

from bilinear_jax.training.runs import train_language


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """150 documents of 30 of 12 words."""
    random = np.random.default_rng(0)
    words = ["the", "cat", "sat", "on", "a", "mat", "and", "saw", "one", "dog", "who", "ran"]
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("<|endoftext|>".join(" ".join(random.choice(words, 30)) for _ in range(150)))
    return path


@pytest.fixture(scope="module")
def run(text, tmp_path_factory):
    """A run of ts-nano, tiny."""
    out = tmp_path_factory.mktemp("run")
    kept = {"run.save_every": "1", "run.keep": "1", "run.keep_every": "2", "run.log_every": "2"}
    train_language("ts-nano", text, out, overrides=TINY | RUN | kept)
    return out


@pytest.fixture(scope="module")
def swiglu(run, text, tmp_path_factory):
    """A run of ts as a SwiGLU model, with the tokenizer of the other run, twice, and what it sent to wandb."""
    out, stub = tmp_path_factory.mktemp("swiglu"), WeightsAndBiases()
    overrides = TINY | RUN | NO_SAMPLES | {"model.gate": "silu", "data.tokenizer": str(run / "tokenizer.json")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "wandb", stub)
        for _ in range(2):
            train_language("ts", text, out, overrides=overrides, wandb="project")
    return out, stub
