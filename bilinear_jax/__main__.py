"""``python -m bilinear_jax``: the command ``bilinear-jax``."""

import sys

from bilinear_jax.cli import main

if __name__ == "__main__":
    sys.exit(main())
