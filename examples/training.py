# %% [markdown]
# # Training a language model and its SAEs
#
# This script made `ts-nano`, the model that ships with the package. Give it a text file with `<|endoftext|>` between
# documents:
#
#     python examples/training.py stories.txt.gz --out runs/ts-nano
#
# Training took 49 minutes for the language model and 55 for the SAEs, on 2 CPU cores beside other work. If the script
# is interrupted, run the same command again: every stage goes on where it was. It leaves the folder
# `runs/ts-nano/model`, which `bilinear_jax.load` reads, with SAEs, a corpus sampled from the model, top activations and
# a card.
#
# To train on a text of your own you do not need this script: `bilinear-jax train lm` and `bilinear-jax train sae` are
# its first stage.

# %%
import argparse
import json
import os
from pathlib import Path

import jax
import numpy as np
from tqdm.auto import tqdm

import bilinear_jax as bj
from bilinear_jax.measure.activations import save_top_activations
from bilinear_jax.measure.evaluation import table
from bilinear_jax.nn.generation import generate
from bilinear_jax.store.checkpoint import add_checksums
from bilinear_jax.store.documents import read_documents
from bilinear_jax.store.files import atomic_file
from bilinear_jax.store.tokens import open_tokens
from bilinear_jax.training.batches import held_out_rows
from bilinear_jax.training.recipes import read_recipe

# %% Options of the command line
parser = argparse.ArgumentParser(description="Train a bilinear language model and SAEs around one of its MLPs.")
parser.add_argument("text", type=Path, help="text file, gzipped or not, documents separated by <|endoftext|>")
parser.add_argument("--out", type=Path, default=Path("runs/ts-nano"), help="folder of the run")
parser.add_argument("--recipe", default="ts-nano", help="recipe of the language model and of the SAEs")
for kind in ("lm", "sae"):
    help = f"change a field of the {kind} recipe, for instance recipe.steps 100"
    parser.add_argument(f"--{kind}", nargs=2, action="append", default=[], metavar=("FIELD", "VALUE"), help=help)
parser.add_argument("--corpus-rows", type=int, default=4096, help="rows of n_ctx tokens to sample from the model")
options = parser.parse_args()

# %% [markdown]
# ## The language model and its SAEs
# `train_language` trains a tokenizer and the language model. `train_saes` trains all SAEs of the recipe in one pass of
# that model. Both save what they made as it ships.

# %%
changed, sae_changed = dict(options.lm), dict(options.sae)
recipe, sae_recipe = read_recipe("lm", options.recipe, changed), read_recipe("sae", options.recipe, sae_changed)
if recipe.model is not None and recipe.model.n_vocab > 2**16:
    parser.error(f"n_vocab is {recipe.model.n_vocab}, but the corpus has token ids of 16 bits: give at most {2**16}")
folder = bj.train_language(options.recipe, options.text, options.out, overrides=changed)
bj.train_saes(options.recipe, options.text, options.out, overrides=sae_changed)
lm = bj.load(folder)
saes = [bj.load_sae(folder, c.site, c.layer, c.expansion, c.k, c.tag) for c in sae_recipe.saes.configs(lm.config)]

# %% [markdown]
# ## A corpus
# Features are described by texts on which they fire. These texts are sampled from the model itself, so that no story of
# the training text has to be shipped.

# %%
corpus_file = folder / "corpus.npy"
if not corpus_file.exists():
    batch, parts = 256, []
    for start in tqdm(range(0, options.corpus_rows, batch), desc="corpus", disable=None, unit="batch"):
        prompt = np.full((batch, 1), lm.config.pad_id, np.int32)
        key = jax.random.fold_in(jax.random.key(0), start)
        new = generate(lm.config, lm.params, prompt, max_length=lm.config.n_ctx - 1, key=key)
        parts.append(np.concatenate([prompt, np.asarray(new)], axis=1).astype(np.uint16))
    with atomic_file(corpus_file) as partial, open(partial, "wb") as file:
        np.save(file, np.concatenate(parts)[: options.corpus_rows])

# %% [markdown]
# ## Top activations
# The 20 largest activations of every feature of every SAE, in one pass over the corpus.

# %%
top_file = folder / "top-activations.safetensors"
if not top_file.exists():
    save_top_activations(top_file, bj.top_activations(lm, saes, bj.load_corpus(folder), k=20))
add_checksums(folder)  # of these two as well

# %% [markdown]
# ## The card
# Scores on stories that were not trained on. Some stories of this dataset have garbled quotation marks; they are
# counted apart.

# %%
tokens = open_tokens(options.out / "tokens", lm.tokenizer)
held_out = list(read_documents(options.text))[-recipe.data.held_out :]
garbled = [story for story in held_out if "â€" in story]
clean = [story for story in held_out if "â€" not in story]


def encoded(stories):
    """The tokens of the stories, one after another."""
    return np.concatenate([lm.tokenizer(story)["input_ids"] for story in stories])


def minutes(run):
    """How long a run trained, by its own log."""
    last = (options.out / run / "metrics.jsonl").read_text().splitlines()[-1]
    return round(json.loads(last)["seconds"] / 60)


rows = held_out_rows(encoded(clean), lm.config.n_ctx)
loss = lm.mean_loss(rows).loss
loss_a_character = loss * len(encoded(clean)) / sum(map(len, clean))
of_garbled = ""
if garbled:
    garbled_loss = lm.mean_loss(held_out_rows(encoded(garbled), lm.config.n_ctx)).loss
    of_garbled = f" The {len(garbled)} other held-out stories have\n  garbled quotation marks, as none of the training "
    of_garbled += f"text has: {garbled_loss:.3f} nats a token."
an_update = recipe.recipe.batch_size * lm.config.n_ctx
samples = "\n\n".join(
    "> " + lm.generate(prompt, max_length=lm.config.n_ctx // 2, temperature=0.7, seed=seed).replace("\n", "\n> ")
    for seed, prompt in enumerate(["Once upon a time", "Tom and Sue", "The little dog did not"])
)
(folder / "card.md").write_text(f"""# {options.recipe}

A bilinear transformer that writes children's stories, with {len(saes)} SAEs, small enough to ship with `bilinear_jax`.

- Architecture: {lm.config}
- Recipe: {recipe.recipe}, {an_update} tokens an update; SAEs: {sae_recipe.recipe}
- Command: `python examples/training.py tinystories.txt.gz --out runs/{options.recipe}`
- Cost: {minutes("language")} minutes of training for the language model and {minutes("saes")} for the SAEs, on
  {os.cpu_count()} CPU cores, in float32 (wall clock, beside other work)
- Training text: {tokens.n_documents - len(held_out)} stories of TinyStories (Eldan and Li 2023), {len(tokens.tokens):,}
  tokens, seen {recipe.recipe.steps * an_update / len(tokens.tokens):.1f} times. The stories are not in the package.
- Tokenizer: byte-level BPE of {lm.config.n_vocab:,} pieces, trained on the same text.
- Held-out loss: {loss:.3f} nats a token, {loss_a_character:.3f} nats a character, on {len(clean)} stories that were
  not trained on ({rows.size:,} tokens in rows of {lm.config.n_ctx}).{of_garbled}
- Corpus: {options.corpus_rows} rows of {lm.config.n_ctx} tokens sampled from the model itself at temperature 1, so it
  is no one's text, and it is what the top activations are taken from.
- Weights are stored in {recipe.run.weights}; all numbers here are measured on the stored weights.

SAEs, on the same held-out stories (position 0 left out):

{table(bj.evaluate_saes(lm, saes, rows, correlation_ks=(1, 2)))}

nmse: sum |x - x_hat|^2 / sum |x|^2. Explained variance: the same about the mean, from 1. Loss added:
(patched - clean) / clean. Loss recovered: 1 - (patched - clean) / (zeroed - clean). Dead: share of features that no
token of these stories activates. r: low-rank correlation, of the SAEs that read an MLP's output.

Samples (temperature 0.7, the prompt included):

{samples}
""")
print((folder / "card.md").read_text())
