"""One-line errors for files that other programs wrote."""

import contextlib
import pickle
import struct
import zlib

# Errors that json, struct, gzip, torch and its unpickler raise for a damaged or a foreign file
DAMAGED = (ArithmeticError, AssertionError, AttributeError, EOFError, LookupError, OSError,
           RuntimeError, TypeError, ValueError, pickle.UnpicklingError, struct.error, zlib.error)


@contextlib.contextmanager
def naming(path, problem=""):
    """Turn an error of DAMAGED into a one-line ValueError: the path, the problem, the error.

    Errors that name the path already, such as an OSError of open(), pass unchanged.
    """
    try:
        yield
    except DAMAGED as error:
        if str(path) in str(error):
            raise
        cause = repr(error) if isinstance(error, LookupError) else " ".join(str(error).split())
        cause = f"{problem} ({cause:.300})" if problem else f"{cause:.300}"
        raise ValueError(f"{path}: {cause}") from error
