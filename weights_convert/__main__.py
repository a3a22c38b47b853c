"""``python -m weights_convert SOURCE OUT``: the same as ``bilinear-jax convert``; with ``export`` first, as that."""

import sys

from bilinear_jax import cli


def main(arguments: list[str] | None = None) -> int:
    """Convert or export as the command line says; returns the exit status."""
    words = sys.argv[1:] if arguments is None else arguments
    return cli.main(words if words[:1] == ["export"] else ["convert", *words])


if __name__ == "__main__":
    sys.exit(main())
