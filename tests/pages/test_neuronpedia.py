"""The export against the schema of SAEDashboard's batches, against the facts, and against the model itself."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import jsonschema
import numpy as np
import published
import pytest

from bilinear_jax.errors import UnknownNameError
from bilinear_jax.explain.tracer import Tracer
from bilinear_jax.language import LanguageModel, load
from bilinear_jax.nn.sae import SAE, SAEConfig
from bilinear_jax.nn.transformer import TransformerConfig
from bilinear_jax.pages.facts import Activity, Context, ContextGroup, Histogram, TokenEffect
from bilinear_jax.pages.gather import gather
from bilinear_jax.pages.neuronpedia import EMPTY, export
from bilinear_jax.pages.options import PageOptions
from bilinear_jax.store.datasets import load_corpus

SCHEMA = json.loads((Path(__file__).parents[1] / "data" / "neuronpedia-batch.schema.json").read_text())
DATASET = {"dataset": "stories", "rows": 40, "tokens_per_row": 8}

TOP = ContextGroup(4.0, 6.0, 0.5, [Context(3, 2, 1, [" a", "<script>", "\n"], [0.0, 6.0, 4.5])])
LOWER = ContextGroup(1.0, 2.0, 0.25, [Context(5, 0, 2, ["", "é", "\ud800"], [0.0, -1.0, 2.0])])
ALIVE = Activity(
    feature=5,
    density=0.02,
    largest=6.0,
    top_tokens=["<script>"],
    top=TOP,
    lower=[LOWER],
    histogram=Histogram([0.0, 2.0, 6.0], [3, 1]),
    raised=[TokenEffect("␣dog", 1.5), TokenEffect("cat", 1.0)],
    lowered=[TokenEffect("↵", -2.0)],
)
DEAD = Activity(2, 0.0, 0.0, [], ContextGroup(0.0, 0.0, 0.0, []), [], Histogram([], []), ALIVE.raised, ALIVE.lowered)


@pytest.fixture(scope="module")
def made() -> tuple[LanguageModel, SAE]:
    config = TransformerConfig(1, 1, 4, 5, 8, 30, attn_scale=0.5)
    lm = LanguageModel(published.make_params(config), config, source="someone/small")
    return lm, SAE.init(SAEConfig("attn_out", 0, 4, 2, 2), jax.random.key(0))


def written(out: Path) -> list[dict]:
    files = sorted(out.glob("batch-*.json"), key=lambda path: int(path.stem.removeprefix("batch-")))
    return [json.loads(path.read_text()) for path in files]


def test_batches_fit_the_schema(made, tmp_path):
    out = export(
        *made, [ALIVE, DEAD, dataclasses.replace(DEAD, feature=0)], tmp_path / "np", features_per_file=2, **DATASET
    )
    batches = written(out)
    for batch in batches:
        jsonschema.validate(batch, SCHEMA, cls=jsonschema.Draft202012Validator)
    assert [[one["feature_index"] for one in batch["features"]] for batch in batches] == [[5, 2], [0]]
    assert sorted(path.name for path in out.iterdir()) == ["batch-0.json", "batch-1.json", "neuronpedia.json"]
    for batch in batches:
        source = {name: value for name, value in batch.items() if name != "features"}
        # the source's name on Neuronpedia, "<layer>-<set>", is that of the SAE
        assert source == {"model_id": "small", "layer": 0, "sae_set": "attn-out-x2-k2", "sae_id_suffix": None}


def test_the_schema_refuses_what_the_reader_would_trip_over(made, tmp_path):
    batch = written(export(*made, [ALIVE], tmp_path / "np", **DATASET))[0]
    for break_it in (
        lambda feature: feature.pop("correlated_neurons_l1"),
        lambda feature: feature.update(frac_nonzero="2%"),
        lambda feature: feature.update(extra=1),
        lambda feature: feature["activations"][0].update(values=[]),
        lambda feature: feature["activations"][0].pop("bin_contains"),
    ):
        broken = json.loads(json.dumps(batch))
        break_it(broken["features"][0])
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(broken, SCHEMA)


def test_what_a_feature_says(made, tmp_path):
    lm, sae = made
    alive, dead = written(export(lm, sae, [ALIVE, DEAD], tmp_path / "np", **DATASET))[0]["features"]
    assert (alive["pos_str"], alive["pos_values"]) == ([" dog", "cat"], [1.5, 1.0])
    assert (alive["neg_str"], alive["neg_values"]) == (["↵"], [-2.0])
    assert (alive["freq_hist_data_bar_values"], alive["freq_hist_data_bar_heights"]) == ([1, 4], [3, 1])
    assert alive["activations"] == [
        {
            "bin_min": -1,
            "bin_max": 6,
            "bin_contains": -1,
            "tokens": [" a", "<script>", "\n"],
            "values": [0, 6, 4.5],
            "qualifying_token_index": 1,
        },
        # of a quarter of its activations, which are 2% of the tokens
        {
            "bin_min": 1,
            "bin_max": 2,
            "bin_contains": 0.005,
            "tokens": ["", "é", "\ud800"],
            "values": [0, -1, 2],
            "qualifying_token_index": 2,
        },
    ]
    assert dead["activations"] == dead["freq_hist_data_bar_values"] == dead["freq_hist_data_bar_heights"] == []
    assert (dead["frac_nonzero"], alive["frac_nonzero"], dead["pos_values"]) == (0, 0.02, [1.5, 1.0])
    for feature in (alive, dead):
        assert (feature["n_prompts_total"], feature["n_tokens_in_prompt"], feature["dataset"]) == (40, 8, "stories")
        assert all(feature[name] == [] for name in EMPTY)
        # every token's logit is in one bar, and is moved through the attention's factor
        effects = 0.5 * np.asarray(lm.w_u) @ np.asarray(sae.w_dec)[:, feature["feature_index"]]
        values, heights = (np.array(feature[f"logits_hist_data_bar_{kind}"]) for kind in ("values", "heights"))
        assert heights.sum() == 30 and len(values) == len(heights) == 50
        half = (values[1] - values[0]) / 2
        np.testing.assert_allclose([values[0] - half, values[-1] + half], [effects.min(), effects.max()], rtol=1e-2)


def test_gathered_facts_with_whole_rows(tmp_path):
    # The largest value of every context, which Neuronpedia looks for itself, is the code that the model gives there
    lm = load("ts-nano")
    tracer = Tracer(lm, 2)
    tokens = np.asarray(load_corpus("ts-nano")[:4], np.int32)
    codes = np.array(tracer.out.encode(lm.capture(tokens, [("mlp_out", 2)])["mlp_out", 2]))
    codes[:, 0] = 0
    feature = int(np.argmax((codes != 0).sum(axis=(0, 1))))
    options = PageOptions(window=256, contexts=3, pairs=1, eigenpairs=1, reads=1, heat_map=1, pair_contexts=0)
    site = gather(tracer, [feature], tokens=tokens, options=options, command="", dataset="corpus")
    facts = [page.activity for page in site.outputs]
    batch = written(export(lm, tracer.out, facts, tmp_path / "np", dataset="corpus", rows=4, tokens_per_row=256))[0]
    jsonschema.validate(batch, SCHEMA, cls=jsonschema.Draft202012Validator)
    found = batch["features"][0]
    assert batch["sae_set"] == tracer.out.name.removeprefix("2-")
    np.testing.assert_allclose(found["frac_nonzero"], (codes[..., feature] != 0).sum() / (4 * 255), rtol=1e-3)
    top = [one for one in found["activations"] if one["bin_min"] == -1]
    assert len(found["activations"]) > len(top) == 3
    rows = {lm.tokenizer.decode(row): row_codes for row, row_codes in zip(tokens, codes[..., feature], strict=True)}
    for one in found["activations"]:
        expected = rows["".join(one["tokens"])]
        np.testing.assert_allclose(one["values"][1:], expected[1:], rtol=1e-3, atol=1e-4)
        here = one["values"][one["qualifying_token_index"]]
        assert one["bin_min"] - 1e-3 <= here <= one["bin_max"] + 1e-3
    best = [max(one["values"]) for one in top]
    assert best == sorted(best, reverse=True) and best[0] == top[0]["bin_max"]


def test_same_facts_same_bytes_and_whole_or_not_at_all(made, tmp_path):
    first, second = (export(*made, [ALIVE, DEAD], tmp_path / name, **DATASET) for name in ("a", "b"))
    assert published.snapshot(first) == published.snapshot(second)
    before = published.snapshot(tmp_path)
    with pytest.raises(FileExistsError, match="force"):
        export(*made, [DEAD], first, **DATASET)
    bad = dataclasses.replace(ALIVE, density=float("nan"))
    with pytest.raises(ValueError, match="feature 5 has a number that is not finite"):
        export(*made, [DEAD, bad], first, force=True, **DATASET)
    assert published.snapshot(tmp_path) == before
    export(*made, [DEAD], first, force=True, features_per_file=1, **DATASET)
    assert len(written(first)) == 1
    other = tmp_path / "mine"
    other.mkdir()
    (other / "thesis.txt").write_text("years of work")
    with pytest.raises(FileExistsError, match="move it away"):
        export(*made, [DEAD], other, force=True, **DATASET)
    (other / "neuronpedia.json").write_text('{"format": "png"}')
    with pytest.raises(FileExistsError, match=r"neuronpedia/1'\. It has format 'png': move it away"):
        export(*made, [DEAD], other, force=True, **DATASET)
    assert len(list(other.iterdir())) == 2


def test_what_is_refused(made, tmp_path):
    lm, sae = made
    nan = dataclasses.replace(lm, params=lm.params | {"w_u": lm.params["w_u"] * jnp.nan})
    for activities, options, message in [
        ([], {}, "there is no feature to export"),
        ([ALIVE, DEAD, ALIVE], {}, "feature 5 of SAE 0-attn-out-x2-k2 is given twice"),
        ([ALIVE], {"features_per_file": 0}, "must be at least 1, got 0, 40 and 8"),
        ([ALIVE], {"lm": nan}, "feature 5 has a number that is not finite"),
        ([ALIVE], {"lm": dataclasses.replace(lm, source=None)}, "pass model_id="),
    ]:
        options = {"lm": lm, **DATASET, **options}
        with pytest.raises(ValueError, match=message):
            export(sae=sae, activities=activities, out=tmp_path / "np", **options)
    with pytest.raises(UnknownNameError, match=r"no feature 8 in SAE 0-attn-out-x2-k2: choose one of 0 \.\.\. 7"):
        export(*made, [dataclasses.replace(DEAD, feature=8)], tmp_path / "np", **DATASET)
    assert not list(tmp_path.iterdir())
    out = export(
        dataclasses.replace(lm, source=None), sae, [DEAD], tmp_path / "np", model_id="mine", set_name="s", **DATASET
    )
    assert (written(out)[0]["model_id"], written(out)[0]["sae_set"]) == ("mine", "s")
