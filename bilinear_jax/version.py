"""Which version of the library this is; what is written to disk, and the command line, say so."""

from importlib.metadata import PackageNotFoundError, version


def library_version() -> str:
    """The version of ``bilinear_jax`` as it is installed.

    Example:
        >>> library_version().count(".") in (0, 2)
        True
    """
    try:
        return version("bilinear-jax")
    except PackageNotFoundError:
        return "not installed"
