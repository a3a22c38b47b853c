"""Training dictionaries by a recipe: each that ships is run with a tiny model."""

import json

import numpy as np
import pytest
from small_recipes import RUN, command, options

import bilinear_jax as bj
from bilinear_jax.measure.evaluation import evaluate_saes, to_json
from bilinear_jax.nn.sae import SAE
from bilinear_jax.store.sources import sae_names
from bilinear_jax.store.tokens import open_tokens
from bilinear_jax.training.batches import held_out_rows
from bilinear_jax.training.recipes import read_recipe
from bilinear_jax.training.runs import train_saes


class TestSAEs:
    SMALL = RUN | {"recipe.batch_size": "16", "recipe.buffer_tokens": "64", "recipe.rows": "4", "saes.ks": "2"}

    @pytest.mark.parametrize(("name", "site", "trained"), [
        ("fw", "mlp_in", "0-mlp-in-x8-k2"),
        ("ts", "resid_mid", "0-resid-mid-x4-k2"),
    ])  # fmt: skip
    def test_for_a_model_elsewhere(self, run, text, tmp_path, name, site, trained):
        overrides = self.SMALL | {"saes.layers": "0", "saes.sites": site, "recipe.form": "scan"}
        assert train_saes(name, text, tmp_path, model=run / "model", overrides=overrides) == tmp_path / "scope"
        assert sae_names(tmp_path) == [trained] == list(json.loads((tmp_path / "saes.json").read_text()))
        assert bj.load_sae(tmp_path, site).config.k == 2

    def test_the_saes_are_those_that_are_published(self):
        """Of a ts-medium: 6 layers, two sites; of a fw-medium: around the MLP of layer 7; of ts-nano: what ships."""
        names = {
            sae: [config.name for config in read_recipe("sae", sae).saes.configs(read_recipe("lm", model).model)]
            for sae, model in {"ts": "ts", "fw": "fw-medium", "ts-nano": "ts-nano"}.items()
        }
        assert names["ts"] == [f"{layer}-{site}-x4-k30" for layer in range(6) for site in ("resid-mid", "mlp-out")]
        assert names["fw"] == ["7-mlp-in-x8-k30", "7-mlp-out-x8-k30"]
        assert sorted(names["ts-nano"]) == sae_names("ts-nano")

    def test_transcoders_and_thresholds_by_the_command(self, run, text, tmp_path):
        """Of three kinds and two activations; what is saved is used as it was scored."""
        overrides = self.SMALL | {
            **{"saes.kinds": "sae,skip-transcoder,bilinear-transcoder", "saes.activations": "topk_relu,batchtopk"},
            **{"saes.layers": "0", "saes.sites": "mlp_out", "recipe.form": "scan"},
        }
        given = ["--model", run / "model", *options(overrides)]
        assert command("sae", "ts-nano", "--data", text, "--out", tmp_path, *given) == 0
        names = {
            f"0-{sites}-x4-{mark}2{tag}"
            for mark in ("reluk", "batchk")
            for sites, tag in (
                ("mlp-out", ""),
                ("mlp-in-to-mlp-out", "-skip"),
                ("mlp-in-to-mlp-out", "-bilinear"),
            )
        }
        scores = json.loads((tmp_path / "saes.json").read_text())
        assert set(sae_names(tmp_path)) == names == scores.keys()
        lm, rows = bj.load(run / "model"), held_out_rows(open_tokens(run / "tokens").held_out, 16)
        one = bj.load_dictionary(tmp_path / "scope" / "0-mlp-in-to-mlp-out-x4-batchk2-bilinear")
        assert float(one.params["threshold"]) > 0
        assert scores[one.name]["l0"] == pytest.approx(evaluate_saes(lm, [one], rows)[one.name].l0)
        assert np.all(np.asarray(one.encode(lm.capture(rows, [("mlp_in", 0)])["mlp_in", 0])) >= 0)

    def test_a_token_lookup_by_the_command(self, run, text, tmp_path):
        """It is trained, saved and scored; the same command again only scores it, and a plain one lies beside it."""
        overrides = self.SMALL | {
            **{"saes.kinds": "sae,skip-transcoder", "saes.layers": "0", "saes.sites": "mlp_out"},
            **{"recipe.form": "scan", "recipe.lr": "1e-2", "saes.token_lookup": "true", "run.weights": "float32"},
        }
        given = ["sae", "ts-nano", "--data", text, "--out", tmp_path, "--model", run / "model", *options(overrides)]
        assert command(*given) == 0
        names = {"0-mlp-out-x4-k2-lookup", "0-mlp-in-to-mlp-out-x4-k2-skip-lookup"}
        scores = (tmp_path / "saes.json").read_text()
        assert set(sae_names(tmp_path)) == names == json.loads(scores).keys()
        assert command(*given) == 0 and (tmp_path / "saes.json").read_text() == scores
        lm, rows = bj.load(run / "model"), held_out_rows(open_tokens(run / "tokens").held_out, 16)
        one = bj.load_sae(tmp_path, "mlp_out", tag="lookup")
        assert one.config.token_lookup == lm.config.n_vocab == 270 and np.any(one.params["w_lookup"])
        assert json.loads(scores)[one.name]["nmse"] == pytest.approx(evaluate_saes(lm, [one], rows)[one.name].nmse)
        plain = SAE(one.params | {"w_lookup": one.params["w_lookup"] * 0}, one.config)
        assert evaluate_saes(lm, [plain], rows)[one.name].nmse != pytest.approx(json.loads(scores)[one.name]["nmse"])

    def test_a_kind_that_there_is_not_is_named(self, run, text, tmp_path):
        with pytest.raises(ValueError, match=r"no kind 'crosscoder' in saes.kinds: choose one of sae, transcoder"):
            train_saes("ts", text, tmp_path, model=run / "model", overrides={"saes.kinds": "crosscoder"})

    def test_for_the_model_of_the_run(self, run, text):
        """They are found with the model, by the command that trained it in the same folder."""
        overrides = self.SMALL | {"saes.layers": "[0]", "saes.sites": "mlp_in,mlp_out"}
        assert command("sae", "ts-nano", "--data", text, "--out", run, *options(overrides)) == 0
        again = ["--model", run / ".." / run.name / "model"]  # named, it is the same one
        assert command("sae", "ts-nano", "--data", text, "--out", run, *again, *options(overrides)) == 0
        assert not (run / "scope").exists()
        tracer = bj.Tracer(bj.load(run / "model"), layer=0)
        assert (tracer.inp.name, tracer.out.name) == ("0-mlp-in-x4-k2", "0-mlp-out-x4-k2")
        rows = held_out_rows(open_tokens(run / "tokens").held_out, 16)
        by_hand = evaluate_saes(bj.load(run / "model"), [tracer.inp, tracer.out], rows)
        assert (run / "saes.json").read_text() == to_json(by_hand) + "\n"
        with pytest.raises(ValueError, match=r"0-mlp-in-x4-k2 is not what was trained here, in float32"):
            train_saes("ts-nano", text, run, overrides=overrides | {"run.weights": "float32"})

    def test_an_sae_without_its_config_is_told(self, run, text, tmp_path):
        """It is not found by its name then, and its folder is not free."""
        overrides = self.SMALL | {"saes.layers": "0", "saes.sites": "mlp_in", "recipe.form": "scan"}
        given = {"model": run / "model", "overrides": overrides}
        train_saes("ts-nano", text, tmp_path, **given)
        (tmp_path / "scope" / "0-mlp-in-x4-k2" / "config.json").unlink()
        with pytest.raises(
            ValueError, match=r"what was saved cannot be read \(.* has no config.json .*move .*-k2 away and run"
        ):
            train_saes("ts-nano", text, tmp_path, **given)

    def test_a_model_is_needed(self, text, tmp_path, capsys):
        assert command("sae", "ts-nano", "--data", text, "--out", tmp_path) == 1
        assert "train it with `bilinear-jax train lm`, or name one with --model" in capsys.readouterr().err

    def test_a_layer_that_the_model_lacks(self, run, text, tmp_path):
        with pytest.raises(ValueError, match=r"saes.layers must lie in 0 ... 0 for this model, got \[7\]"):
            train_saes("fw", text, tmp_path, model=run / "model")
