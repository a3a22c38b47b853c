"""Documents to token windows: a tokenizer trained on the text, one flat token array, batches by step number.

Every batch is a pure function of (tokens, n_ctx, batch_size, seed, step), so a run that resumes at a step
continues with exactly the batches that it would have seen.
"""

import dataclasses
import gzip
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Int

END_OF_TEXT = "<|endoftext|>"


def read_documents(path: str | Path) -> list[str]:
    """The documents of a UTF-8 text file (gzipped if it ends in .gz), separated by ``<|endoftext|>``."""
    path = Path(path)
    content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    documents = [document.strip() for document in content.decode("utf-8").split(END_OF_TEXT)]
    documents = [document for document in documents if document]
    if not documents:
        raise ValueError(f"{path} holds no documents: expected text, with {END_OF_TEXT} between documents")
    return documents


def train_tokenizer(documents: Iterable[str], n_vocab: int):
    """A lossless byte-level BPE tokenizer; ``<|endoftext|>`` is id 0 and is put first in every text.

    Returns a ``tokenizers.Tokenizer``. Decoding gives back the text, byte for byte.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=n_vocab,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    if tokenizer.get_vocab_size() != n_vocab:
        raise ValueError(f"the text supports only {tokenizer.get_vocab_size()} pieces; ask for at most that many")
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{END_OF_TEXT} $A", special_tokens=[(END_OF_TEXT, 0)]
    )
    return tokenizer


def save_tokenizer(tokenizer, folder: str | Path) -> None:
    """Write ``tokenizer.json``, and ``tokenizer_config.json``, which names the token that begins, ends and pads."""
    folder = Path(folder)
    special = {name: END_OF_TEXT for name in ("bos_token", "eos_token", "pad_token")}
    (folder / "tokenizer_config.json").write_text(json.dumps(special, indent=2) + "\n")
    tokenizer.save(str(folder / "tokenizer.json"))


def encode_documents(tokenizer, documents: Sequence[str]) -> Int[np.ndarray, " tokens"]:
    """All documents as one flat token array, each led by the tokenizer's own first token."""
    encoded = tokenizer.encode_batch_fast(list(documents))
    return np.concatenate([np.asarray(document.ids, dtype=np.int32) for document in encoded])


@dataclasses.dataclass(frozen=True)
class Windows:
    """Shuffled windows of a token stream: every epoch cuts the stream at another offset and in another order."""

    tokens: np.ndarray  # [tokens], the stream
    n_ctx: int  # length of a window
    batch_size: int  # windows a batch
    seed: int = 0

    def __post_init__(self):
        if self.batches_per_epoch < 1:
            raise ValueError(
                f"{len(self.tokens)} tokens are too few for one batch of {self.batch_size} windows of {self.n_ctx}: "
                "give more text, or lower batch_size or n_ctx"
            )

    @property
    def batches_per_epoch(self) -> int:
        return (len(self.tokens) // self.n_ctx - 1) // self.batch_size

    def batch_at(self, step: int) -> Int[np.ndarray, "batch_size n_ctx"]:
        """The batch of training step ``step``, counted from 0."""
        epoch, position = divmod(step, self.batches_per_epoch)
        random = np.random.default_rng([self.seed, epoch])
        offset = random.integers(self.n_ctx)
        order = random.permutation(self.batches_per_epoch * self.batch_size)
        rows = order[position * self.batch_size : (position + 1) * self.batch_size]
        starts = offset + rows * self.n_ctx
        return self.tokens[starts[:, None] + np.arange(self.n_ctx)].astype(np.int32)


def held_out_rows(tokens: np.ndarray, n_ctx: int) -> Int[np.ndarray, "rows n_ctx"]:
    """The stream cut into consecutive full rows, without shuffling."""
    rows = len(tokens) // n_ctx
    if rows == 0:
        raise ValueError(f"{len(tokens)} tokens do not fill one row of {n_ctx}: hold out more text")
    return np.asarray(tokens[: rows * n_ctx], dtype=np.int32).reshape(rows, n_ctx)
