"""A site of feature pages made by hand, with tokens that a page must not obey."""

from bilinear_jax.pages.facts import (
    Activity,
    At,
    Context,
    ContextGroup,
    Eigenpair,
    Feeds,
    HeatMap,
    Histogram,
    InputFeature,
    Making,
    OutputFeature,
    Pair,
    PairList,
    Provenance,
    Score,
    Site,
    Square,
    TokenEffect,
)

CONSTANT = 4  # the input SAE has 4 features: this is the input that is always 1
TOKENS = ["<script>alert(1)</script>", " \"q'", "\u202e", "\x1b[31m", "\n", "   ", "", "é", " &amp;", " dog"]
VALUES = [0.0, 1.0, 2.0, 0.0, 0.5, 0.0, 3.0, 0.0, -2.0, 4.0]
SECOND = [2.0, 0.0, 2.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0, 1.0]


def context(focus: int = 9, second: bool = False) -> Context:
    """One row of the awkward tokens, from position 30 on."""
    return Context(7, 30, focus, TOKENS, VALUES, SECOND if second else None)


def activity(feature: int, density: float, names: list[str]) -> Activity:
    """A feature that fires on the awkward tokens."""
    return Activity(
        feature=feature,
        density=density,
        largest=4.0,
        top_tokens=names,
        top=ContextGroup(4.0, 4.0, 0.5, [context()]),
        lower=[ContextGroup(1.0, 2.0, 0.5, [context(focus=2)])],
        histogram=Histogram([0.0, 2.0, 4.0], [3, 1]),
        raised=[TokenEffect("<b>", 0.7)],
        lowered=[TokenEffect("␣cat", -0.6)],
    )


def dead(feature: int) -> Activity:
    """A feature that never fires."""
    empty = ContextGroup(0.0, 0.0, 0.0, [])
    return Activity(feature, 0.0, 0.0, [], empty, [], Histogram([], []), [], [])


PAIRS = [
    Pair(1, 2, 0.5, 0.25, 0.02, 0.001, False, 0.3, [context(second=True)]),
    Pair(2, 2, -0.25, -0.125, 0.1, 0.1, False, 0.4, [context(second=True)]),
    Pair(0, 3, 0.125, 0.0, 0.0, 0.0, True, 0.4, []),
    Pair(1, CONSTANT, 0.0625, 0.03, 0.3, 0.3, False, None, []),
]
MAKING = Making(
    chosen=1020,
    scored=1275,
    firings=37,
    squares=[
        Square(0.9, 0.75, 0.6, [(1, 0.5), (CONSTANT, -0.25)], [context()]),
        Square(-0.4, -0.25, -0.2, [(3, 0.7)], []),
    ],
    tokens=[At(context(), 1.25, [1.5, -0.5])],
    scores=[
        Score("1 eigenpair", 0.4, 0.1, -2.0, False),
        Score("2 eigenpairs", 0.55, 0.2, None, False),
        Score("rotated, 2", 0.02, 0.0, -9.0, True),
        Score("random directions, 2", 0.125, 0.3, -8.0, True),
        Score("all eigenpairs", 0.9, 1.0, 1.0, False),
    ],
)
MATRIX = [[0.0, 0.125, 0.0], [0.125, -0.25, 0.5], [0.0, 0.5, 1.0]]


def output(one: Activity, r2: float) -> OutputFeature:
    """An output feature with pairs, one of which is interference, one with the constant input."""
    terms = {"shown": 0.5, "pairs": -0.25, "bias": 0.125, "passthrough": 0.0}
    return OutputFeature(
        activity=one,
        norm=2.0,
        effective_rank=1.5,
        making=MAKING,
        eigenpairs=[
            Eigenpair(1.5, 1e-7, 0.5625, [(1, 0.9), (2, -0.4)]),
            Eigenpair(-0.5, 1e-7, 0.0625, [(3, 0.7)]),
        ],
        explained=0.625,
        by_weight=PairList(PAIRS, 0.4, 0.0321, 0.05, terms),
        by_data=PairList(PAIRS[:2], r2, 0.06, 0.09, terms),
        heat_map=HeatMap([0, 1, 2], MATRIX, 0.02),
    )


def site() -> Site:
    """Three output features, the middle one dead, and the four input features that they name."""
    nothing = PairList([], None, None, None, {})
    silent = OutputFeature(dead(11), 0.0, 0.0, None, [], 0.0, nothing, nothing, HeatMap([], [], 0.0))
    outputs = [
        output(activity(10, 0.1, ["␣dog", "<img src=x>"]), 0.35),
        silent,
        output(activity(3, 0.5, ["␣Lily"]), 0.7),
    ]
    feeds = [Feeds(10, 2, 0.5), Feeds(3, 2, -0.25)]
    inputs = [InputFeature(dead(0), [Feeds(10, 3, 0.125)])]
    inputs += [InputFeature(activity(n, n / 10, [f"␣in{n}"]), feeds) for n in (1, 2, 3)]
    origin = Provenance(
        command="bilinear-jax pages --out '<here>'",
        version="0.1.0",
        model="made & <b>by</b> hand",
        model_hash="a" * 64,
        layer=2,
        inp="2-mlp-in",
        inp_hash="b" * 64,
        out="2-mlp-out",
        out_hash="c" * 64,
        tokenizer_hash="d" * 64,
        dataset="rows\u202e.npy",
        dataset_hash="e" * 64,
        rows=8,
        tokens=2040,
    )
    return Site(outputs, inputs, origin)
