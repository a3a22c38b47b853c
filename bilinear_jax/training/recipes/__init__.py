"""Recipes as TOML files: those that ship with the package, and how a file and overrides become configs.

Each table of a file is a dataclass, and each key is a field of it with the same name:

    kind   table    dataclass
    lm     model    TransformerConfig; absent if an existing model is fine-tuned
           recipe   LanguageRecipe
    sae    saes     SAEGrid
           recipe   SAERecipe
    both   data     DataOptions
           run      RunOptions
"""

import dataclasses
import itertools
import tomllib
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bilinear_jax.errors import UnknownNameError
from bilinear_jax.nn.configs import check_types, fitted, spelled, type_hints
from bilinear_jax.nn.sae_config import SAEConfig, site_name
from bilinear_jax.nn.transformer import TransformerConfig
from bilinear_jax.store.documents import LARGEST_DOCUMENT
from bilinear_jax.store.fields import COUNT, Rule, check_fields, field_comments
from bilinear_jax.training.language import LanguageRecipe
from bilinear_jax.training.sae_recipe import SAERecipe
from weights_convert.files import read_text
from weights_convert.names import ACTIVATIONS

RECIPES = Path(__file__).parent
"""The folder of the recipes that ship with the package: ``lm/*.toml`` and ``sae/*.toml``."""


@dataclasses.dataclass(frozen=True)
class DataOptions:
    """How documents become tokens, see ``store.tokens.tokenize``."""

    tokenizer: str = "new"  # file, folder, hub name or known name; "new": trained on the text, with n_vocab ids
    field: str = "text"  # field with the text in JSONL, Parquet and hub datasets
    held_out: int = 500  # documents at the end that are kept for evaluation
    max_tokens: int | None = None  # stop reading after this many tokens; None: read all
    max_characters: int = LARGEST_DOCUMENT  # most characters of a document; a longer one is an error

    def __post_init__(self):
        check_types(self)
        check_fields(self, COUNT, "held_out")
        check_fields(self, COUNT._replace(most=2**63 - 1), "max_tokens", "max_characters")


@dataclasses.dataclass(frozen=True)
class RunOptions:
    """What a run keeps, and how often it logs and evaluates."""

    save_every: int = 200  # steps between checkpoints
    keep: int = 2  # how many of the newest checkpoints to keep
    keep_every: int | None = None  # also keep the checkpoints of steps that are multiples of this; None: no others
    log_every: int = 20  # steps between lines of metrics.jsonl
    evaluate_every: int = 200  # steps between evaluations on held-out text
    held_out_rows: int | None = None  # rows of n_ctx tokens to evaluate on; None: all held-out rows
    prompts: tuple[str, ...] = ("Once upon a time",)  # texts that a language model continues at each evaluation
    mesh: tuple[int, int] | None = None  # parts of a batch, parts of the weights, over all devices; None: one device
    weights: str = "float32"  # dtype of the saved model or SAEs, "float32" or "bfloat16"

    def __post_init__(self):
        check_types(self)
        if self.weights not in ("float32", "bfloat16"):
            raise ValueError(f"weights must be 'float32' or 'bfloat16', not {self.weights!r}")
        check_fields(self, COUNT, "save_every", "keep", "keep_every", "log_every", "evaluate_every", "held_out_rows")
        check_fields(self, Rule("must be two numbers of at least 1", lambda mesh: min(mesh) >= 1), "mesh")


KINDS: dict[str, dict[str, Any]] = {
    "sae": {},
    "transcoder": {"target": "mlp_out", "encoder_bias": True},
    "skip-transcoder": {"target": "mlp_out", "encoder_bias": True, "skip": True},
    "bilinear-transcoder": {"target": "mlp_out", "bilinear_encoder": True, "product_bias": True},
    "readable-transcoder": {
        "target": "mlp_out",
        "bilinear_encoder": True,
        "encoder_bias": True,
        "product_bias": True,
    },
}
"""The kinds of dictionaries that a recipe can name, each with the fields of its config. Transcoders read mlp_in."""


@dataclasses.dataclass(frozen=True)
class SAEGrid:
    """The dictionaries to train: one for each combination of kind, layer, site, expansion, activation and k."""

    expansions: tuple[int, ...]  # features / d_model
    ks: tuple[int, ...]  # active features per token: of each (topk), on average (batchtopk), a target (jumprelu, relu)
    sites: tuple[str, ...] = ("mlp_in", "mlp_out")  # where the SAEs read; transcoders go from mlp_in to mlp_out
    layers: tuple[int, ...] | None = None  # layers of the sites; None: all
    kinds: tuple[str, ...] = ("sae",)  # sae, transcoder, skip-transcoder, bilinear-transcoder, readable-transcoder
    activations: tuple[str, ...] = ("topk",)  # topk, topk_relu, batchtopk, jumprelu, relu
    tag: str | None = None  # tells these SAEs apart from others with the same properties
    token_lookup: bool = False  # add a learned row for each token of the vocabulary to the reconstructions
    reads: int = 8  # of readable transcoders: most input features of each factor of a product
    inputs_expansion: int = 4  # of readable transcoders: input features / d_model, of the SAE of mlp_in that they read
    inputs_k: int = 20  # of readable transcoders: k of that SAE, which must exist already

    def __post_init__(self):
        check_types(self)
        object.__setattr__(self, "sites", tuple(site_name(site) for site in self.sites))
        each_once = Rule("must name at least one, and each only once", lambda them: 0 < len(them) == len(set(them)))
        check_fields(self, each_once, "sites", "expansions", "ks", "layers", "kinds", "activations")
        for name, known in (("kinds", KINDS), ("activations", ACTIVATIONS)):
            if unknown := [one for one in getattr(self, name) if one not in known]:
                raise UnknownNameError(name[:-1], repr(unknown[0]), known, of=f"saes.{name}")

    def configs(self, model: TransformerConfig) -> list[SAEConfig]:
        """The configs of the dictionaries. Raises ``ValueError`` for a layer that the model does not have.

        Skip, bilinear and readable transcoders have their kind in their tag, and dictionaries with a lookup ``lookup``.

        Example:
            >>> model = TransformerConfig(n_layer=2, n_head=2, d_model=8, d_hidden=16, n_ctx=6, n_vocab=10)
            >>> [config.name for config in SAEGrid(sites=("mlp_in",), expansions=(4,), ks=(2, 3)).configs(model)]
            ['0-mlp-in-x4-k2', '0-mlp-in-x4-k3', '1-mlp-in-x4-k2', '1-mlp-in-x4-k3']
            >>> SAEGrid(expansions=(4,), ks=(2,), kinds=("bilinear-transcoder",)).configs(model)[1].name
            '1-mlp-in-to-mlp-out-x4-k2-bilinear'
        """
        layers = range(model.n_layer) if self.layers is None else self.layers
        if outside := [layer for layer in layers if not 0 <= layer < model.n_layer]:
            raise ValueError(f"saes.layers must lie in 0 ... {model.n_layer - 1} for this model, got {outside}")
        found = []
        for layer, kind in itertools.product(layers, self.kinds):
            sites = self.sites if kind == "sae" else ("mlp_in",)
            mark = kind.removesuffix("-transcoder") if "-" in kind else None
            tag = "-".join(part for part in (mark, "lookup" if self.token_lookup else None, self.tag) if part) or None
            lookup = model.n_vocab if self.token_lookup else None
            for site, expansion, activation, k in itertools.product(sites, self.expansions, self.activations, self.ks):
                options = {"tag": tag, "activation": activation, "token_lookup": lookup, **KINDS[kind]}
                if kind == "readable-transcoder":
                    inputs = self.inputs_expansion * model.d_model
                    options |= {"inputs": inputs, "inputs_k": self.inputs_k, "reads": self.reads}
                found.append(SAEConfig(site, layer, model.d_model, expansion, k, **options))
        return found


@dataclasses.dataclass(frozen=True)
class Recipe:
    """The content of a recipe's file, with overrides applied."""

    name: str  # file name without .toml
    recipe: Any  # LanguageRecipe or SAERecipe
    data: DataOptions
    run: RunOptions
    model: TransformerConfig | None = None  # for kind "lm": the model to train; None: an existing one
    saes: SAEGrid | None = None  # for kind "sae"


_TABLES: dict[str, dict[str, type]] = {
    "lm": {"model": TransformerConfig, "recipe": LanguageRecipe, "data": DataOptions, "run": RunOptions},
    "sae": {"saes": SAEGrid, "recipe": SAERecipe, "data": DataOptions, "run": RunOptions},
}


def recipe_names(kind: str) -> list[str]:
    """The names of the recipes that ship with the package, of a kind, "lm" or "sae".

    Example:
        >>> "ts-nano" in recipe_names("lm")
        True
    """
    return sorted(path.stem for path in (RECIPES / kind).glob("*.toml"))


def read_recipe(kind: str, source: str | Path, overrides: Mapping[str, Any] | None = None) -> Recipe:
    """Read a recipe that ships with the package, by its name, or any TOML file.

    Args:
        kind: "lm" or "sae".
        source: the name, or a path that ends in ``.toml``.
        overrides: values by dotted name, ``{"recipe.steps": 10}``. A string is read as on a command line: "10",
            "[1, 2]", "none".

    Raises:
        FileNotFoundError: if the recipe or the file does not exist. The message lists the recipes.
        ValueError: if the file is not TOML, if a table, field or type is not expected, or if a field is missing.

    Example:
        >>> read_recipe("lm", "ts-nano", {"recipe.steps": "10", "model.gate": "silu"}).recipe.steps
        10
    """
    path = Path(source)
    if path.suffix != ".toml":
        path = RECIPES / kind / f"{source}.toml"
    if not path.is_file():
        names = ", ".join(recipe_names(kind))
        raise FileNotFoundError(f"there is no recipe {source}: name one of {names}, or a file that ends in .toml")
    try:
        tables = tomllib.loads(read_text(path))
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path} is not TOML ({error}): fix that place") from error
    for name, value in (overrides or {}).items():
        table, _, field = name.partition(".")
        _fields(kind, table, path)
        tables.setdefault(table, {})[field] = _Text(value) if isinstance(value, str) else value
    made = {}
    for table, values in tables.items():
        fields = _fields(kind, table, path)
        if not isinstance(values, dict):
            raise ValueError(f"{path}: {table} must be a table, [{table}], not {values!r}")
        made[table] = _make(_TABLES[kind][table], fields, table, values, path)
    made = {"data": DataOptions(), "run": RunOptions()} | made
    required = {"recipe"} | ({"saes"} if kind == "sae" else set())
    if missing := sorted(required - made.keys()):
        raise ValueError(f"{path} has no table {', '.join(f'[{name}]' for name in missing)}: add it")
    return Recipe(name=path.stem, **made)


def describe(kind: str) -> str:
    """Every field of a recipe as an option of the command line, with its meaning, type and default.

    Example:
        >>> print(describe("sae").splitlines()[0])
        [saes]
    """
    lines = []
    for table, cls in _TABLES[kind].items():
        lines.append(f"[{table}]")
        comments = field_comments(cls)
        hints = type_hints(cls)
        for field in dataclasses.fields(cls):
            default = "" if field.default is dataclasses.MISSING else f"; {_as_typed(field.default)}"
            lines.append(f"  --{table}.{field.name}  {comments[field.name]} ({spelled(hints[field.name])}{default})")
    return "\n".join(lines)


def _as_typed(value: Any) -> str:
    """A value as typed on a command line."""
    if isinstance(value, tuple):
        return ",".join(map(_as_typed, value))
    return "none" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


class _Text(str):
    """A value as it was typed on a command line."""


def _fields(kind: str, table: str, path: Path) -> dict[str, Any]:
    """The fields of a table and their types."""
    if table not in _TABLES[kind]:
        raise ValueError(f"{path}: there is no table {table}; this kind of recipe has {', '.join(_TABLES[kind])}")
    cls = _TABLES[kind][table]
    hints = type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def _make(cls: type, fields: Mapping[str, Any], table: str, values: Mapping[str, Any], path: Path) -> Any:
    if unknown := sorted(values.keys() - fields.keys()):
        raise ValueError(f"{path}: there is no field {table}.{unknown[0]}; {table} has {', '.join(fields)}")
    required = [f.name for f in dataclasses.fields(cls) if f.default is f.default_factory is dataclasses.MISSING]
    if missing := [name for name in required if name not in values]:
        listing = ", ".join(f"{table}.{name}" for name in missing)
        raise ValueError(f"{path} lacks {listing}: add it to [{table}], or give it as --{table}.{missing[0]} VALUE")
    try:
        return cls(**{name: _converted(value, fields[name], f"{table}.{name}") for name, value in values.items()})
    except (ValueError, UnknownNameError) as error:
        raise ValueError(f"{path}: {error}") from error


def _converted(value: Any, hint: Any, name: str) -> Any:
    """A value converted to a field's type. A typed text may have several meanings: 1e-3 is a number, 1,2 a list."""
    candidates: list[Any] = [value]
    if isinstance(value, _Text):
        candidates = [_as_toml(value), str(value), [_as_toml(part.strip()) for part in value.strip("[] ").split(",")]]
    for candidate in candidates:
        fits, result = fitted(None if candidate == "none" and type(None) in typing.get_args(hint) else candidate, hint)
        if fits:
            return result
    raise ValueError(f"{name} must be {spelled(hint)}, not {str(value) if isinstance(value, _Text) else repr(value)}")


def _as_toml(text: str) -> Any:
    """The value that a text has in a TOML file; the text itself if it has none."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return str(text)
