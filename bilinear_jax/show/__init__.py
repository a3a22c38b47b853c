"""Draw and print results: arrays in, a figure, a text or HTML out.

    figures       matplotlib figures                  drawing     what all figures share
    text          tokens as readable, shaded text     html        the same for pages and notebooks
    visualizer    prints what a feature fires on

It may import ``measure`` and what that imports. Whole pages are made in ``pages``.
"""
