"""The error for a name that does not exist: what it says, and what a program can read from it."""

import pickle

import jax
import jaxtyping
import pytest

import bilinear_jax as bj
from bilinear_jax.errors import UnknownNameError, check_count
from bilinear_jax.nn.sae import SAE, SAEConfig


@pytest.mark.parametrize(
    ("kind", "given", "known", "options", "message", "listed"),
    [
        ("feature", 128, range(128), {"of": "SAE a"}, "there is no feature 128 in SAE a: choose one of 0 ... 127",
         "0 ... 127"),
        ("layer", -1, range(3), {}, "there is no layer -1: choose one of 0 ... 2", "0 ... 2"),
        ("layer", 1, range(-2, 1), {}, "there is no layer 1: choose one of -2 ... 0", "-2 ... 0"),
        ("layer", 1, range(1), {}, "there is no layer 1: choose one of 0", "0"),
        ("site", "x", ("mlp_in", "scores"), {}, "there is no site x: choose one of mlp_in, scores", "mlp_in, scores"),
        ("SAE", "x", {"b": 1, "a": 2}, {"of": "here"}, "there is no SAE x in here: choose one of b, a", "b, a"),
        ("SAE", "x", [], {"of": "here"}, "there is no SAE x in here: there are none", ""),
        ("layer", 0, range(0), {}, "there is no layer 0: there are none", ""),
        ("SAE", "x", ["a"], {"fix": "Train one"}, "there is no SAE x: choose one of a. Train one", "a"),
        ("SAE", "x", iter("ab"), {"fix": "Look"}, "there is no SAE x: choose one of a, b. Look", "a, b"),
    ],
)  # fmt: skip
def test_what_it_says(kind, given, known, options, message, listed):
    error = UnknownNameError(kind, given, known, **options)
    assert str(error) == message
    assert (error.kind, error.given, error.known) == (kind, given, listed)


def test_it_survives_pickle():
    """As it must to come out of another process."""
    error = UnknownNameError("feature", 9, range(8), of="SAE a", fix="Look")
    found = pickle.loads(pickle.dumps(error))
    assert type(found) is UnknownNameError and str(found) == str(error)
    assert (found.kind, found.given, found.known) == ("feature", 9, "0 ... 7")


def test_it_is_a_lookup_error_and_not_a_value_error():
    """So that ``except ValueError`` around a computation does not hide a mistyped name."""
    assert issubclass(UnknownNameError, LookupError)
    assert not issubclass(UnknownNameError, ValueError | KeyError | IndexError | OSError)
    assert bj.UnknownNameError is UnknownNameError


def test_an_sae_checks_its_features():
    sae = SAE.init(SAEConfig("mlp_out", 0, d_model=4, expansion=2, k=1), jax.random.key(0))
    assert [sae.check_feature(feature) for feature in (0, 7)] == [0, 7]
    for feature in (8, -1, 2**40):
        with pytest.raises(UnknownNameError) as caught:
            sae.check_feature(feature)
        error = caught.value
        assert str(error) == f"there is no feature {feature} in SAE 0-mlp-out-x2-k1: choose one of 0 ... 7"
        assert (error.kind, error.given, error.known) == ("feature", feature, "0 ... 7")
    with pytest.raises(ValueError, match=r"feature is 1\.5, but a feature of SAE 0-mlp-out-x2-k1 must be an int"):
        sae.check_feature(1.5)


def test_a_count_is_a_whole_number(monkeypatch):
    """What is not an int failed in NumPy or JAX, far from the argument."""
    for given in (2.5, "3", None, float("nan")):
        with pytest.raises(ValueError, match=r"k must be a whole number, got"):
            check_count("k", given)
    with pytest.raises(ValueError, match="k must be at least 1, got 0"):
        check_count("k", 0)
    check_count("k", 0, least=0)
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # users call it without type checks
    lm = bj.load("ts-nano")
    with pytest.raises(ValueError, match=r"batch_size must be a whole number, got 2\.5"):
        lm.mean_loss([[1, 2]], batch_size=2.5)
    with pytest.raises(ValueError, match=r"k must be a whole number, got 2\.5"):
        bj.logit_effects(lm, bj.load_sae("ts-nano", site="mlp_out", layer=2), 3, k=2.5)
