"""What can be read from the weights: which inputs make an output, and how.

For any ``BilinearTensor``:
    spectra       eigenvalues and eigenvectors of interaction matrices, exact or matrix-free with bounds
    interactions  the largest interactions between the columns of a basis
    hosvd, cp     structure that all outputs share    similarity  how similar two tensors are

For a language model between two SAEs:
    tracer        ``Tracer``: the MLP of a layer as a tensor between SAE features; its methods on text are in on_text
    mlp           the MLP of a layer as a tensor
    account       every term of an output feature's pre-activation at a token
    at_token      what each eigenpair adds at the tokens of a text
    explained     how much of a feature its first few eigenpairs explain, on other text and beside its controls; its
                  pieces are parts, scores, lookups, removed, replaced and samples
    scan          which features two eigenpairs explain, and which one vetoes (negation), beside random directions
    overview      eigenpairs and interactions of output features, one after another
    logits        the tokens whose logits a feature raises and lowers
    select        the features that a text such as "top:200" or "3,17,20-30" names

This folder imports ``linalg``, ``nn``, ``store`` and ``language``. What needs a dataset is in ``measure``.
"""
