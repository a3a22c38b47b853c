"""Mistakes that a user makes with the model that ships: each an error that names the mend, never a wrong number."""

import numpy as np
import pytest

import bilinear_jax as bj
from bilinear_jax.cli import main


@pytest.fixture(scope="module")
def lm():
    return bj.load("ts-nano")


@pytest.fixture(scope="module")
def tracer(lm):
    return bj.Tracer(lm, layer=2)


TOKENS = np.array([[0, 5, 6, 7]])


def test_ids_that_32_bits_would_wrap_are_outside_the_vocabulary(lm):
    wide = TOKENS + np.array([0, 0, 0, 2**32])
    with pytest.raises(ValueError, match="outside the vocabulary"):
        lm.logits(wide)
    with pytest.raises(ValueError, match="outside the vocabulary"):
        bj.generation.generate(lm.config, lm.params, wide, max_length=2)


def test_features_that_32_bits_would_wrap_are_out_of_range(tracer):
    with pytest.raises(IndexError, match=r"are 0 \.\.\. 1023"):
        tracer.q(2**32 + 3)


@pytest.mark.parametrize("shape", [(4, 4), (1, 3), (4,)])
def test_a_mask_of_another_shape(lm, shape):
    with pytest.raises(ValueError, match="they must agree"):
        lm.loss(TOKENS, token_mask=np.ones(shape))


def test_the_loss_of_no_tokens_is_not_a_perfect_one(lm):
    assert np.isnan(lm.loss(TOKENS, token_mask=np.zeros(TOKENS.shape)))


@pytest.mark.parametrize("sites", ["mlp_in", ("mlp_in", 2)])
def test_sites_are_a_list(lm, sites):
    with pytest.raises(ValueError, match="sites are a list"):
        lm.capture(TOKENS, sites)


def test_an_sae_itself_is_no_edit(lm, tracer):
    with pytest.raises(ValueError, match=r"lambda x: sae\(x\)\[0\]"):
        lm.loss(TOKENS, edits={("mlp_out", 2): tracer.out})


def test_numbers_that_are_none(lm):
    with pytest.raises(ValueError, match="attn_scale must be a finite number"):
        bj.load("ts-nano", attn_scale=float("nan"))
    with pytest.raises(ValueError, match="temperature must be 0"):
        lm.generate("Once", temperature=float("nan"))


def test_a_submatrix_is_of_one_feature(tracer):
    with pytest.raises(ValueError, match="name one output feature"):
        tracer.interaction_submatrix([1, 2])


def test_no_contexts_and_no_batch(lm, tracer):
    with pytest.raises(ValueError, match="at least 1; got 0"):
        bj.Visualizer(lm, tracer.out).contexts(3, k=0)
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        bj.evaluation.evaluate_sae(lm, tracer.out, TOKENS, batch_size=0)


def test_a_tour_that_cannot_be_made_leaves_no_folder(tmp_path, capsys):
    assert main(["tour", "--layer", "1", "--out", str(tmp_path / "new")]) == 1
    assert not (tmp_path / "new").exists()
    assert "2-mlp-in-x4-k20" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    assert main(["tour", "--out", str(tmp_path / "file")]) == 1
    assert "name another folder with --out" in capsys.readouterr().err
