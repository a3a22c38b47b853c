"""Training: one loop for all models, and the loss and the update of each kind.

    runs          train a model or SAEs from a recipe and a text, in one folder
    recipes/      the recipes that ship with the package, and how they are read
    fit           the loop: resume, save, log         checkpoints, folder   what it keeps on disk
    language, sae, images, toy, distil                the loss and the update of each kind
    batches       shuffled windows of a token file    harvest     activations of all sites in one pass
    mesh          several devices and processes       unit_decoder, noise   small parts

This package may import ``measure``, ``store``, ``nn`` and ``language``.
"""
