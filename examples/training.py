# %% [markdown]
# # Training a language model and its SAEs
#
# How the model that ships with the package, `ts-nano`, was made. Give it a text file with `<|endoftext|>`
# between documents:
#
#     python examples/training.py stories.txt.gz --out runs/ts-nano
#
# Every stage goes on where it was interrupted: run the same command again. What ends up in `runs/ts-nano/model` is a
# folder that `bilinear_jax.load` reads, with SAEs, a corpus sampled from the model, top activations and a card.

# %%
import argparse
import json
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from tokenizers import Tokenizer
from tqdm.auto import tqdm

import bilinear_jax as bj
from bilinear_jax.activations import save_top_activations
from bilinear_jax.checkpoint import save_model, save_sae
from bilinear_jax.evaluation import evaluate_sae
from bilinear_jax.training.data import (
    encode_documents,
    held_out_rows,
    read_documents,
    save_tokenizer,
    train_tokenizer,
)
from bilinear_jax.training.language import LanguageRecipe, train_language
from bilinear_jax.training.sae import SAERecipe, train_saes

parser = argparse.ArgumentParser(description="Train a bilinear language model and SAEs around one of its MLPs.")
parser.add_argument("text", type=Path, help="text file, gzipped or not, documents separated by <|endoftext|>")
parser.add_argument("--out", type=Path, default=Path("runs/ts-nano"), help="folder of the run")
parser.add_argument("--held-out", type=int, default=500, help="documents at the end that are not trained on")
parser.add_argument("--steps", type=int, default=3300, help="updates of the language model, 4096 tokens each")
parser.add_argument("--sae-steps", type=int, default=1000, help="updates of the SAEs, 8192 tokens each")
parser.add_argument("--layer", type=int, default=2, help="the layer whose MLP gets SAEs")
parser.add_argument("--corpus-rows", type=int, default=4096, help="rows of 256 tokens to sample from the model")
options = parser.parse_args()

# %% The tokenizer: byte-level BPE, trained on the text itself.
documents = read_documents(options.text)
training, held_out = documents[: -options.held_out], documents[-options.held_out :]
options.out.mkdir(parents=True, exist_ok=True)
tokenizer_file = options.out / "tokenizer.json"
if not tokenizer_file.exists():
    save_tokenizer(train_tokenizer(training, n_vocab=4096), options.out)
tokenizer = Tokenizer.from_file(str(tokenizer_file))
tokens = encode_documents(tokenizer, training)

# %% The language model: 4 bilinear layers, 6.3 million parameters.
config = bj.TransformerConfig(
    n_layer=4, n_head=4, d_model=256, d_hidden=1024, n_ctx=256, n_vocab=4096, tokenizer="ts-nano", pad_id=0
)
recipe = LanguageRecipe(
    steps=options.steps, batch_size=16, optimizer="muon", lr=0.02, embed_lr=0.01, warmup=100, decay="cosine"
)
rows = held_out_rows(encode_documents(tokenizer, held_out), config.n_ctx)
config, params = train_language(config, recipe, tokens, rows, options.out / "language", evaluate_every=500)

# %% Saved as it ships, in bfloat16; everything below is measured on what was saved.
origin = {
    "made by": "examples/training.py",
    "recipe": f"{recipe}",
    "text": f"TinyStories, {len(training)} stories, {len(tokens)} tokens",
}
folder = options.out / "model"
if not folder.exists():
    save_model(folder, config, params, tokenizer=options.out, origin=origin, dtype=jnp.bfloat16)
lm = bj.load(folder)

# %% SAEs around one MLP, all trained in the same pass.
sites = ("mlp_in", "mlp_out", "resid_mid")
sae_configs = [bj.SAEConfig(site, options.layer, config.d_model, expansion=4, k=20) for site in sites]
sae_recipe = SAERecipe(steps=options.sae_steps)
for sae in train_saes(lm, sae_configs, sae_recipe, tokens, options.out / "saes"):
    if not (folder / "scope" / sae.name).exists():
        save_sae(folder / "scope" / sae.name, sae, origin=origin | {"recipe": f"{sae_recipe}"}, dtype=jnp.bfloat16)
saes = [bj.load_sae(folder, site, options.layer) for site in sites]

# %% A corpus to look for top activations in, sampled from the model: no story of the training text is in it.
corpus_file = folder / "corpus.npy"
if not corpus_file.exists():
    batch, parts = 256, []
    for start in tqdm(range(0, options.corpus_rows, batch), desc="corpus", unit="batch"):
        prompt = np.full((batch, 1), config.pad_id, np.int32)
        key = jax.random.fold_in(jax.random.key(0), start)
        new = bj.generation.generate(lm.config, lm.params, prompt, max_length=config.n_ctx - 1, key=key)
        parts.append(np.concatenate([prompt, np.asarray(new)], axis=1).astype(np.uint16))
    np.save(corpus_file, np.concatenate(parts)[: options.corpus_rows])

# %% The top activations of all features, in one pass over the corpus.
top_file = folder / "top-activations.safetensors"
if not top_file.exists():
    save_top_activations(top_file, bj.top_activations(lm, saes, bj.checkpoint.corpus(folder), k=20))

# %% The card. Stories whose quotation marks were garbled before they came to us are counted apart.
garbled = [story for story in held_out if "â€" in story]
clean = [story for story in held_out if "â€" not in story]


def held_out_loss(stories):
    """Nats a token and a character over the stories, packed in rows of n_ctx tokens."""
    packed = held_out_rows(encode_documents(tokenizer, stories), config.n_ctx)
    losses = [float(lm.loss(row, np.ones_like(row))) for row in np.split(packed, len(packed))]
    characters = sum(map(len, stories)) / len(encode_documents(tokenizer, stories))
    return np.mean(losses), np.mean(losses) / characters, packed


loss, loss_a_character, clean_rows = held_out_loss(clean)
garbled_loss = f"{held_out_loss(garbled)[0]:.3f}" if garbled else "none there"


def minutes(run):
    """How long a run trained, by its own log."""
    last = (options.out / run / "metrics.jsonl").read_text().splitlines()[-1]
    return round(json.loads(last)["seconds"] / 60)


table = "\n".join(
    f"| {sae.name} | {m.nmse:.3f} | {m.l0:.1f} | {m.loss_added:.4f} | {m.loss_recovered:.3f} | {m.dead:.3f} |"
    for sae in saes
    for m in [evaluate_sae(lm, sae, clean_rows)]
)
samples = "\n\n".join(
    "> " + lm.generate(prompt, max_length=120, temperature=0.7, seed=seed).replace("\n", "\n> ")
    for seed, prompt in enumerate(["Once upon a time", "Tom and Sue", "The little dog did not"])
)
(folder / "card.md").write_text(f"""# ts-nano

A bilinear transformer that writes children's stories, with three SAEs around the MLP of layer {options.layer}, small
enough to ship with `bilinear_jax`.

- Architecture: {config}
- Recipe: {recipe}, {recipe.batch_size * config.n_ctx} tokens an update; SAEs: {sae_recipe}
- Command: `python examples/training.py tinystories.txt.gz --out runs/ts-nano`
- Cost: {minutes("language")} minutes of training for the language model and {minutes("saes")} for the SAEs, on
  {os.cpu_count()} CPU cores, in float32 (wall clock, beside other work)
- Training text: {len(training)} stories of TinyStories (Eldan and Li 2023), {len(tokens):,} tokens, seen
  {options.steps * recipe.batch_size * config.n_ctx / len(tokens):.1f} times. The stories are not in the package.
- Tokenizer: byte-level BPE of 4,096 pieces, trained on the same text.
- Held-out loss: {loss:.3f} nats a token, {loss_a_character:.3f} nats a character, on {len(clean)} stories that were
  not trained on ({clean_rows.size:,} tokens in rows of {config.n_ctx}). The {len(garbled)} other held-out stories have
  garbled quotation marks, as none of the training text has: {garbled_loss} nats a token.
- Corpus: {options.corpus_rows} rows of {config.n_ctx} tokens sampled from the model itself at temperature 1, so it is
  no one's text, and it is what the top activations are taken from.
- Weights are stored in bfloat16; all numbers here are measured on the stored weights.

SAEs, on the same held-out stories (position 0 left out):

| SAE | nmse | l0 | loss added | loss recovered | dead |
|---|---|---|---|---|---|
{table}

nmse: sum |x - x_hat|^2 / sum |x|^2. Loss added: (patched - clean) / clean. Loss recovered:
1 - (patched - clean) / (zeroed - clean). Dead: share of features that no token of these stories activates.

Samples (temperature 0.7, the prompt included):

{samples}
""")
print((folder / "card.md").read_text())
