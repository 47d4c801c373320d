"""One-line errors for files that other programs wrote."""

import contextlib


@contextlib.contextmanager
def naming(path, problem=""):
    """Turn an error in the block into a one-line ValueError: the path, the problem, the error.

    A damaged file can cause any error, from a wrong type to a division by zero. Errors that name
    the path already, such as an OSError of open(), pass unchanged.
    """
    try:
        yield
    except Exception as error:
        if str(path) in str(error) or isinstance(error, MemoryError):
            raise
        cause = repr(error) if isinstance(error, LookupError) else " ".join(str(error).split())
        cause = f"{problem} ({cause:.300})" if problem else f"{cause:.300}"
        raise ValueError(f"{path}: {cause}") from error
