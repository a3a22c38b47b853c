# %% [markdown]
# # Training a language model and its SAEs
#
# How the model that ships with the package, `ts-nano`, was made. Give it a text file with `<|endoftext|>`
# between documents:
#
#     python examples/training.py stories.txt.gz --out runs/ts-nano
#
# Every stage goes on where it was interrupted: run the same command again.

# %%
import argparse
from pathlib import Path

from tokenizers import Tokenizer

from bilinear_jax.nn.transformer import TransformerConfig
from bilinear_jax.training.data import encode_documents, held_out_rows, read_documents, train_tokenizer
from bilinear_jax.training.language import LanguageRecipe, train_language

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("text", type=Path, help="text file, gzipped or not, documents separated by <|endoftext|>")
parser.add_argument("--out", type=Path, default=Path("runs/ts-nano"), help="folder of the run")
parser.add_argument("--held-out", type=int, default=500, help="documents at the end that are not trained on")
parser.add_argument("--steps", type=int, default=4000, help="updates of the language model, 4096 tokens each")
options = parser.parse_args()

# %% The tokenizer: byte-level BPE, trained on the text itself.
documents = read_documents(options.text)
training, held_out = documents[: -options.held_out], documents[-options.held_out :]
options.out.mkdir(parents=True, exist_ok=True)
tokenizer_file = options.out / "tokenizer.json"
if not tokenizer_file.exists():
    train_tokenizer(training, n_vocab=4096).save(str(tokenizer_file))
tokenizer = Tokenizer.from_file(str(tokenizer_file))

# %% The language model: 4 bilinear layers, 6.3 million parameters.
config = TransformerConfig(
    n_layer=4, n_head=4, d_model=256, d_hidden=1024, n_ctx=256, n_vocab=4096, tokenizer="ts-nano", pad_id=0
)
params = train_language(
    config,
    LanguageRecipe(steps=options.steps),
    encode_documents(tokenizer, training),
    held_out_rows(encode_documents(tokenizer, held_out), config.n_ctx),
    options.out / "language",
    evaluate_every=500,
)
