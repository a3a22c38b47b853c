"""All that the weights say of an output feature, against its whole interaction matrix in float64."""

import numpy as np
import published
import pytest

from bilinear_jax.errors import UnknownNameError
from bilinear_jax.explain import overview
from bilinear_jax.explain.overview import feature_weights, pair_weights
from bilinear_jax.explain.tracer import Tracer

FEATURES = [3, 17, 1]


@pytest.fixture(scope="module", params=["micro", "biased"])
def tracer(request, golden) -> Tracer:
    if request.param == "biased":
        return published.biased_tracer()[0]
    return Tracer(golden.lm, 1, scope=published.SCOPE)


def whole(tracer: Tracer, feature: int):
    """Q, D and D^T Q D in float64."""
    q, basis = (np.asarray(array, np.float64) for array in (tracer.q(feature), tracer.basis))
    return q, basis, basis.T @ q @ basis


def close(actual, expected):
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5)


def test_sizes_and_eigenpairs_are_those_of_the_matrix(tracer):
    found = list(feature_weights(tracer, FEATURES, eigenpairs=4, reads=3, pairs=1))
    assert [one.feature for one in found] == FEATURES
    for one in found:
        q, basis, projected = whole(tracer, one.feature)
        values, vectors = np.linalg.eigh(q)
        order = np.argsort(-np.abs(values))[:4]
        size = np.linalg.norm(values)
        close(one.norm, size)
        close(one.effective_rank, np.abs(values).sum() ** 2 / size**2)
        close(one.explained, (values[order] ** 2).sum() / size**2)
        close(one.projected, (projected**2).sum())
        close([pair.value for pair in one.eigenpairs], values[order])
        close([pair.share for pair in one.eigenpairs], values[order] ** 2 / size**2)
        for pair, value, vector in zip(one.eigenpairs, values[order], vectors[:, order].T, strict=True):
            assert abs(pair.value - value) <= pair.bound + 1e-6 * size and pair.bound < 1e-3 * size
            cosines = vector @ basis / np.linalg.norm(basis, axis=0)
            largest = np.argsort(-np.abs(cosines))[:3]
            features = [feature for feature, _ in pair.reads]
            assert features == largest.tolist()
            close([cosine for _, cosine in pair.reads], cosines[largest] * np.sign(cosines[largest[0]]))


def test_pairs_are_those_of_largest_weight(tracer):
    for one in feature_weights(tracer, FEATURES, eigenpairs=1, reads=1, pairs=30):
        q, basis, projected = whole(tracer, one.feature)
        i, j = np.triu_indices(len(projected))
        order = np.argsort(-np.abs(projected[i, j]))
        assert (one.pairs[:, 0] <= one.pairs[:, 1]).all() and len(np.unique(one.pairs, axis=0)) == 30
        close(one.weights, projected[tuple(one.pairs.T)])
        close(np.abs(one.weights), np.abs(projected[i, j])[order[:30]])
        some = np.random.default_rng(0).integers(0, len(projected), (40, 2))
        assert (some[:, 0] > some[:, 1]).any()
        close(one.weights_of(some), projected[tuple(some.T)])
        close(one.between([5, 2, 20]), projected[np.ix_([5, 2, 20], [5, 2, 20])])
        close(one.q, q)
        close(one.basis, basis)


def test_no_more_is_given_than_there_is(tracer):
    (one,) = feature_weights(tracer, [2], eigenpairs=1000, reads=10_000, pairs=10**6)
    size = tracer.basis.shape[1]
    assert len(one.eigenpairs) == tracer.tensor.n_in and len(one.pairs) == size * (size + 1) // 2
    assert {len(pair.reads) for pair in one.eigenpairs} == {size}
    close(one.explained, 1)


def test_features_at_once_and_tiles_change_nothing(tracer, monkeypatch):
    options = {"eigenpairs": 3, "reads": 2, "pairs": 7}
    expected = list(feature_weights(tracer, FEATURES, **options))
    assert len(expected) == 3
    monkeypatch.setattr(overview, "FEATURES_AT_ONCE", 2)  # of which the last two are one feature twice
    monkeypatch.setattr(overview, "TILE", 5)
    for one, other in zip(expected, feature_weights(tracer, FEATURES, **options), strict=True):
        assert one.feature == other.feature and np.array_equal(one.pairs, other.pairs)
        for name in ("norm", "effective_rank", "explained", "projected", "weights", "q"):
            close(getattr(one, name), getattr(other, name))
        for pair, same in zip(one.eigenpairs, other.eigenpairs, strict=True):
            assert [feature for feature, _ in pair.reads] == [feature for feature, _ in same.reads]
            close([pair.value, pair.share], [same.value, same.share])
        close(one.weights_of(one.pairs), other.weights_of(one.pairs))


def test_the_weights_of_no_pairs(tracer):
    assert pair_weights(tracer.q(3), tracer.basis, np.zeros((0, 2), int)).shape == (0,)


def test_what_is_refused_is_refused_before_the_first(tracer):
    options = {"eigenpairs": 1, "reads": 1, "pairs": 1}
    with pytest.raises(ValueError, match="name at least one output feature"):
        feature_weights(tracer, [], **options)
    with pytest.raises(ValueError, match="output feature 3 is named twice"):
        feature_weights(tracer, [3, 1, 3], **options)
    for feature in (tracer.n_features, -1):
        words = rf"no feature {feature} in SAE {tracer.out.name}: choose one of 0 \.\.\. {tracer.n_features - 1}"
        with pytest.raises(UnknownNameError, match=words):
            feature_weights(tracer, [0, feature], **options)
