"""The commands of ``bilinear-jax``, a file each.

Each has ``HELP`` (one line), ``EXAMPLES``, ``add_arguments(parser)`` and ``run(options)``. What ``run`` returns is
JSON, which ``--json`` prints; without that, ``text(result)`` is printed. A command that prints for itself returns
nothing and has no ``text``. Nothing is imported at the top of these files that takes a while, for
``bilinear-jax --help`` reads all of them.
"""
