"""Recipes at the smallest sizes, for tests of training from files, and the command."""

import dataclasses

from bilinear_jax.commands.main import main

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


def command(*words: str) -> int:
    return main(["train", *map(str, words)])


def options(values: dict[str, str]) -> list[str]:
    return [part for name, value in values.items() for part in (f"--{name}", value)]
