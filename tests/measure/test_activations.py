"""Top activations: planted answers, brute force, batches, masks, files."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import published
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from bilinear_jax.language import LanguageModel
from bilinear_jax.measure.activations import (
    RankedRows,
    TopActivations,
    feature_codes,
    find_top,
    load_top_activations,
    locate,
    row_codes,
    save_top_activations,
    top_activations,
)
from bilinear_jax.nn.sae import SAE, SAEConfig
from bilinear_jax.nn.transformer import Transformer, TransformerConfig

CONFIG = TransformerConfig(n_layer=2, n_head=2, d_model=16, d_hidden=24, n_ctx=12, n_vocab=30, pad_id=0)


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return LanguageModel(jax.jit(Transformer(CONFIG).init)(jax.random.key(0), jnp.zeros((1, 4), int))["params"], CONFIG)


@pytest.fixture(scope="module")
def tokens() -> np.ndarray:
    tokens = np.random.default_rng(0).integers(1, 30, (23, 12)).astype(np.uint16)
    tokens[3, 7:] = 0  # padding
    return tokens


def an_sae(site: str, layer: int, seed: int = 1, k: int = 3) -> SAE:
    return SAE.init(SAEConfig(site, layer, d_model=16, expansion=4, k=k), jax.random.key(seed))


def embedding_sae(lm: LanguageModel, tokens: list[int]) -> SAE:
    """Feature i is the embedding of token ``tokens[i]``; the others are dead."""
    sae = SAE.init(SAEConfig("resid_pre", 0, d_model=16, expansion=4, k=1), jax.random.key(0))
    w_enc = jnp.zeros((64, 16)).at[: len(tokens)].set(lm.params["w_e"][jnp.asarray(tokens)])
    return dataclasses.replace(sae, params=sae.params | {"w_enc": w_enc})


def brute_force(lm, sae, tokens, k, one_per_row, mask=None):
    """[(value, row, position)] of each feature, straight from the definition: a code that isn't 0 was selected."""
    x = lm.capture(tokens, [(sae.config.site, sae.config.layer)])[sae.config.site, sae.config.layer]
    codes = np.asarray(sae.encode(x))
    counted = np.asarray(lm.token_mask(tokens) if mask is None else mask)
    found = []
    for feature in range(sae.config.n_features):
        entries = [
            (float(codes[r, p, feature]), r, p) for r, p in np.argwhere(counted & (codes[..., feature] != 0)).tolist()
        ]
        entries.sort(key=lambda one: (-one[0], one[1], one[2]))
        if one_per_row:
            rows = [row for _, row, _ in entries]
            entries = [one for place, one in enumerate(entries) if one[1] not in rows[:place]]
        entries += [(0.0, -1, -1)] * k
        found.append(entries[:k])
    return found


@pytest.mark.parametrize("one_per_row", [True, False])
def test_equals_brute_force_for_several_saes_in_one_pass(lm, tokens, one_per_row):
    saes = [an_sae("mlp_in", 1), an_sae("mlp_out", 0, seed=2), an_sae("resid_mid", 1, seed=3)]
    tops = top_activations(lm, saes, tokens, k=5, batch_size=4, one_per_row=one_per_row)
    assert list(tops) == [sae.name for sae in saes]
    for sae in saes:
        top, expected = tops[sae.name], np.array(brute_force(lm, sae, tokens, 5, one_per_row))
        np.testing.assert_array_equal(top.rows, expected[..., 1])
        np.testing.assert_array_equal(top.positions, expected[..., 2])
        np.testing.assert_allclose(top.values, expected[..., 0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("batch_size", [1, 100])
def test_the_batch_size_does_not_matter(lm, tokens, batch_size):
    sae = an_sae("mlp_out", 1)
    one = top_activations(lm, sae, tokens, k=4, batch_size=7)[sae.name]
    other = top_activations(lm, sae, tokens, k=4, batch_size=batch_size)[sae.name]
    np.testing.assert_array_equal(one.rows, other.rows)
    np.testing.assert_array_equal(one.positions, other.positions)
    np.testing.assert_allclose(one.values, other.values, rtol=1e-5, atol=1e-6)


def test_finds_planted_tokens_and_breaks_ties_by_row_then_position(lm):
    tokens = np.array([[5, 1, 2, 7, 1], [1, 7, 2, 7, 7], [3, 4, 4, 1, 3], [2, 5, 1, 7, 0]])
    sae = embedding_sae(lm, [7, 1])
    norm = float(jnp.sum(lm.params["w_e"][7] ** 2))
    top = top_activations(lm, sae, tokens, k=4, batch_size=2)[sae.name]
    # token 7 at its first place of each row that has one; the third row has none: no activation, not a 0
    assert top.rows[0].tolist() == [0, 1, 3, -1]
    assert top.positions[0].tolist() == [3, 1, 3, -1]
    np.testing.assert_allclose(top.values[0], [norm, norm, norm, 0], rtol=1e-5)
    every = top_activations(lm, sae, tokens, k=4, batch_size=2, one_per_row=False)[sae.name]
    assert every.rows[0].tolist() == [0, 1, 1, 1]
    assert every.positions[0].tolist() == [3, 1, 3, 4]


def test_position_0_and_padding_do_not_count_unless_asked_for(lm):
    tokens = np.array([[7, 1, 2, 0], [3, 1, 2, 0]])
    sae = embedding_sae(lm, [7, 0])
    top = top_activations(lm, sae, tokens, k=1)[sae.name]
    assert 0 not in top.positions and 3 not in top.positions
    everywhere = top_activations(lm, sae, tokens, k=1, token_mask=np.ones(tokens.shape, bool))[sae.name]
    assert everywhere.positions[0].tolist() == [0] and everywhere.positions[1].tolist() == [3]


def test_a_dead_feature_is_marked(lm, tokens):
    sae = embedding_sae(lm, [7])
    top = top_activations(lm, sae, tokens, k=3)[sae.name]
    assert top.values[63].tolist() == [0, 0, 0]
    assert top.rows[63].tolist() == top.positions[63].tolist() == [-1, -1, -1]


def test_runs_no_layer_after_the_last_one_needed(lm, tokens):
    broken = jax.tree.map(lambda a: a.at[1].set(jnp.nan), lm.params["layers"])
    lm = dataclasses.replace(lm, params=lm.params | {"layers": broken})
    sae = an_sae("mlp_out", 0)
    assert np.isfinite(top_activations(lm, sae, tokens, k=2)[sae.name].values).all()


def test_wrong_use_is_told(lm, tokens):
    sae = an_sae("mlp_out", 0)
    with pytest.raises(ValueError, match="two SAEs are named 0-mlp-out-x4-k3"):
        top_activations(lm, [sae, sae], tokens)
    with pytest.raises(ValueError, match="at least one SAE"):
        top_activations(lm, [], tokens)
    with pytest.raises(ValueError, match=r"tokens of shape .* are not \[rows, seq\]"):
        top_activations(lm, sae, tokens[0])
    with pytest.raises(ValueError, match="token_mask has shape"):
        top_activations(lm, sae, tokens, token_mask=np.ones((2, 2), bool))
    with pytest.raises(ValueError, match=r"^k must be at least 1, got 0"):
        top_activations(lm, sae, tokens, k=0)
    with pytest.raises(ValueError, match=r"^batch_size must be at least 1, got 0"):
        top_activations(lm, sae, tokens, batch_size=0)
    with pytest.raises(ValueError, match="outside the vocabulary"):
        top_activations(lm, sae, tokens + np.uint16(20))
    with pytest.raises(ValueError, match="no row 23 in the dataset, which has 23 rows"):
        row_codes(lm, sae, tokens, [0, 23])


def test_codes_of_chosen_rows_are_those_of_the_whole_dataset(lm, tokens):
    sae = an_sae("resid_mid", 1)
    rows = [4, 0, 21]
    codes = row_codes(lm, sae, tokens, rows, batch_size=2)
    whole = np.asarray(sae.encode(lm.capture(tokens, [("resid_mid", 1)])["resid_mid", 1]))
    for feature in (0, 17, 63):
        np.testing.assert_allclose(feature_codes(codes, feature), whole[rows, :, feature], rtol=1e-5, atol=1e-6)


def test_a_file_gives_back_what_was_saved(lm, tokens, tmp_path):
    saes = [an_sae("mlp_in", 1), an_sae("mlp_out", 1)]
    tops = top_activations(lm, saes, tokens, k=3)
    path = tmp_path / "new" / "top-activations.safetensors"
    save_top_activations(path, tops)
    save_top_activations(path, tops)  # replaces
    assert [one.name for one in path.parent.iterdir()] == [path.name]
    again = load_top_activations(path)
    assert sorted(again) == sorted(tops)
    for name, top in tops.items():
        for part in ("values", "rows", "positions"):
            np.testing.assert_array_equal(getattr(again[name], part), getattr(top, part))
            assert getattr(again[name], part).dtype == getattr(top, part).dtype


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "top-activations.safetensors"
    top = TopActivations(np.ones((4, 1), np.float32), np.ones((4, 1), np.int32), np.ones((4, 1), np.int32))
    save_top_activations(path, {"old": top})

    def full_disk(_):
        raise OSError("no space left on device")

    monkeypatch.setattr("bilinear_jax.measure.activations.os.fsync", full_disk)
    with pytest.raises(OSError, match="no space"):
        save_top_activations(path, {"new": top})
    assert list(load_top_activations(path)) == ["old"] and len(list(tmp_path.iterdir())) == 1


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_activations_in_any_memory_layout_come_back(tmp_path_factory, data):
    rng = np.random.default_rng(0)
    values = rng.normal(size=(4, 3)).astype(np.float32)
    rows, positions = rng.integers(0, 99, (2, 4, 3)).astype(np.int32)
    given = [published.other_memory(data.draw, part) for part in (values, rows, positions)]
    path = tmp_path_factory.mktemp("top") / "top.safetensors"
    save_top_activations(path, {"a": TopActivations(*given)})
    again = load_top_activations(path)["a"]
    for part, expected in (("values", values), ("rows", rows), ("positions", positions)):
        np.testing.assert_array_equal(getattr(again, part), expected)


@pytest.mark.parametrize(
    ("part", "value"), [("values", 1e39), ("values", np.nan), ("rows", 2**31), ("positions", -(2**40))]
)
def test_numbers_that_a_file_cannot_hold(tmp_path, part, value):
    path = tmp_path / "top.safetensors"
    top = TopActivations(np.ones((4, 1)), np.ones((4, 1), int), np.ones((4, 1), int))
    save_top_activations(path, {"a": top})
    before = path.read_bytes()
    with pytest.raises(ValueError, match=f"the {part} of a do not fit into"):
        save_top_activations(path, {"a": dataclasses.replace(top, **{part: np.full((4, 1), value)})})
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def test_a_damaged_or_foreign_file_is_told(tmp_path):
    from safetensors.numpy import save_file

    path = tmp_path / "top.safetensors"
    save_top_activations(path, {"a": TopActivations(np.ones((4, 1)), np.ones((4, 1), int), np.ones((4, 1), int))})
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(ValueError, match="not a complete safetensors file"):
        load_top_activations(path)
    save_file({"weight": np.ones(3)}, path)
    with pytest.raises(ValueError, match="holds the key 'weight'"):
        load_top_activations(path)
    save_file({"a.values": np.ones((4, 1))}, path)
    with pytest.raises(ValueError, match=r"holds the key 'a\.values'"):
        load_top_activations(path)


@pytest.mark.parametrize(
    "change",
    [
        {"rows": np.zeros((5, 2), np.float32)},
        {"rows": np.full((5, 2), -2)},
        {"positions": np.zeros((5, 1), np.int32)},
        {"values": np.zeros((5, 2), bool)},
        {"values": np.full((5, 2), np.nan, np.float32)},
        {name: np.zeros(5, np.int32) for name in ("rows", "positions")} | {"values": np.zeros(5, np.float32)},
    ],
    ids=range(6),
)
def test_arrays_of_nonsense_are_told(tmp_path, change):
    arrays = {"values": np.ones((5, 2), np.float32), "rows": np.zeros((5, 2), int), "positions": np.ones((5, 2), int)}
    save_file({f"a.{part}": array for part, array in arrays.items()}, tmp_path / "top.safetensors")
    assert load_top_activations(tmp_path / "top.safetensors")["a"].rows.shape == (5, 2)
    save_file({f"a.{part}": array for part, array in (arrays | change).items()}, tmp_path / "top.safetensors")
    with pytest.raises(ValueError, match=r"top.safetensors has no top activations of a \(values, rows and positions"):
        load_top_activations(tmp_path / "top.safetensors")


def test_reads_the_published_rows_and_locates_their_activations(lm, tokens, tmp_path):
    """The published ranking counts position 0; the result doesn't."""
    from safetensors.numpy import save_file

    sae = an_sae("resid_mid", 0)
    everywhere = np.ones(tokens.shape, bool)
    ranked = top_activations(lm, sae, tokens, k=23, token_mask=everywhere)[sae.name]
    rows = np.where(ranked.rows < 0, 0, ranked.rows)  # a published file has a row in every place
    path = tmp_path / "top-activations.safetensors"
    save_file({"0-resid-mid": np.ascontiguousarray(rows.T.astype(np.int64))}, path)
    found = find_top(load_top_activations(path), sae, "it")
    assert isinstance(found, RankedRows) and found.rows.shape == (64, 23)
    expected = brute_force(lm, sae, tokens, 23, one_per_row=True)
    for feature in (0, 9, 40):
        top = locate(lm, sae, tokens, found, feature, k=23)
        wanted = sorted({one for one in expected[feature] if one[1] >= 0}, reverse=True)
        got = list(dict.fromkeys(zip(top.rows[0].tolist(), top.positions[0].tolist(), strict=True)))
        assert [one for one in got if one[0] >= 0] == [(row, position) for _, row, position in wanted]


@pytest.mark.parametrize("activation", ["relu", "jumprelu", "batchtopk"])
@pytest.mark.parametrize("one_per_row", [True, False])
def test_activations_above_a_threshold_are_found_and_no_others(lm, tokens, activation, one_per_row):
    config = SAEConfig("mlp_in", 1, 16, 4, 5, activation=activation, target="mlp_out")
    sae = SAE.init(config, jax.random.key(1))
    if activation != "relu":
        sae = SAE(sae.params | {"threshold": jnp.full_like(sae.params["threshold"], 2.0)}, config)
    top = top_activations(lm, sae, tokens, k=4, batch_size=9, one_per_row=one_per_row)[sae.name]
    for feature, expected in enumerate(brute_force(lm, sae, tokens, 4, one_per_row)):
        np.testing.assert_allclose(top.values[feature], [value for value, _, _ in expected], rtol=1e-4, atol=1e-6)
    active = top.values[top.rows >= 0]
    assert active.min() > (0 if activation == "relu" else 2) and (top.rows < 0).any() == (activation != "relu")


def test_more_active_features_than_slots_are_told(lm, tokens):
    sae = SAE.init(SAEConfig("mlp_in", 1, 16, 4, activation="relu", max_active=2), jax.random.key(1))
    for measure in (lambda: top_activations(lm, sae, tokens), lambda: row_codes(lm, sae, tokens, [0])):
        with pytest.raises(
            ValueError, match=r"active than max_active \(2 of 1-mlp-in-x4-relu\): give the config a larger"
        ):
            measure()


def test_a_transcoder_does_not_take_the_published_activations_of_an_sae():
    top = TopActivations(np.ones((64, 1), np.float32), np.ones((64, 1), np.int32), np.ones((64, 1), np.int32))
    assert find_top({"1-mlp-in": top}, an_sae("mlp_in", 1), "the file") is top
    transcoder = SAE.init(SAEConfig("mlp_in", 1, 16, 4, 3, target="mlp_out"), jax.random.key(0))
    with pytest.raises(ValueError, match="no top activations of SAE 1-mlp-in-to-mlp-out-x4-k3"):
        find_top({"1-mlp-in": top}, transcoder, "the file")


def test_an_sae_that_the_file_lacks_is_told_with_what_there_is(lm):
    top = TopActivations(np.ones((4, 1), np.float32), np.ones((4, 1), np.int32), np.ones((4, 1), np.int32))
    with pytest.raises(
        ValueError, match=r"no top activations of SAE 1-mlp-in-x4-k3 in the file.*, only of: 0-mlp-out-x4-k3"
    ):
        find_top({"0-mlp-out-x4-k3": top}, an_sae("mlp_in", 1), "the file")
    with pytest.raises(ValueError, match="has 4 features, but SAE 0-mlp-out-x4-k3 has 64"):
        find_top({"0-mlp-out-x4-k3": top}, an_sae("mlp_out", 0), "the file")
