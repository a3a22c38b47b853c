"""Training a language model by a recipe: each that ships is run with a tiny model."""

import json
import shutil

import numpy as np
import pytest
from small_recipes import NO_SAMPLES, RUN, TINY, command, options

import bilinear_jax as bj
from bilinear_jax.explain.mlp import mlp_tensor
from bilinear_jax.store.checkpoint import add_checksums
from bilinear_jax.store.tokenizers import save_tokenizer, train_tokenizer
from bilinear_jax.store.tokens import open_tokens
from bilinear_jax.training import runs
from bilinear_jax.training.batches import held_out_rows
from bilinear_jax.training.recipes import read_recipe, recipe_names
from bilinear_jax.training.runs import train_language, train_saes


class TestLanguageModel:
    def test_the_model_is_whole(self, run, text):
        """It loads by itself, writes with its own tokenizer, and its score is that of what was saved."""
        lm = bj.load(run / "model")
        assert (lm.config.n_layer, lm.config.d_model, lm.config.n_vocab, lm.config.gate) == (1, 8, 270, None)
        assert lm.generate("the cat", max_length=4).startswith("the cat")
        tokens = open_tokens(run / "tokens", lm.tokenizer, n_vocab=270)
        assert tokens.n_documents == 150
        assert lm.tokenizer.decode(tokens.held_out, skip_special_tokens=True) == "".join(
            text.read_text().split("<|endoftext|>")[-10:]
        )
        scores = json.loads((run / "model.json").read_text())
        rows = held_out_rows(tokens.held_out, 16)
        assert scores["held_out_loss"] == pytest.approx(float(lm.loss(rows, np.ones_like(rows))), rel=1e-5)
        assert scores["held_out_tokens"] == len(rows) * 15
        assert scores["trained_tokens"] == 3 * 4 * 16
        lines = [json.loads(line) for line in (run / "language" / "metrics.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines] == [2, 3]
        assert {path.name for path in (run / "language" / "checkpoints").iterdir()} == {"2", "3"}
        assert lines[-1]["held_out_loss"] == pytest.approx(scores["held_out_loss"], rel=1e-2)  # saved in bfloat16
        assert json.loads((run / "language" / "samples.jsonl").read_text())["text"].startswith("the cat")

    def test_the_same_again_only_reads(self, run, text, capsys):
        files = [*(run / "model").rglob("*"), run / "tokens", run / "language" / "config.json"]
        before = {path: path.stat().st_mtime_ns for path in files}
        assert command("lm", "ts-nano", "--data", text, "--out", run, *options(TINY | RUN)) == 0
        assert {path: path.stat().st_mtime_ns for path in before} == before
        assert "nats per token on" in capsys.readouterr().out

    @pytest.mark.parametrize(("name", "value", "message"), [
        ("recipe.lr", "0.5", "holds a run with another config"),
        ("data.held_out", "11", "made from another text"),
    ])  # fmt: skip
    def test_another_recipe_in_its_folder_is_refused(self, run, text, capsys, name, value, message):
        assert command("lm", "ts-nano", "--data", text, "--out", run, *options(TINY | RUN | {name: value})) == 1
        assert message in capsys.readouterr().err

    def test_another_tokenizer_in_its_folder_is_refused(self, run, text, tmp_path):
        """Whichever way it is named; and what is there stays as it is."""
        before = (run / "tokenizer.json").read_bytes()
        save_tokenizer(train_tokenizer(text.read_text().split("<|endoftext|>"), 265), tmp_path)
        named = {"data.tokenizer": str(tmp_path / "tokenizer.json")}
        with pytest.raises(ValueError, match=r"tokenizer.json is not the tokenizer of this run: name another --out"):
            train_language("ts-nano", text, run, overrides=TINY | RUN | named)
        with pytest.raises(ValueError, match=r"tokenizer.json is not the tokenizer of this run"):
            train_saes("ts-nano", text, run, model="ts-nano", overrides=RUN)
        assert (run / "tokenizer.json").read_bytes() == before

    def test_a_model_of_another_run_is_not_taken_for_this_ones(self, run, text, tmp_path):
        """Else its score would be written down as that of what was trained now."""
        shutil.copytree(run, tmp_path / "run")
        model, given = tmp_path / "run" / "model", TINY | RUN | NO_SAMPLES
        with pytest.raises(ValueError, match=r"model is not what was trained here, in float32: move .*model away"):
            train_language("ts-nano", text, tmp_path / "run", overrides=given | {"run.weights": "float32"})
        (model / "config.json").unlink()
        with pytest.raises(ValueError, match=r"what was saved cannot be read \(.*: move .*model away and run the"):
            train_language("ts-nano", text, tmp_path / "run", overrides=given)
        shutil.rmtree(model)
        model.mkdir()
        train_language("ts-nano", text, tmp_path / "run", overrides=given)
        assert (tmp_path / "run" / "model.json").read_bytes() == (run / "model.json").read_bytes()

    @pytest.mark.parametrize("sealed_again", [False, True])
    def test_a_model_whose_config_was_edited_is_not_scored(self, run, text, tmp_path, sealed_again):
        """Not even if its checksums were made anew."""
        shutil.copytree(run, tmp_path / "run")
        path, given = tmp_path / "run" / "model" / "config.json", TINY | RUN | NO_SAMPLES
        before = (tmp_path / "run" / "model.json").read_bytes()
        record = json.loads(path.read_text())
        record["config"]["attn_scale"] = 0.25
        path.write_text(json.dumps(record))
        message = r"what was saved cannot be read \(.*config.json is not what was written.*: move .*model away"
        if sealed_again:
            add_checksums(path.parent)
            message = r"model has another config than this run \(attn_scale: 0\.7\d* -> 0\.25\): move .*model away"
        with pytest.raises(ValueError, match=message):
            train_language("ts-nano", text, tmp_path / "run", overrides=given)
        assert (tmp_path / "run" / "model.json").read_bytes() == before

    def test_a_model_with_another_tokenizer_is_not_scored(self, run, text, tmp_path):
        shutil.copytree(run, tmp_path / "run")
        save_tokenizer(train_tokenizer(["other words"], 260), tmp_path / "run" / "model")
        add_checksums(tmp_path / "run" / "model")
        with pytest.raises(ValueError, match=r"model has another tokenizer than this run: move .*model away"):
            train_language("ts-nano", text, tmp_path / "run", overrides=TINY | RUN | NO_SAMPLES)

    @pytest.mark.parametrize("place", ["model", "model/x", "language", "language/checkpoints/3", "tokens", "tokens/x"])
    def test_no_run_within_another(self, run, text, place):
        """It would replace the tokenizer of a model, or be deleted with an old checkpoint."""
        before = sorted(run.rglob("*"))
        with pytest.raises((ValueError, OSError), match=r"is inside a part of another run|tokens is a file"):
            train_language("ts-nano", text, run / place, overrides=TINY | RUN)
        assert sorted(run.rglob("*")) == before

    @pytest.mark.parametrize(
        ("overrides", "message"),
        [
            ({"recipe.anneal": "0.5"}, "a SwiGLU model, with gate='silu'"),
            ({"run.mesh": "3,1"}, "3 parts of a batch"),
            ({"model.n_ctx": "1"}, "n_ctx must be at least 2"),
            ({"model.pad_id": "270"}, "pad_id must lie in 0 ... 269, or none; got 270"),
            ({"data.held_out": "150"}, "150 documents are too few to hold out 150"),
            ({"data.max_tokens": "30"}, "raise max_tokens, which is 30"),
            ({"data.tokenizer": "nope"}, "no folder nope, and no model of that name"),
        ],
    )
    def test_what_cannot_be_trained_is_told_before_the_text_is_tokenised(self, text, tmp_path, overrides, message):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            train_language("ts-nano", text, tmp_path, overrides=TINY | RUN | overrides)
        assert list(tmp_path.iterdir()) == []

    def test_the_home_folder_is_known_or_told(self, text, tmp_path, monkeypatch):
        monkeypatch.setenv("HOME", str(tmp_path / "home"))
        monkeypatch.chdir(tmp_path)
        with pytest.raises(FileNotFoundError, match="home folder in ~nobody-here/run is not known: write the whole"):
            train_language("ts-nano", text, "~nobody-here/run", overrides=TINY | RUN)
        assert not list(tmp_path.iterdir())

        def begins(*arguments, **options):
            raise KeyboardInterrupt(arguments[4])

        monkeypatch.setattr(runs, "fit_language", begins)
        home = tmp_path / "home" / "run"
        with pytest.raises(KeyboardInterrupt, match=rf"^{home / 'language'}$"):
            train_language("ts-nano", text, "~/run", overrides=TINY | RUN)
        assert open_tokens(home / "tokens").n_documents == 150
        assert [path.name for path in tmp_path.iterdir()] == ["home"]

    @pytest.mark.parametrize("name", ["fw-medium", "fw-small"])
    def test_a_large_recipe_trains(self, text, tmp_path, name):
        """Over a mesh of all 8 devices: 4 parts of a batch, 2 of the weights."""
        overrides = TINY | RUN | NO_SAMPLES | {"recipe.batch_size": "8", "run.mesh": "4,2"}
        folder = train_language(name, text, tmp_path, overrides=overrides)
        lm = bj.load(folder)
        assert lm.config == read_recipe("lm", name, overrides).model
        scores = json.loads((tmp_path / "model.json").read_text())
        assert abs(scores["held_out_loss"] - np.log(270)) < 0.3  # hardly trained

    def test_a_swiglu_model_becomes_bilinear(self, swiglu, text, tmp_path):
        """With --model it goes on from there, with that model's tokenizer; what is saved has no gate."""
        model = swiglu[0] / "model"
        assert bj.load(model).config.gate == "silu"
        words = ["lm", "to-bilinear", "--model", model, "--data", text, "--out", tmp_path]
        assert command(*words, *options(RUN | NO_SAMPLES)) == 0
        lm = bj.load(tmp_path / "model")
        assert (lm.config.gate, lm.config.n_layer) == (None, 1)
        assert lm.tokenizer("a cat")["input_ids"] == bj.load(model).tokenizer("a cat")["input_ids"]
        assert mlp_tensor(lm, 0).left.shape == (16, 8)

    def test_no_recipe_is_left_out(self):
        assert recipe_names("lm") == ["fw-medium", "fw-small", "to-bilinear", "ts", "ts-nano"]
        assert recipe_names("sae") == ["fw", "smollm2", "ts", "ts-nano"]

    def test_a_tokenizer_from_a_file(self, run, swiglu):
        assert (swiglu[0] / "tokens").read_bytes() == (run / "tokens").read_bytes()
        assert (swiglu[0] / "tokens.json").read_bytes() == (run / "tokens.json").read_bytes()

    def test_too_small_a_vocabulary_is_refused(self, run, text, tmp_path):
        given = {"data.tokenizer": str(run / "tokenizer.json"), "model.n_vocab": "269"}
        with pytest.raises(ValueError, match="a vocabulary of 270 tokens, but the model only 269"):
            train_language("ts", text, tmp_path, overrides=TINY | RUN | given)
        assert list(tmp_path.iterdir()) == []

    def test_another_size_of_a_new_tokenizer_is_refused(self, run, text):
        """Else the one that is there is taken, and the model has tokens that never come."""
        with pytest.raises(
            ValueError, match="has a tokenizer of 270 token ids, but the model has 280: name another --out"
        ):
            train_language("ts-nano", text, run, overrides=TINY | RUN | {"model.n_vocab": "280"})

    def test_the_loss_does_not_depend_on_the_batch(self, run):
        lm = bj.load(run / "model")
        rows = held_out_rows(open_tokens(run / "tokens").held_out, 16)[:5]
        found = [lm.mean_loss(rows, batch_size=size) for size in (2, 5)]
        assert found[0].tokens == found[1].tokens == 5 * 15
        assert found[0].loss == pytest.approx(found[1].loss, rel=1e-6)

    def test_metrics_go_to_weights_and_biases_too(self, swiglu):
        """And to the same run there, when the run here goes on."""
        out, stub = swiglu
        assert [(each["project"], each["resume"]) for each in stub.started] == [("project", "allow")] * 2
        assert stub.started[0]["id"] == stub.started[1]["id"]
        assert stub.started[0]["config"]["recipe"]["steps"] == 3
        lines = [json.loads(line) for line in (out / "language" / "metrics.jsonl").read_text().splitlines()]
        assert [step for step, _ in stub.logged] == [line["step"] for line in lines]
        assert stub.logged[-1][1]["held_out_loss"] == lines[-1]["held_out_loss"]
