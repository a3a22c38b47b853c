"""``python -m bilinear_jax``: the command ``bilinear-jax``."""

from bilinear_jax.commands.main import run_and_exit

if __name__ == "__main__":
    run_and_exit()
