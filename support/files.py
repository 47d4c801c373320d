"""Files that are whole or absent: atomic writes, locks, JSON, and lists of prompts."""

import contextlib
import dataclasses
import json
import os
from pathlib import Path

try:
    import fcntl
except ImportError:  # on Windows nothing is locked
    fcntl = None

LOCKS = {}  # {path: open file}; closing a file would release its lock


@contextlib.contextmanager
def atomic(path):
    """Yield a binary file that becomes `path` if the block ends without an error.

    It is written under another name and renamed. A rename is atomic, so after a kill, a full disk
    or Ctrl-C the last good file is still there. The next write replaces what a kill left over.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def lock(path):
    """Lock a file for this process until it ends. Raises ValueError if another process has it."""
    if path.absolute() in LOCKS or fcntl is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    file = open(path, "a")  # it stays open
    try:  # lockf and not flock: forked worker processes do not inherit it
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        raise ValueError(f"{path.parent}: another process is training here; stop it, or choose "
                         "another folder") from None
    except OSError:  # a disk without locks
        pass
    LOCKS[path.absolute()] = file


def write_text(path, text):
    """Write a UTF-8 text file atomically."""
    with atomic(path) as file:
        file.write(text.encode())


def write_json(path, value):
    """Write a JSON file atomically, indented for readers."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def read_json(path):
    """The JSON object in a file. Raises ValueError naming the file if it holds anything else."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not a JSON file ({error})") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: needs a JSON object, got {type(value).__name__}")
    return value


def from_json(cls, values, where):
    """A dataclass from a JSON object; lists become tuples. A ValueError names the file `where`."""
    known = {field.name for field in dataclasses.fields(cls) if field.init}
    try:
        if unknown := values.keys() - known:
            raise ValueError(f"{min(unknown)} is unknown; is it from another version?")
        return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from None


def read_prompts(path):
    """The prompts of a text file, one per line; empty lines are skipped."""
    try:  # utf-8-sig drops the byte order mark that some Windows editors write
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise ValueError(f"{path}: not a text file in UTF-8") from None
    prompts = [line.strip() for line in lines if line.strip()]  # without empty lines
    if not prompts:
        raise ValueError(f"{path}: no prompts in it; write one per line")
    return prompts
