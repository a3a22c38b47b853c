"""Mistakes that a user makes with the model that ships: each an error that names the mend, never a wrong number."""

import dataclasses
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bilinear_jax as bj
from bilinear_jax.commands.main import main
from bilinear_jax.measure.activations import row_codes
from bilinear_jax.nn.generation import generate


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
        generate(lm.config, lm.params, wide, max_length=2)


def test_features_that_32_bits_would_wrap_are_out_of_range(tracer):
    with pytest.raises(bj.UnknownNameError, match=r"no feature 4294967299 in SAE .*: choose one of 0 \.\.\. 1023"):
        tracer.q(2**32 + 3)


@pytest.mark.parametrize("shape", [(4, 4), (1, 3), (4,)])
def test_a_mask_of_another_shape(lm, shape):
    with pytest.raises(ValueError, match="give one value a token"):
        lm.loss(TOKENS, token_mask=np.ones(shape))


def test_the_loss_of_no_tokens_is_not_a_perfect_one(lm):
    assert np.isnan(lm.loss(TOKENS, token_mask=np.zeros(TOKENS.shape)))


@pytest.mark.parametrize("value", [0.5, 2, np.nan])
def test_a_mask_of_weights(lm, tracer, value):
    mask = np.ones(TOKENS.shape, np.float32)
    assert lm.loss(TOKENS, token_mask=mask) == lm.loss(TOKENS, token_mask=mask > 0)
    mask[0, -1] = value
    with pytest.raises(ValueError, match="weights are not supported"):
        lm.loss(TOKENS, token_mask=mask)
    with pytest.raises(ValueError, match="weights are not supported"):
        bj.evaluation.evaluate_sae(lm, tracer.out, TOKENS, mask)


@pytest.mark.parametrize("sites", ["mlp_in", ("mlp_in", 2)])
def test_sites_are_a_list(lm, sites):
    with pytest.raises(ValueError, match=re.escape(f"but it must be a list of sites: write [{sites!r}]")):
        lm.capture(TOKENS, sites)


def test_an_sae_itself_is_no_edit(lm, tracer):
    with pytest.raises(ValueError, match=r"lambda x: sae\(x\)\[0\]"):
        lm.loss(TOKENS, edits={("mlp_out", 2): tracer.out})


def test_numbers_that_are_none(lm):
    with pytest.raises(ValueError, match="attn_scale must be a finite number"):
        bj.load("ts-nano", attn_scale=float("nan"))
    with pytest.raises(ValueError, match="finite number in float32, got 1e\\+300"):
        bj.load("ts-nano", attn_scale=1e300)
    with pytest.raises(ValueError, match="temperature must be 0"):
        lm.generate("Once", temperature=float("nan"))
    with pytest.raises(ValueError, match=r"seed must lie in 0 \.\.\. 2\^32 - 1, got 4294967296"):
        lm.generate("Once", seed=2**32)


WRONG_TYPES = """
import jax.numpy as jnp
import bilinear_jax as bj

lm = bj.load("ts-nano")
tracer = bj.Tracer(lm, 2)
for run in (
    lambda: bj.Tracer(lm, "2"),
    lambda: bj.Tracer(lm, 2, inp="mlp-in"),
    lambda: bj.load_sae("ts-nano", layer="2"),
    lambda: bj.load("ts-nano", compute_dtype="foo"),
    lambda: tracer.top_eigh(k=2.5),
    lambda: bj.ablate_pairs(tracer, lm.encode("a cat"), [(3, 12)]),
    lambda: bj.account(tracer, jnp.zeros((1, 0), int), 7),
):
    try:
        run()
    except (ValueError, bj.UnknownNameError) as error:
        print(f"{type(error).__name__}: {error}")
"""


def test_arguments_of_other_types():
    """In a process of its own: here, the annotations are checked too, and would say it first."""
    printed = subprocess.run([sys.executable, "-c", WRONG_TYPES], capture_output=True, text=True, check=True).stdout
    expected = [
        "UnknownNameError: there is no layer '2' in this model: choose one of 0 ... 3",
        "ValueError: inp is 'mlp-in', but it must be an SAE, directions [n, d_model], or a dict such as {'site': "
        "'resid_mid', 'k': 20}",
        "ValueError: layer must be a whole number, got '2'",
        "ValueError: compute_dtype is 'foo', but it must be a float type, such as jnp.bfloat16",
        "ValueError: k is 2.5, but it must be between 1 and 256 (the number of inputs)",
        "ValueError: pairs must map at least one output feature to its pairs, such as {7: [(3, 12)]}",
        "ValueError: tokens of shape (1, 0) have no token in a row: give at least one",
    ]
    assert printed.splitlines() == expected


def test_a_model_that_gives_nan(lm, tracer):
    """It is told by whatever looks at its values."""
    broken = dataclasses.replace(lm, params=jax.tree.map(lambda a: a * jnp.nan, lm.params))
    for run in (
        lambda: broken.mean_loss(TOKENS),
        lambda: bj.evaluation.evaluate_sae(broken, tracer.out, TOKENS),
        lambda: bj.top_activations(broken, tracer.out, TOKENS),
        lambda: row_codes(broken, tracer.out, TOKENS, [0]),
    ):
        with pytest.raises(ValueError, match=r"not finite in rows 0 \.\.\. 0: check their parameters"):
            run()
    with pytest.raises(ValueError, match="not finite as logits: check their parameters"):
        broken.generate("Once")
    with pytest.raises(ValueError, match="not finite at these tokens: check their parameters"):
        bj.account(bj.Tracer(broken, 2, tracer.inp, tracer.out), TOKENS, 7)


def test_a_submatrix_is_of_one_feature(tracer):
    with pytest.raises(ValueError, match="but it must be one output feature, an int"):
        tracer.interaction_submatrix([1, 2])


def test_no_contexts_and_no_batch(lm, tracer):
    with pytest.raises(ValueError, match=r"k \(contexts to show\) must be at least 1, got 0"):
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
