"""The text of ``SAE.summary``."""

from bilinear_jax.nn.sae_config import SAEConfig


def summary_of(c: SAEConfig, size: int) -> str:
    """A dictionary with ``size`` parameters in a few lines."""
    kind = "SAE" if c.target is None else "transcoder"
    target = "it" if c.target is None else f"{c.target} of the same layer"
    scaled = f"divided by {c.normalize:g}" if c.apply_normalize else "not normalised"
    passed = f"coordinates {', '.join(map(str, c.passthrough))} pass" if c.passthrough else "no coordinate passes"
    encoder = "bilinear" if c.bilinear_encoder else "linear"
    extra = [
        text
        for text, there in (
            (f"{c.activation} activation", c.activation != "topk"),
            ("a linear term", c.linear_term),
            ("a bias of the products", c.product_bias),
            ("a linear skip", c.skip),
            (f"reads {c.reads} of {c.inputs} input features a factor", c.inputs is not None),
            (f"a row for each of {c.token_lookup} tokens", c.token_lookup is not None),
        )
        if there
    ]
    number = "a varying number" if c.k is None else c.k
    active = f"{number} active at a token" + (" on average" if c.thresholded and c.k else "")
    return (
        f"{kind} {c.name}: {c.n_features} features, {active}, {size:,} parameters\n"
        f"trained on: {c.site} of layer {c.layer}, d_model {c.d_model}, and reconstructs {target}\n"
        f"encoder: {encoder}, {'a' if c.encoder_bias else 'no'} bias; input {scaled}; {passed} through"
        + "".join(f"; {text}" for text in extra)
    )
