"""How much a site of feature pages shows."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class PageOptions:
    """How much the pages show. The comment of a field is also its help on the command line."""

    rows: int = 512  # rows of the dataset that are used, evenly spaced; all rows if it has fewer
    batch_size: int = 16  # rows that are run through the model at once; the result changes only by rounding
    contexts: int = 10  # contexts of the largest activations of a feature, each from another row
    groups: int = 3  # equal parts into which a feature's activations are split by size; samples are drawn from each
    samples: int = 3  # contexts drawn from each of these parts
    window: int = 10  # tokens shown on either side of the token that a context is about
    bins: int = 30  # bars of the activation histogram
    top_tokens: int = 5  # tokens that describe a feature in lists
    logits: int = 10  # tokens listed as raised, and tokens listed as lowered
    squares: int = 6  # eigenpairs by firing that say what makes a feature fire; at most the number of the MLP's inputs
    square_contexts: int = 2  # contexts in which such an eigenpair is largest
    firings: int = 6  # tokens at which the feature fires most, each with what every such eigenpair adds there
    scored_rows: int = 128  # rows that eigenpairs are chosen on (the first half) and scored on (the second)
    pairs: int = 20  # pairs of input features in each list, by weight and by data
    pair_contexts: int = 2  # contexts shown for a pair, in which both features fire
    eigenpairs: int = 10  # eigenvalues of the interaction matrix; at most the number of inputs of the MLP
    reads: int = 4  # input features listed for each eigenvector
    heat_map: int = 24  # input features of the interaction heat map, taken from the first pairs of both lists

    def __post_init__(self):
        for field in dataclasses.fields(self):
            least = (
                0
                if field.name
                in ("samples", "window", "logits", "pair_contexts", "square_contexts", "firings", "scored_rows")
                else 1
            )
            if getattr(self, field.name) < least:
                raise ValueError(f"{field.name} must be at least {least}, got {getattr(self, field.name)}")
