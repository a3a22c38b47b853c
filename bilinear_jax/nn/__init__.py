"""Flax modules and pure functions of their params: the computations, and nothing else.

    architecture  TransformerConfig                   attention   norms, rotary positions, heads
    transformer   the transformer and its layers      sites       capture and edit values inside it
    generation    sampling with a key-value cache     views       weights in the papers' orientation
    sae           sparse autoencoders                 sparse      products that use only active features
    image, toy    image classifiers, toy models       configs     types and sizes of the fields of configs
    folding       gains of norms moved into weights

No files, no tokenizers, no printing. This folder imports only ``errors`` from the rest of the package.
"""
