"""``LanguageModel``: made anew, run over a dataset batch by batch, measured, and described."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import published
import pytest

from bilinear_jax.language import LanguageModel, MeanLoss, load
from bilinear_jax.nn.sae import SAE, SAEConfig
from bilinear_jax.nn.transformer import Transformer, TransformerConfig
from bilinear_jax.store.checkpoint import save_model, save_sae

CONFIG = TransformerConfig(n_layer=2, n_head=2, d_model=8, d_hidden=12, n_ctx=6, n_vocab=10, pad_id=9)
ROWS = np.random.default_rng(0).integers(0, 9, (7, 6))
ROWS[2, 4:] = ROWS[6, 1:] = 9  # padding; of the last row only position 0 is left


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return LanguageModel(published.make_params(CONFIG), CONFIG)


# A new model


def test_a_new_model_has_the_transformer_s_own_random_weights():
    lm = LanguageModel.init(CONFIG, jax.random.key(3))
    expected = Transformer(CONFIG).init(jax.random.key(3), jnp.zeros((1, 6), jnp.int32))["params"]
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-6), lm.params, expected)
    other = LanguageModel.init(CONFIG, jax.random.key(4))
    assert not np.allclose(lm.w_e, other.w_e) and not np.allclose(lm.w_l, other.w_l)
    assert lm.config == CONFIG and (lm.source, lm.tokenizer_source) == (None, None)
    assert lm.logits(ROWS).shape == (7, 6, 10)


# Batches


def test_the_last_batch_is_filled_up_with_rows_that_do_not_count(lm):
    found = list(lm.batches(ROWS, batch_size=3))
    assert [(one.first, one.rows) for one in found] == [(0, 3), (3, 3), (6, 1)]
    assert {(one.tokens.shape, one.mask.shape) for one in found} == {((3, 6), (3, 6))}
    assert {(one.tokens.dtype, one.mask.dtype) for one in found} == {(jnp.dtype("int32"), jnp.dtype(bool))}
    assert np.array_equal(np.concatenate([one.tokens[: one.rows] for one in found]), ROWS)
    mask = np.concatenate([one.mask[: one.rows] for one in found])
    assert np.array_equal(mask, (ROWS != 9) & (np.arange(6) > 0))
    assert not found[-1].mask[1:].any()


@pytest.mark.parametrize("batch_size", [1, 7, 100])
def test_a_batch_has_no_more_rows_than_the_dataset(lm, batch_size):
    found = list(lm.batches(ROWS, batch_size=batch_size))
    assert [one.rows for one in found] == ([1] * 7 if batch_size == 1 else [7])
    assert {one.tokens.shape for one in found} == {(min(batch_size, 7), 6)}


@pytest.mark.parametrize("kind", [bool, int, np.float32])
def test_a_mask_of_ones_own_may_count_position_0_and_padding(lm, kind):
    mask = np.random.default_rng(1).random(ROWS.shape) < 0.5
    assert mask[:, 0].any() and mask[ROWS == 9].any()
    found = list(lm.batches(ROWS, mask.astype(kind), batch_size=4))
    assert np.array_equal(np.concatenate([one.mask for one in found]), np.pad(mask, ((0, 1), (0, 0))))


def test_a_mapped_file_is_read_a_batch_at_a_time(lm, tmp_path):
    np.save(tmp_path / "rows.npy", np.concatenate([ROWS[:4], np.full((1, 6), 10)]).astype(np.uint16))
    batches = lm.batches(np.load(tmp_path / "rows.npy", mmap_mode="r"), batch_size=2)
    assert [next(batches).first, next(batches).first] == [0, 2]
    with pytest.raises(ValueError, match=r"token 10 lies outside the vocabulary 0 \.\.\. 9"):
        next(batches)


@pytest.mark.parametrize(
    ("tokens", "options", "message"),
    [
        (ROWS[0], {}, r"tokens of shape \(6,\) are not \[rows, seq\] with at least one of each"),
        (ROWS[:0], {}, r"tokens of shape \(0, 6\) are not \[rows, seq\] with at least one of each"),
        (ROWS[:, :0], {}, r"tokens of shape \(7, 0\) are not \[rows, seq\] with at least one of each"),
        (
            ROWS,
            {"token_mask": np.ones((7, 5), bool)},
            r"token_mask has shape \(7, 5\), but the tokens have shape \(7, 6\)",
        ),
        (ROWS, {"token_mask": np.full(ROWS.shape, 0.5)}, "weights are not supported"),
        (ROWS, {"batch_size": 0}, "batch_size must be at least 1, got 0"),
    ],
)
def test_what_is_no_dataset_is_told_before_the_first_batch(lm, tokens, options, message):
    with pytest.raises(ValueError, match=message):
        lm.batches(tokens, **options)  # and not only where the first batch is asked for


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (ROWS.astype(float), r"tokens of type float\d\d and shape .* are not integers"),
        (ROWS - 1, r"token -1 lies outside the vocabulary 0 \.\.\. 9"),
        (np.tile(ROWS, 2), "12 tokens do not fit the context of 6"),
    ],
)
def test_tokens_that_the_model_cannot_read(lm, tokens, message):
    with pytest.raises(ValueError, match=message):
        list(lm.batches(tokens))


def test_a_dataset_of_which_nothing_counts(lm):
    padding = np.full((3, 6), 9)
    for options in ({}, {"token_mask": np.zeros((3, 6), bool)}):
        batches = lm.batches(padding, batch_size=2, **options)
        assert [next(batches).rows, next(batches).rows] == [2, 1]  # it is known only after the last
        with pytest.raises(ValueError, match="no token counts: set token_mask to True"):
            next(batches)
        assert len(list(lm.batches(padding, batch_size=2, allow_no_token=True, **options))) == 2


def test_what_is_not_finite_is_told_by_the_rows_of_its_batch(lm):
    *_, last = lm.batches(ROWS, batch_size=5)
    assert str(last.not_finite()).startswith("the model or an SAE gives values that are not finite in rows 5 ... 6:")


@pytest.mark.parametrize("description", ["loss", None])
def test_the_progress_bar_says_what_is_done_and_counts_rows(lm, monkeypatch, description):
    made = []

    class Bar:
        def __init__(self, **options):
            self.options, self.rows = options, []
            made.append(self)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.rows.append("end")

        def update(self, rows):
            self.rows.append(rows)

    monkeypatch.setattr("tqdm.auto.tqdm", Bar)
    list(lm.batches(ROWS, batch_size=3, description=description))
    (bar,) = made
    assert bar.rows == [3, 3, 1, "end"]
    # disable=None shows a bar on a terminal and nowhere else
    disable = None if description else True
    assert bar.options == {"total": 7, "desc": description, "unit": "row", "disable": disable}


# The mean loss


@pytest.mark.parametrize("batch_size", [1, 3, 7])
@pytest.mark.parametrize("masked", [False, True])
def test_the_mean_loss_is_that_of_the_rows_one_by_one(lm, batch_size, masked):
    """Weighted by how many tokens each predicts, which differs from row to row: no mean of means."""
    mask = np.random.default_rng(1).random(ROWS.shape) < 0.6 if masked else np.array(lm.token_mask(ROWS))
    counts = mask[:, 1:].sum(axis=1)
    assert len(set(counts.tolist())) > 2
    losses = [float(lm.loss(row[None], some[None])) for row, some in zip(ROWS, mask, strict=True)]
    expected = sum(loss * count for loss, count in zip(losses, counts, strict=True) if count) / counts.sum()
    found = lm.mean_loss(ROWS, mask if masked else None, batch_size=batch_size)
    assert isinstance(found, MeanLoss) and isinstance(found.loss, float)
    assert found == (pytest.approx(expected, rel=1e-5), counts.sum())
    if not masked:
        assert found.loss == pytest.approx(float(lm.loss(ROWS)), rel=1e-5)


def test_lists_of_tokens_are_as_good_as_arrays(lm):
    assert lm.mean_loss(ROWS.tolist(), (ROWS > 0).tolist()) == lm.mean_loss(ROWS, ROWS > 0)
    np.testing.assert_array_equal(lm.logits(ROWS.tolist()), lm.logits(ROWS))
    for given, words in [
        ([[1, 2], [3]], r"rows of 1, 2 tokens are no array \[rows, seq\]: fill them up to one length"),
        ("Once upon", r"tokens are 'Once upon', but they must be integers .*: for a text, use lm.encode"),
        (["Once", "upon"], "for a text, use lm.encode"),
        (None, "tokens are None, but they must be integers"),
        ([[1.5, 2.0]], r"tokens are \[\[1.5, 2.0\]\], but they must be integers"),
    ]:
        for read in (lm.mean_loss, lm.logits):
            with pytest.raises(ValueError, match=words):
                read(given)


def test_a_loss_that_is_none(lm):
    first = np.zeros(ROWS.shape, bool)
    first[:, 0] = True
    with pytest.raises(
        ValueError, match="no token is predicted: set token_mask to True for at least one token after position 0"
    ):
        lm.mean_loss(ROWS, first)
    with pytest.raises(ValueError, match="no token counts"):
        lm.mean_loss(ROWS, ~np.ones(ROWS.shape, bool))
    broken = dataclasses.replace(lm, params=lm.params | {"w_u": lm.params["w_u"].at[:, 0].set(jnp.inf)})
    with pytest.raises(ValueError, match=r"not finite in rows 0 \.\.\. 2: check their parameters"):
        broken.mean_loss(ROWS, batch_size=3)


# Described


def test_the_summary_of_a_model_in_memory(lm):
    size = sum(leaf.size for leaf in jax.tree.leaves(lm.params))
    assert lm.summary().splitlines() == [
        f"a model in memory: 2 bilinear layers, {size:,} parameters",
        "d_model 8, d_hidden 12, 2 heads, context 6, vocabulary 10",
        "sites at layers 0 ... 1: resid_pre, attn_out, scores, pattern, resid_mid, mlp_in, mlp_out, resid_post",
    ]


@pytest.mark.parametrize(
    ("change", "kind"), [({"gate": "silu"}, "silu"), ({"gate": "relu", "bilinear": False}, "relu"), ({}, "bilinear")]
)
def test_the_summary_names_the_kind_of_mlp(change, kind):
    config = dataclasses.replace(CONFIG, **change)
    assert f": 2 {kind} layers, " in LanguageModel(published.make_params(config), config).summary()


def test_the_summary_of_a_folder_says_what_all_was_trained_on(lm, tmp_path):
    text = {"sources": [{"name": "a.txt", "bytes": 3}, {"name": "b.txt", "bytes": 4}], "n_documents": 5, "n_tokens": 67}
    save_model(tmp_path / "model", CONFIG, lm.params, origin={"text": text})
    for site, origin in (("mlp_in", {"text": "stories"}), ("mlp_out", {})):
        sae = SAE.init(SAEConfig(site, 1, d_model=8, expansion=2, k=3), jax.random.key(0))
        save_sae(tmp_path / "model" / "scope" / sae.name, sae, origin=origin)
    first, *_, trained, of_input, of_output = load(tmp_path / "model").summary().splitlines()
    assert first.startswith(f"{tmp_path / 'model'}: 2 bilinear layers, ")
    assert trained == "trained on: a.txt, b.txt: 5 documents, 67 tokens"
    assert of_input == "SAE 1-mlp-in-x2-k3, trained on: stories"
    assert of_output == "SAE 1-mlp-out-x2-k3, trained on: not known: its files do not say"


def test_the_summary_of_the_shipped_model():
    lines = load("ts-nano").summary().splitlines()
    assert lines[1] == "d_model 256, d_hidden 1024, 4 heads, context 256, vocabulary 4096 (ts-nano)"
    assert lines[3] == "trained on: TinyStories, 12955 stories, 2669724 tokens"
    names = ("2-mlp-in-x4-k20", "2-mlp-out-x4-k20", "2-resid-mid-x4-k20")
    sources = "tinystories.txt.gz: 13455 documents, 2669724 tokens"
    assert lines[4:] == [f"SAE {name}, trained on: {sources}" for name in names]
