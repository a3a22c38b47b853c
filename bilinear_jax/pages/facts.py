"""What a feature page states, as plain data: what ``gather`` finds, ``render`` shows and the pages' JSON files hold.

Every field is a number, a string or a list or dataclass of these, so that ``dataclasses.asdict`` of a ``Site`` is JSON.
A number that doesn't exist (the R^2 of a feature that never varies) is None. Texts are raw: ``render`` escapes them.
In a notebook, features and sites show themselves as HTML, by the same renderers.
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Context:
    """Some tokens of one row of the dataset, each with the activation of a feature there; or of two, for a pair."""

    row: int  # of the dataset
    start: int  # the position of the first token shown
    focus: int  # which of the tokens shown the context is about, from 0
    tokens: list[str]  # the text of each; their concatenation reads as the tokenizer's own decoding
    values: list[float]  # the feature's activation at each; of a pair's first feature
    second: list[float] | None = None  # of a pair's second feature; None where the context is of one feature


@dataclasses.dataclass(frozen=True)
class ContextGroup:
    """Contexts drawn from one range of a feature's activations."""

    low: float  # the range: smallest and largest |activation| that it takes from
    high: float
    share: float  # of the feature's activations that lie in the range, 0 to 1
    contexts: list[Context]


@dataclasses.dataclass(frozen=True)
class Histogram:
    """How often a feature's activation lies between neighbouring edges; activations of 0 are left out."""

    edges: list[float]  # [n + 1], rising
    counts: list[int]  # [n]


@dataclasses.dataclass(frozen=True)
class TokenEffect:
    """A token whose logit a feature moves by its direct path."""

    token: str  # its label, as rendering.token_label
    effect: float  # logits a unit of activation


@dataclasses.dataclass(frozen=True)
class Activity:
    """What one SAE feature does on the dataset; the same for input and output features."""

    feature: int
    density: float  # share of the tokens at which it fires, 0 to 1; 0 for a dead feature
    largest: float  # its largest |activation|; 0 for a dead feature
    top_tokens: list[str]  # labels of the tokens that it is most active on, the most frequent of its top contexts first
    top: ContextGroup  # the largest activations, each of another row; no contexts if it is dead
    lower: list[ContextGroup]  # samples from lower quantiles of its activations, falling
    histogram: Histogram  # empty lists if it is dead
    raised: list[TokenEffect]  # the most raised first
    lowered: list[TokenEffect]  # the most lowered first


@dataclasses.dataclass(frozen=True)
class Pair:
    """Two input features that make an output feature together; see summaries.PairSummary for what the numbers are."""

    i: int  # input features; "the constant input" of an MLP with biases is the number of features
    j: int
    weight: float  # (D^T Q D)_ij; off the diagonal it acts twice
    mean: float  # mean contribution to the pre-activation, signed, over the tokens that count
    mean_when_firing: float | None  # mean contribution over the tokens at which the output feature fires
    joint: float  # share of the tokens at which both fire, 0 to 1
    chance: float  # what it would be by chance
    interference: bool  # it has a weight, and never fires
    r2: float | None  # of this pair and all before it in its list: how well their sum predicts the pre-activation
    contexts: list[Context]  # where both fire; empty if they never do


@dataclasses.dataclass(frozen=True)
class PairList:
    """Pairs chosen one way, and what all of them together say."""

    pairs: list[Pair]
    r2: float | None  # of all of them
    share: float | None  # of the |terms| of the account that they are, 0 to 1
    share_of_pairs: float | None  # of the |terms| of pairs alone
    terms: dict[str, float]  # mean of each kind of term of the account; "shown": these pairs; they add up to the mean
    # pre-activation


@dataclasses.dataclass(frozen=True)
class Eigenpair:
    """One eigenvalue of an interaction matrix, and the input features that its eigenvector reads."""

    value: float
    bound: float  # the eigenvalue is at most this far off
    share: float  # value^2 / ||Q||^2
    reads: list[tuple[int, float]]  # input features and the cosine of their decoder columns with the eigenvector,
    # the largest |cosine| first


@dataclasses.dataclass(frozen=True)
class HeatMap:
    """The interactions between the top input features of one output feature."""

    inputs: list[int]
    matrix: list[list[float]]  # [inputs, inputs], symmetric
    explained: float  # share of the squares of the whole D^T Q D that it holds, 0 to 1


@dataclasses.dataclass(frozen=True)
class OutputFeature:
    """The page of an output feature."""

    activity: Activity
    norm: float  # ||Q||, Frobenius
    effective_rank: float  # of Q
    eigenpairs: list[Eigenpair]  # the largest |value| first
    explained: float  # share of the squares of Q that those eigenpairs are, 0 to 1
    by_weight: PairList  # the pairs of largest |weight|
    by_data: PairList  # the pairs that contribute most on the dataset
    heat_map: HeatMap

    def _repr_html_(self) -> str:
        from bilinear_jax.pages.render import output_fragment

        return output_fragment(self)


@dataclasses.dataclass(frozen=True)
class Feeds:
    """An output feature that has a page on which an input feature stands."""

    output: int
    other: int  # the other input feature of the pair, in the pair of largest |weight|
    weight: float


@dataclasses.dataclass(frozen=True)
class InputFeature:
    """The page of an input feature."""

    activity: Activity
    feeds: list[Feeds]  # the largest |weight| first

    def _repr_html_(self) -> str:
        from bilinear_jax.pages.render import input_fragment

        return input_fragment(self)


@dataclasses.dataclass(frozen=True)
class Provenance:
    """How the numbers came about, so that they can be made again."""

    command: str
    version: str  # of bilinear_jax
    model: str
    model_hash: str  # sha256 of the parameters and the config
    layer: int
    inp: str  # names and hashes of the SAEs
    inp_hash: str
    out: str
    out_hash: str
    tokenizer_hash: str
    dataset: str
    dataset_hash: str
    rows: int
    tokens: int  # that count: position 0 and padding are left out


@dataclasses.dataclass(frozen=True)
class Site:
    """All pages."""

    outputs: list[OutputFeature]  # in the order asked for
    inputs: list[InputFeature]  # every input feature that some output feature's page names, by number
    provenance: Provenance

    def _repr_html_(self) -> str:
        from bilinear_jax.pages.render import site_fragment

        return site_fragment(self)
