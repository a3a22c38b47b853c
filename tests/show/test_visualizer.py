"""What the Visualizer prints, where from, and where to; logit effects."""

import dataclasses
import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from bilinear_jax.errors import UnknownNameError
from bilinear_jax.explain.logits import logit_effects
from bilinear_jax.language import LanguageModel
from bilinear_jax.measure.activations import RankedRows, save_top_activations, top_activations
from bilinear_jax.nn.sae import SAE, SAEConfig
from bilinear_jax.nn.transformer import Transformer, TransformerConfig
from bilinear_jax.show.text import DARK, LIGHT
from bilinear_jax.show.visualizer import Visualizer

WORDS = ["[PAD]", "the", "child", "is", "not", "lost", "##ing", ".", "play", "a", "\x1b[2J", "free"]
TEXTS = [
    "the child is not lost . the child is play ##ing .",
    "a free child is play ##ing . [PAD] [PAD] [PAD] [PAD] [PAD]",
    "the \x1b[2J is not a lost child . a child is free",
]
NOT, LOST, DEAD = 0, 1, 63


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece({word: i for i, word in enumerate(WORDS)}, unk_token="[PAD]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.WordPiece()
    return tokenizer


@pytest.fixture(scope="module")
def tokens() -> np.ndarray:
    return np.array([[WORDS.index(word) for word in text.split(" ")] for text in TEXTS], np.uint16)


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    """Embeddings along the coordinates, so that the SAE's features can be told by hand."""
    config = TransformerConfig(
        n_layer=1, n_head=2, d_model=16, d_hidden=8, n_ctx=12, n_vocab=12, pad_id=0, normalization=(False, False, False)
    )
    params = jax.jit(Transformer(config).init)(jax.random.key(0), jnp.zeros((1, 4), int))["params"]
    return LanguageModel(params | {"w_e": jnp.eye(12, 16)}, config)


@pytest.fixture(scope="module")
def sae() -> SAE:
    """Feature 0 reads 4 "not" + 2 "lost", feature 1 reads 3 "lost"; the rest are dead."""
    w_enc = jnp.zeros((64, 16)).at[NOT, WORDS.index("not")].set(4.0).at[NOT, WORDS.index("lost")].set(2.0)
    w_enc = w_enc.at[LOST, WORDS.index("lost")].set(3.0)
    w_dec = jnp.zeros((16, 64)).at[:, NOT].set(jnp.arange(16.0))
    return SAE({"w_enc": w_enc, "w_dec": w_dec, "b_dec": jnp.zeros(16)}, SAEConfig("resid_pre", 0, 16, 4, k=2))


@pytest.fixture(scope="module")
def vis(lm, sae, tokens, tokenizer) -> Visualizer:
    return Visualizer(lm, sae, tokens, tokenizer=tokenizer)


def test_plain_text(vis):
    assert vis.text(NOT, k=2, window=3, logits=0).splitlines() == [
        "feature 0  of SAE 0-resid-pre-x4-k2",
        "4.00 : the child is [not] lost. the",
        "4.00 : the ␛[2J is [not] a lost child",
    ]


def test_the_window_and_padding(vis):
    lines = vis.text(NOT, k=2, window=1, logits=0).splitlines()[1:]
    assert lines == ["4.00 :  is [not] lost", "4.00 :  is [not] a"]
    # the second row ends in padding: none of it is shown
    context = vis._context(1.0, 1, 6, np.zeros(12, np.float32), 10)
    assert "".join(context.pieces) == "a free child is playing."


@pytest.mark.parametrize(("dark", "palette"), [(True, DARK), (False, LIGHT)])
def test_colours_shade_every_token_by_its_own_activation(vis, dark, palette):
    text = vis.text(NOT, k=1, dark=dark, color=True, logits=0)
    for word, activation in ((" not", 4.0), (" lost", 2.0)):
        shade = ";".join(map(str, palette.background(activation, 4.0)))
        assert f"48;2;{shade}m{word}\x1b[0m" in text
    assert text.count("48;2;") == 2


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_colours_are_for_terminals(vis, monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")

    def printed(file, **options):
        assert vis(NOT, file=file, **options) is None
        return file.getvalue()

    assert "\x1b" not in printed(io.StringIO(), dark=True) and "[not]" in printed(io.StringIO())
    assert "\x1b[1;38;2;" in printed(Terminal()) and "[not]" not in printed(Terminal())
    assert "\x1b" in printed(io.StringIO(), color=True)
    assert "\x1b" not in printed(Terminal(), color=False)
    monkeypatch.setenv("TERM", "dumb")
    assert "\x1b" not in printed(Terminal())
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b" not in printed(Terminal()) and "\x1b" in printed(Terminal(), color=True)


def test_a_notebook_gets_html_of_the_same(vis):
    html = vis.html(NOT, DEAD, k=1, window=1)._repr_html_()
    assert '<b class="p10" data-v=4.00> not</b>' in html and "dead" in html
    assert html.count(">raises ") == 2 and "raises" not in vis.html(NOT, k=1, logits=0)


def test_the_terminal_says_whether_it_is_dark(vis, monkeypatch):
    shade = ";".join(map(str, LIGHT.background(4.0, 4.0)))
    monkeypatch.setenv("COLORFGBG", "0;15")
    assert shade in vis.text(NOT, color=True)
    monkeypatch.setenv("COLORFGBG", "15;0")
    assert shade not in vis.text(NOT, color=True)
    monkeypatch.delenv("COLORFGBG")
    assert shade not in vis.text(NOT, color=True)


def test_an_output_that_knows_no_unicode_gets_escapes(vis):
    class Ascii(io.StringIO):
        encoding = "ascii"

    file = Ascii()
    vis(NOT, file=file)
    assert "\\u241b[2J" in file.getvalue() and file.getvalue().isascii()


def test_features_may_be_numbers_of_arrays(vis):
    """What a top-k of JAX or numpy gives."""
    assert vis.text(np.int64(NOT), jnp.asarray(LOST)) == vis.text(NOT, LOST)


def test_a_dead_feature_and_a_rare_one(vis):
    text = vis.text(LOST, DEAD, k=5, logits=0)
    lost, dead = text.split("\n\n")
    assert lost.count("3.00 :") == 2  # two rows have it; no third line is made up
    assert dead.splitlines() == ["feature 63  of SAE 0-resid-pre-x4-k2", "dead: no token activates it"]
    assert vis.contexts(DEAD) == {DEAD: []}


def test_a_feature_out_of_range_is_told(vis, lm, sae):
    for feature in (64, -1):
        words = rf"no feature {feature} in SAE {sae.name}: choose one of 0 \.\.\. 63"
        with pytest.raises(UnknownNameError, match=words):
            vis(feature)
        with pytest.raises(UnknownNameError, match=words):
            logit_effects(lm, sae, feature)


def test_windows_and_lists_of_negative_length(vis):
    with pytest.raises(ValueError, match=r"window \(tokens on either side\) must be at least 0, got -5"):
        vis.text(NOT, window=-5)
    with pytest.raises(ValueError, match="k must be at least 0, got -1"):
        vis.text(NOT, logits=-1)


def test_top_activations_come_from_beside_the_model(lm, sae, tokens, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr("bilinear_jax.show.visualizer.folder_of", lambda source, files: tmp_path)
    monkeypatch.setattr("bilinear_jax.show.visualizer.load_corpus", lambda source: tokens)
    lm = dataclasses.replace(lm, source="somewhere")
    with pytest.raises(FileNotFoundError, match="pass tokens="):
        Visualizer(lm, sae)
    save_top_activations(tmp_path / "top-activations.safetensors", top_activations(lm, sae, tokens))
    beside = Visualizer(lm, sae, tokenizer=tokenizer)
    assert beside.text(NOT) == Visualizer(lm, sae, tokens, tokenizer=tokenizer).text(NOT)
    other = dataclasses.replace(sae, config=dataclasses.replace(sae.config, tag="v1"))
    with pytest.raises(
        ValueError, match=r"no top activations of SAE 0-resid-pre-x4-k2-v1 .*, only of: 0-resid-pre-x4-k2\."
    ):
        Visualizer(lm, other)


def test_a_model_from_nowhere_and_a_foreign_sae_are_told(lm, sae):
    with pytest.raises(ValueError, match="not loaded from a folder: pass tokens="):
        Visualizer(lm, sae)
    with pytest.raises(ValueError, match="belongs to another model"):
        Visualizer(lm, dataclasses.replace(sae, config=dataclasses.replace(sae.config, layer=3)))


def test_published_rows_are_located(lm, sae, tokens, tokenizer, vis):
    ranked = RankedRows(np.tile(np.array([1, 2, 0]), (64, 1)))
    published = Visualizer(lm, sae, tokens, ranked, tokenizer=tokenizer)
    lines = published.text(NOT, k=5, logits=0).splitlines()
    assert len(lines) == 3 and lines[1:] == vis.text(NOT, k=5, logits=0).splitlines()[:0:-1]  # in the published order
    assert "none of its published rows" in published.text(DEAD)


def test_stored_activations_of_other_tokens_are_noticed(lm, sae, tokens, tokenizer):
    top = top_activations(lm, sae, tokens)[sae.name]
    with pytest.warns(UserWarning, match="the stored activations are from other tokens"):
        Visualizer(lm, sae, np.roll(tokens, 1, axis=0), top, tokenizer=tokenizer).text(NOT)


def test_logit_effects_are_the_direct_path(lm, sae, vis):
    effects = logit_effects(lm, sae, NOT, k=3)
    direct = np.asarray(lm.params["w_u"]) @ np.arange(16.0)
    np.testing.assert_array_equal(effects.raised, np.argsort(-direct)[:3])
    np.testing.assert_array_equal(effects.lowered, np.argsort(direct)[:3])
    np.testing.assert_allclose(effects.raised_by, -np.sort(-direct)[:3], rtol=1e-5)
    np.testing.assert_allclose(effects.lowered_by, np.sort(direct)[:3], rtol=1e-5)
    first = WORDS[int(effects.raised[0])].replace("\x1b", "␛")
    assert vis.text(NOT, logits=3).splitlines()[1].startswith(f"raises  {first}  ")
    attention = dataclasses.replace(sae, config=dataclasses.replace(sae.config, site="attn_out"))
    scaled = jax.jit(lambda lm, feature: logit_effects(lm, attention, feature, k=3))(lm, NOT)
    np.testing.assert_allclose(scaled.raised_by, lm.config.attn_scale * effects.raised_by, rtol=1e-5)
