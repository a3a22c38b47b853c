"""``python -m weights_convert SOURCE OUT``: the same as ``bilinear-jax convert``."""

import sys

from bilinear_jax import cli


def main(arguments: list[str] | None = None) -> int:
    """Convert as the command line says; returns the exit status."""
    return cli.main(["convert", *(sys.argv[1:] if arguments is None else arguments)])


if __name__ == "__main__":
    sys.exit(main())
