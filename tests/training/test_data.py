"""Documents, tokenizer and windows."""

import gzip

import numpy as np
import pytest

from bilinear_jax.checkpoint import load_tokenizer
from bilinear_jax.training.data import (
    Windows,
    encode_documents,
    held_out_rows,
    read_documents,
    save_tokenizer,
    train_tokenizer,
)

TEXT = ["The cat sat.\n\nIt purred — loudly!", "A dog ran 12 miles; naïve dog.", "The end of the cat and the dog."] * 5


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXT, n_vocab=300)


def test_the_tokenizer_is_lossless_and_leads_with_end_of_text(tokenizer):
    for text in [*TEXT, "unseen 字 \t\r\n  spaces ", ""]:
        ids = tokenizer.encode(text).ids
        assert ids[0] == 0 == tokenizer.token_to_id("<|endoftext|>")
        assert tokenizer.decode(ids[1:]) == text
    assert tokenizer.get_vocab_size() == 300


def test_a_saved_tokenizer_knows_its_special_tokens(tokenizer, tmp_path):
    save_tokenizer(tokenizer, tmp_path)
    loaded = load_tokenizer(str(tmp_path), None)
    assert (loaded.bos_token_id, loaded.eos_token_id, loaded.pad_token_id) == (0, 0, 0)
    assert loaded(TEXT[0])["input_ids"] == tokenizer.encode(TEXT[0]).ids


def test_a_vocabulary_that_the_text_cannot_fill_is_an_error():
    with pytest.raises(ValueError, match="the text supports only"):
        train_tokenizer(["ab"], n_vocab=5000)


def test_the_stream_is_the_documents_in_order(tokenizer):
    stream = encode_documents(tokenizer, TEXT[:2])
    assert list(stream) == tokenizer.encode(TEXT[0]).ids + tokenizer.encode(TEXT[1]).ids


def test_documents_plain_and_gzipped(tmp_path):
    text = " one \n<|endoftext|>two<|endoftext|>\n  \n<|endoftext|>"
    (tmp_path / "a.txt").write_text(text)
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(text.encode()))
    assert read_documents(tmp_path / "a.txt") == read_documents(tmp_path / "a.txt.gz") == ["one", "two"]
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(ValueError, match="holds no documents"):
        read_documents(tmp_path / "empty.txt")


def test_an_epoch_shows_every_window_at_most_once_and_almost_all_tokens():
    windows = Windows(np.arange(1003), n_ctx=10, batch_size=7, seed=3)
    epoch = [windows.batch_at(step) for step in range(windows.batches_per_epoch)]
    flat = np.concatenate(epoch).ravel()
    assert len(set(flat)) == len(flat) >= 0.9 * 1003
    assert all(np.all(np.diff(row) == 1) for batch in epoch for row in batch)


def test_batches_are_a_function_of_the_step_and_differ_between_epochs():
    windows = Windows(np.arange(500), n_ctx=10, batch_size=4, seed=1)
    later = windows.batches_per_epoch
    np.testing.assert_array_equal(windows.batch_at(later), Windows(np.arange(500), 10, 4, 1).batch_at(later))
    assert np.any(windows.batch_at(0) != windows.batch_at(later))
    assert np.any(windows.batch_at(0) != Windows(np.arange(500), 10, 4, 2).batch_at(0))


def test_too_little_text_is_an_error():
    with pytest.raises(ValueError, match="30 tokens are too few for one batch of 4 windows of 10"):
        Windows(np.arange(30), n_ctx=10, batch_size=4)
    with pytest.raises(ValueError, match="do not fill one row of 10"):
        held_out_rows(np.arange(9), 10)
    np.testing.assert_array_equal(held_out_rows(np.arange(7), 3), [[0, 1, 2], [3, 4, 5]])
