"""Recipes as files, and the command that trains by them: each that ships is run with a tiny model."""

import dataclasses
import json
import shutil
import sys

import numpy as np
import pytest

import bilinear_jax as bj
from bilinear_jax.commands.main import main
from bilinear_jax.explain.tracer import mlp_tensor
from bilinear_jax.measure.evaluation import evaluate_saes, to_json
from bilinear_jax.store.checkpoint import add_checksums
from bilinear_jax.store.sources import sae_names
from bilinear_jax.store.tokenizers import save_tokenizer, train_tokenizer
from bilinear_jax.store.tokens import open_tokens
from bilinear_jax.training import runs
from bilinear_jax.training.batches import held_out_rows
from bilinear_jax.training.recipes import RECIPES, describe, read_recipe, recipe_names
from bilinear_jax.training.runs import train_language, train_saes

TINY = {
    "model.n_layer": "1",
    "model.n_head": "2",
    "model.d_model": "8",
    "model.d_hidden": "16",
    "model.n_ctx": "16",
    "model.n_vocab": "270",
    "model.pad_id": "0",
    "data.tokenizer": "new",
    "run.prompts": "the cat",
}
RUN = {"recipe.steps": "3", "recipe.batch_size": "4", "data.held_out": "10", "data.max_tokens": "none"}
NO_SAMPLES = {"run.prompts": "[]"}


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """150 documents of 30 of 12 words."""
    random = np.random.default_rng(0)
    words = ["the", "cat", "sat", "on", "a", "mat", "and", "saw", "one", "dog", "who", "ran"]
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("<|endoftext|>".join(" ".join(random.choice(words, 30)) for _ in range(150)))
    return path


@pytest.fixture(scope="module")
def run(text, tmp_path_factory):
    """A run of ts-nano, tiny."""
    out = tmp_path_factory.mktemp("run")
    kept = {"run.save_every": "1", "run.keep": "1", "run.keep_every": "2", "run.log_every": "2"}
    train_language("ts-nano", text, out, overrides=TINY | RUN | kept)
    return out


@dataclasses.dataclass
class WeightsAndBiases:
    """A stub of the package ``wandb``: what it was told."""

    started: list[dict] = dataclasses.field(default_factory=list)
    logged: list[tuple[int, dict]] = dataclasses.field(default_factory=list)

    def init(self, **options):
        self.started.append(options)
        return self

    def log(self, metrics, *, step):
        self.logged.append((step, metrics))


@pytest.fixture(scope="module")
def swiglu(run, text, tmp_path_factory):
    """A run of ts as a SwiGLU model, with the tokenizer of the other run, twice, and what it sent to wandb."""
    out, stub = tmp_path_factory.mktemp("swiglu"), WeightsAndBiases()
    overrides = TINY | RUN | NO_SAMPLES | {"model.gate": "silu", "data.tokenizer": str(run / "tokenizer.json")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "wandb", stub)
        for _ in range(2):
            train_language("ts", text, out, overrides=overrides, wandb="project")
    return out, stub


def command(*words: str) -> int:
    return main(["train", *map(str, words)])


def options(values: dict[str, str]) -> list[str]:
    return [part for name, value in values.items() for part in (f"--{name}", value)]


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


class TestFiles:
    @pytest.mark.parametrize(
        "path", sorted(RECIPES.glob("*/*.toml")), ids=lambda path: f"{path.parent.name}-{path.stem}"
    )
    def test_the_head_says_command_cost_and_score(self, path):
        head = path.read_text().split("\n[")[0]
        assert f"bilinear-jax train {path.parent.name} {path.stem} " in head
        assert all(
            f"# {word}:  " in head.replace(":     ", ":  ").replace(":    ", ":  ")
            for word in ("Command", "Cost", "Score")
        )
        assert max(map(len, path.read_text().splitlines())) <= 120

    @pytest.mark.parametrize(
        ("name", "typed", "expected"),
        [
            ("recipe.lr", "1e-3", 1e-3),
            ("recipe.lr", "1", 1.0),
            ("recipe.steps", "15_000", 15_000),
            ("model.gate", "relu", "relu"),
            ("model.gate", "none", None),
            ("model.bilinear", "false", False),
            ("model.normalization", "true,true,false", (True, True, False)),
            ("recipe.betas", "[0.8, 0.9]", (0.8, 0.9)),
            ("model.tokenizer", "4096", "4096"),
            ("run.prompts", "Once", ("Once",)),
        ],
    )
    def test_what_is_typed_becomes_what_the_field_is(self, name, typed, expected):
        table, field = name.split(".")
        value = getattr(getattr(read_recipe("lm", "ts", {name: typed}), table), field)
        assert value == expected
        assert type(value) is type(expected)

    @pytest.mark.parametrize(
        ("overrides", "message"),
        [
            ({"recipe.step": "3"}, r"no field recipe.step; recipe has steps, batch_size, "),
            ({"recipes.steps": "3"}, r"no table recipes; this kind of recipe has model, recipe, data, run"),
            ({"recipe.steps": "3.5"}, "recipe.steps must be a whole number, not 3.5"),
            ({"recipe.steps": "true"}, "recipe.steps must be a whole number, not true"),
            ({"model.bias": "1"}, "model.bias must be true or false, not 1"),
            ({"recipe.betas": "0.9,x"}, r"recipe.betas must be a list \[a number"),
            ({"data.max_tokens": "many"}, 'data.max_tokens must be a whole number or "none", not many'),
            ({"model.n_head": "3"}, "d_model .512. must be a multiple of"),
            ({"run.weights": "int8"}, "weights must be 'float32' or 'bfloat16'"),
            ({"run.save_every": "0"}, "ts.toml: save_every must be at least 1, got 0"),
            ({"run.held_out_rows": "0"}, "held_out_rows must be at least 1, got 0"),
            ({"run.mesh": "-1,-1"}, "mesh must be two numbers of at least 1"),
            ({"data.held_out": "0"}, "held_out must be at least 1, got 0"),
            ({"data.max_tokens": "-5"}, "max_tokens must be at least 1, got -5"),
            ({"recipe.steps": str(10**30)}, f"ts.toml: steps must be at most 2147483647, got 1{'0' * 30}"),
            ({"recipe.steps": str(2**31)}, "steps must be at most 2147483647, got 2147483648"),
            ({"recipe.lr": "1e300"}, "lr must be at most 2147483647, got 1e[+]300"),
            ({"recipe.warmup": str(10**30)}, "warmup must be at most 2147483647"),
            ({"run.save_every": str(10**30)}, "save_every must be at most 2147483647"),
            ({"data.max_tokens": str(10**30)}, f"max_tokens must be at most {2**63 - 1}, got 10"),
        ],
    )
    def test_what_does_not_fit_is_named(self, overrides, message):
        with pytest.raises(ValueError, match=message):
            read_recipe("lm", "ts", overrides)

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ("[recipe]\nsteps = ", "own.toml is not TOML"),
            ("[model]\nn_layer = 2\n[recipe]\nsteps = 1", "lacks model.n_head, model.d_model, .*--model.n_head VALUE"),
            ("[data]\nheld_out = 3", r"own.toml has no table \[recipe\]"),
            ("recipe = 3", r"recipe must be a table, \[recipe\], not 3"),
            ('[recipe]\nsteps = "3"', "recipe.steps must be a whole number, not '3'"),
            ("[saes]\nks = [3]", "no table saes; this kind of recipe has model"),
        ],
    )  # fmt: skip
    def test_a_file_of_ones_own(self, tmp_path, content, message):
        (tmp_path / "own.toml").write_text(content)
        with pytest.raises(ValueError, match=message):
            read_recipe("lm", tmp_path / "own.toml")

    @pytest.mark.parametrize(
        ("overrides", "message"),
        [
            ({"saes.ks": "[]"}, "ks must name at least one, and each only once"),
            ({"saes.layers": "[]"}, "layers must name at least one"),
            ({"saes.expansions": "4,4"}, r"expansions must name at least one, and each only once, got \(4, 4\)"),
            ({"saes.sites": "mlp_in,mlp-in"}, r"and each only once, got \('mlp_in', 'mlp_in'\)"),
            (
                {"saes.sites": "mlp"},
                r"ts.toml: there is no site 'mlp' in what an SAE can read: choose one of resid_pre",
            ),
        ],
    )
    def test_a_grid_of_saes_names_each_once(self, overrides, message):
        with pytest.raises(ValueError, match=message):
            read_recipe("sae", "ts", overrides)

    def test_a_file_without_a_model_is_for_fine_tuning(self, tmp_path, text, capsys):
        (tmp_path / "own.toml").write_text("[recipe]\nsteps = 3")
        assert read_recipe("lm", tmp_path / "own.toml").model is None
        assert command("lm", tmp_path / "own.toml", "--data", text, "--out", tmp_path / "run") == 1
        assert "name the model to fine-tune with --model" in capsys.readouterr().err
        assert not (tmp_path / "run").exists()


class TestCommand:
    def test_the_help_lists_recipes_examples_and_fields(self, capsys):
        for kind in ("lm", "sae"):
            with pytest.raises(SystemExit) as stopped:
                command(kind, "--help")
            assert stopped.value.code == 0
            printed = capsys.readouterr().out
            assert f"bilinear-jax train {kind} ts-nano --data" in printed
            assert f"recipes: {', '.join(recipe_names(kind))}" in printed
            assert "  --recipe.steps  updates in all (a whole number)" in printed
            assert describe(kind) in printed

    @pytest.mark.parametrize(
        "words", [["lm"], ["lm", "ts-nano"], ["lm", "ts-nano", "--data", "x", "--out", "y", "--a.b"]]
    )
    def test_wrong_use(self, words):
        with pytest.raises(SystemExit) as stopped:
            command(*words)
        assert stopped.value.code == 2

    def test_an_override_is_not_for_another_command(self, capsys):
        with pytest.raises(SystemExit):
            main(["tour", "--model.n_layer", "2"])
        assert "unrecognized arguments: --model.n_layer" in capsys.readouterr().err

    def test_overrides_stand_anywhere(self, text, tmp_path, capsys):
        words = ["--recipe.lr=nan", "lm", "--model.gate", "wrong", "--data", text, "--out", tmp_path, "--", "ts"]
        with pytest.raises(SystemExit):
            command(*words)
        assert "unknown gate 'wrong'" in capsys.readouterr().err

    def test_metrics_go_to_weights_and_biases_too(self, swiglu):
        """And to the same run there, when the run here goes on."""
        out, stub = swiglu
        assert [(each["project"], each["resume"]) for each in stub.started] == [("project", "allow")] * 2
        assert stub.started[0]["id"] == stub.started[1]["id"]
        assert stub.started[0]["config"]["recipe"]["steps"] == 3
        lines = [json.loads(line) for line in (out / "language" / "metrics.jsonl").read_text().splitlines()]
        assert [step for step, _ in stub.logged] == [line["step"] for line in lines]
        assert stub.logged[-1][1]["held_out_loss"] == lines[-1]["held_out_loss"]

    def test_weights_and_biases_are_asked_for_only_if_wanted(self, text, tmp_path, monkeypatch):
        monkeypatch.setitem(sys.modules, "wandb", None)
        with pytest.raises(ImportError, match=r"pip install 'bilinear-jax\[wandb\]'"):
            train_language("ts", text, tmp_path, overrides=TINY | RUN, wandb="project")
        assert list(tmp_path.iterdir()) == []
