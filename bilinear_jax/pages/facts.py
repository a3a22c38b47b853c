"""What a feature page states, as plain data. ``gather`` makes it, ``render`` shows it, the JSON files of pages hold it.

Every field is a number, a string, or a list or dataclass of these, so ``dataclasses.asdict`` of a ``Site`` is JSON. A
number that does not exist (the R^2 of a feature that never varies) is None. Texts are raw: ``render`` escapes them. In
a notebook, ``render.notebook`` shows a feature or a site.
"""

import dataclasses

from bilinear_jax.explain.overview import Eigenpair
from bilinear_jax.show.html import Context


@dataclasses.dataclass(frozen=True)
class ContextGroup:
    """Contexts drawn from one range of a feature's activations."""

    low: float  # the range: the smallest |activation|
    high: float  # and the largest
    share: float  # of the feature's activations that lie in the range, 0 to 1
    contexts: list[Context]


@dataclasses.dataclass(frozen=True)
class Histogram:
    """How often a feature's activation lies between two neighbouring edges. Activations of 0 are left out."""

    edges: list[float]  # [n + 1], rising
    counts: list[int]  # [n]


@dataclasses.dataclass(frozen=True)
class TokenEffect:
    """A token whose logit a feature changes by its direct path."""

    token: str  # its label, as show.text.token_label
    effect: float  # logits per unit of activation


@dataclasses.dataclass(frozen=True)
class Activity:
    """What one SAE feature does on the dataset. Input and output features have the same fields."""

    feature: int
    density: float  # share of the tokens at which it fires, 0 to 1; 0 for a dead feature
    largest: float  # its largest |activation|; 0 for a dead feature
    top_tokens: list[str]  # labels of the tokens at its largest activations, the most frequent first
    top: ContextGroup  # the largest activations, each of another row; no contexts if it is dead
    lower: list[ContextGroup]  # samples from equal parts of its activations, the largest first, without those in top
    histogram: Histogram  # empty lists if it is dead
    raised: list[TokenEffect]  # the most raised first
    lowered: list[TokenEffect]  # the most lowered first


@dataclasses.dataclass(frozen=True)
class Pair:
    """Two input features that together act on an output feature, at the tokens at which it fires.

    See ``measure.pairs.PairSummary`` for the numbers.
    """

    i: int  # input features; the constant input of an MLP with biases has the number n_features
    j: int
    weight: float  # (D^T Q D)_ij; off the diagonal it acts twice
    mean: float  # mean contribution to the pre-activation, signed, where the output feature fires
    joint: float  # share of the tokens at which it fires at which both fire, 0 to 1
    everywhere: float  # share of all tokens that count at which both fire
    interference: bool  # it has a weight, but the two never fire together
    r2: float | None  # how well the sum of this pair and all pairs before it in the list predicts the pre-activation
    contexts: list[Context]  # where all three fire; empty if they never do


@dataclasses.dataclass(frozen=True)
class PairList:
    """Pairs chosen in one way, and what all of them together explain where the output feature fires."""

    pairs: list[Pair]
    r2: float | None  # of all of them
    share: float | None  # their share in the sum of all |terms| of the account, 0 to 1
    share_of_pairs: float | None  # their share in the |terms| of all pairs
    terms: dict[str, float]  # mean of each kind of term of the account; "shown": these pairs; they add up to the mean
    # pre-activation


@dataclasses.dataclass(frozen=True)
class Square:
    """One eigenpair by firing (``explain.parts``): ``l (p . x)^2`` in the pre-activation."""

    value: float  # l, its eigenvalue
    mean: float | None  # mean contribution where the feature fires; None if it does not fire on the scoring rows
    share: float | None  # of the mean of x^T Q x there; all eigenpairs together are 1
    finds: list[tuple[int, float]]  # input features, each with its share of what the square adds there
    contexts: list[Context]  # where it is largest, with its contributions as values


@dataclasses.dataclass(frozen=True)
class At:
    """A token at which a feature fires, and what makes it fire there."""

    context: Context
    form: float  # x^T Q x
    contributions: list[float]  # of each square


@dataclasses.dataclass(frozen=True)
class Score:
    """How well some explanation says where a feature fires, and its pre-activation. None: there is no such number."""

    name: str
    average_precision: float | None
    r2: float | None
    r2_active: float | None  # of the pre-activation where the feature fires
    control: bool


@dataclasses.dataclass(frozen=True)
class Making:
    """What makes an output feature fire: its first eigenpairs by firing, on rows that they were not chosen on."""

    chosen: int  # numbers of choosing and of scoring tokens
    scored: int
    firings: int  # scoring tokens at which it fires
    squares: list[Square]  # the largest |l| first
    tokens: list[At]  # the strongest of these tokens, one a row
    scores: list[Score]  # of 1, 2, ... squares, their controls, and of all


@dataclasses.dataclass(frozen=True)
class HeatMap:
    """The interactions between the top input features of one output feature."""

    inputs: list[int]
    matrix: list[list[float]]  # [inputs, inputs], symmetric
    explained: float  # its share in the sum of the squares of all of D^T Q D, 0 to 1


@dataclasses.dataclass(frozen=True)
class OutputFeature:
    """The page of an output feature."""

    activity: Activity
    norm: float  # ||Q||, Frobenius
    effective_rank: float  # of Q
    making: Making | None  # what makes it fire; None of a dataset of one row
    eigenpairs: list[Eigenpair]  # the largest |value| first
    explained: float  # share of these eigenpairs in the sum of the squares of Q, 0 to 1
    by_weight: PairList  # the pairs of largest |weight|
    by_data: PairList  # the pairs that contribute most where it fires
    heat_map: HeatMap


@dataclasses.dataclass(frozen=True)
class Feeds:
    """An output feature whose page names an input feature, with the pair of largest |weight|."""

    output: int
    other: int  # the other input feature of that pair
    weight: float


@dataclasses.dataclass(frozen=True)
class InputFeature:
    """The page of an input feature."""

    activity: Activity
    feeds: list[Feeds]  # the largest |weight| first


@dataclasses.dataclass(frozen=True)
class Provenance:
    """How the numbers were made, so that they can be reproduced."""

    command: str
    version: str  # of bilinear_jax
    model: str
    model_hash: str  # sha256 of the parameters and the config
    layer: int
    inp: str  # names and hashes of the input SAE and the output SAE
    inp_hash: str
    out: str
    out_hash: str
    tokenizer_hash: str
    dataset: str
    dataset_hash: str
    rows: int
    tokens: int  # number of tokens that count: without position 0 and padding


@dataclasses.dataclass(frozen=True)
class Site:
    """All pages."""

    outputs: list[OutputFeature]  # in the order in which they were asked for
    inputs: list[InputFeature]  # every input feature that the page of an output feature names, by number
    provenance: Provenance
