"""The commands of ``bilinear-jax``, one file each. ``main`` finds and runs them; ``common`` has what they share.

Each has ``HELP`` (one line), ``EXAMPLES``, ``add_arguments(parser)`` and ``run(options)``. ``run`` returns JSON, which
``--json`` prints. Otherwise ``text(result)`` is printed. A command that prints for itself returns None and has no
``text``. These files import slow modules only inside functions, because ``bilinear-jax --help`` imports all of them.
This package may import everything.
"""
