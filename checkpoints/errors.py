"""Report in one line what is wrong with a file of another program."""

import contextlib


@contextlib.contextmanager
def naming(path, problem=""):
    """Make an error in the block a ValueError of one line: the path, the problem, the error.

    A damaged file can cause any error, from a wrong type to a division by zero. Errors that name
    the path already, such as an OSError of open(), pass.
    """
    try:
        yield
    except Exception as error:
        if str(path) in str(error) or isinstance(error, MemoryError):
            raise
        cause = repr(error) if isinstance(error, LookupError) else " ".join(str(error).split())
        cause = f"{problem} ({cause:.300})" if problem else f"{cause:.300}"
        raise ValueError(f"{path}: {cause}") from error
