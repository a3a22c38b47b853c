"""The command ``python -m weights_convert``.

``python -m weights_convert SOURCE OUT`` is ``bilinear-jax convert``. With ``export`` as first word it exports.
"""

import sys

from bilinear_jax.commands import main as cli


def main(arguments: list[str] | None = None) -> int:
    """Convert or export, as the command line says. Returns the exit status."""
    words = sys.argv[1:] if arguments is None else arguments
    return cli.main(words if words[:1] == ["export"] else ["convert", *words])


if __name__ == "__main__":
    sys.exit(main())
