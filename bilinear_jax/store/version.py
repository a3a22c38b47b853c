"""The version of the library. It is written into files and shown on the command line."""

from importlib.metadata import PackageNotFoundError, version


def library_version() -> str:
    """The installed version of ``bilinear_jax``.

    Example:
        >>> library_version().count(".") in (0, 2)
        True
    """
    try:
        return version("bilinear-jax")
    except PackageNotFoundError:
        return "not installed"
