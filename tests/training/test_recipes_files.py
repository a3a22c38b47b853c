"""Recipes as files, and the command that trains by them."""

import sys

import pytest
from small_recipes import RUN, TINY, command

from bilinear_jax.commands.main import main
from bilinear_jax.training.recipes import RECIPES, describe, read_recipe, recipe_names
from bilinear_jax.training.runs import train_language


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

    def test_weights_and_biases_are_asked_for_only_if_wanted(self, text, tmp_path, monkeypatch):
        monkeypatch.setitem(sys.modules, "wandb", None)
        with pytest.raises(ImportError, match=r"pip install 'bilinear-jax\[wandb\]'"):
            train_language("ts", text, tmp_path, overrides=TINY | RUN, wandb="project")
        assert list(tmp_path.iterdir()) == []
