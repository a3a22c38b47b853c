"""Measurements on data: what features do on text, and how the model changes without them.

Every measurement takes a model (or a ``Tracer``, which holds one) and token ids. It goes through
``LanguageModel.batches`` once, or a few times, adds up sums, and divides them at the end.

    activations     the largest activations of every feature
    cofiring        which input features fire together
    pairs           what pairs of input features do to an output feature
    evaluation      how well a dictionary replaces the site that it reconstructs; sums: of one batch
    controls        random dictionaries to compare trained ones with
    saebench        SAEs as SAEBench takes them
    correlation     how well a few eigenpairs predict a feature
    interventions   ablation of pairs of features, steering of features
    squares         ablation and steering of eigenpairs
    bilinear_form   gated models as bilinear tensors; certificate and quadratic: how far, and what they are

It may import ``explain`` and what that imports. ``show`` and ``pages`` draw the results.
"""
