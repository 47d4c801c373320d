"""Command lines: flags made from a dataclass, tables, signals and one-line errors.

Options are a dataclass whose fields carry help text and range, as in `option(8, "clips per step",
low=1)`. A default is written only there. `add_flags` turns the fields into flags: `learning_rate`
becomes --learning-rate, a boolean becomes --flag / --no-flag.
"""

import argparse
import ctypes
import dataclasses
import math
import re
import signal
import sys
import types
import typing
import warnings
from contextlib import contextmanager
from pathlib import Path


class Parser(argparse.ArgumentParser):
    """An ArgumentParser without abbreviated flags and with one-line errors."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, allow_abbrev=False, **kwargs)

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message}; see --help\n")


def option(default, help, **metadata):
    """A dataclass field with a help text; metadata can be `low`, `high`, `choices` and `free`."""
    return dataclasses.field(default=default, metadata={"help": help, **metadata})


def number(kind, low=-math.inf, high=math.inf):
    """A function that argparse calls to read an int or float from low to high."""
    def parse(text):
        value = kind(text)
        if not low <= value <= high or abs(value) >= 2**63:  # "not <=", so that NaN fails
            limit = f"at least {low}" if high == math.inf else f"a number from {low} to {high}"
            raise argparse.ArgumentTypeError(f"needs {limit}, got {text:.40}")
        return value

    parse.__name__ = kind.__name__  # argparse's message has it: "invalid int value"
    return parse


def add_flags(parser, options, show_defaults=True):
    """Add one flag per field of a dataclass instance, whose values are the defaults."""
    hints = typing.get_type_hints(type(options))
    for field in dataclasses.fields(options):
        flag, about = "--" + field.name.replace("_", "-"), field.metadata
        text, kind = about["help"], hints[field.name]
        if show_defaults and getattr(options, field.name) is not None:
            text += f" (default: {getattr(options, field.name)})"
        if isinstance(kind, types.UnionType):  # `int | None`: parse as the first of the two
            kind = typing.get_args(kind)[0]
        if kind is bool:
            parser.add_argument(flag, help=text, action=argparse.BooleanOptionalAction)
            continue
        if kind in (int, float):
            kind = number(kind, about.get("low", 0), about.get("high", math.inf))
        parser.add_argument(flag, help=text, type=kind, choices=about.get("choices"))


def given_flags(args, options):
    """{field: value} of the fields of `options` that the command line sets."""
    names = [field.name for field in dataclasses.fields(options)]
    return {name: getattr(args, name) for name in names if getattr(args, name) is not None}


def print_table(title, rows):
    """Print rows {name: {column: value}}, with a dash where a row lacks a column."""
    columns = dict.fromkeys(column for row in rows.values() for column in row)
    for name, row in {title: {column: column for column in columns}, **rows}.items():
        cells = [f"{row.get(column, '-'):>{max(11, len(column) + 2)}}" for column in columns]
        print(f"{name:28}" + "".join(cells))


@contextmanager
def stop_signals():
    """Yield a list that gets an entry at Ctrl-C or SIGTERM; a second signal stops at once."""
    received = []

    def receive(number, frame):
        if received:
            raise KeyboardInterrupt
        received.append(number)  # the training step in progress ends first

    previous = {name: signal.signal(name, receive) for name in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for name, handler in previous.items():
            signal.signal(name, handler)


# Pattern of the flags that decide how much memory a command needs
LARGE = r"--[\w-]*(?:size|frames|zoom|clips|prompts|tokens|file|between|accumulate)\b"


def out_of_memory(error):
    """One line for an allocator's error, from torch, numpy or Python; None for other errors."""
    if not isinstance(error, MemoryError) and not re.search(
        r"can't allocate memory|out of memory|overflowed|multiplication overflow", str(error)
    ):
        return None
    # "tried to allocate N bytes", "Tried to allocate 20.00 GiB", "Unable to allocate 7.28 TiB"
    asked = re.search(r"allocate ([\d.]+ ?\w+)", str(error))
    given = re.findall(LARGE, " ".join(sys.argv[1:]))
    flags = ", ".join(dict.fromkeys(given)) or "batch sizes, frames or the image size"
    return f"out of memory{f' when asked for {asked[1]} more' if asked else ''}; lower {flags}"


def keep_memory():
    """Let glibc keep freed memory. By default it gives large blocks back to Linux after every
    operation of torch, and the next operation waits for new, cleared pages."""
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(libc, "mallopt"):
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no block gets pages of its own
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: the heap never shrinks


def run_main(main):
    """Call main() and exit. A user's mistake is one line; `python -X dev` shows the traceback."""
    keep_memory()
    program = Path(sys.argv[0].removesuffix("/__main__.py")).name  # python -m checkpoints
    sys.stdout.reconfigure(errors="backslashreplace")  # escapes names that it cannot print
    try:
        with warnings.catch_warnings():
            if not sys.flags.dev_mode and not sys.warnoptions:
                warnings.simplefilter("ignore")  # torch's warnings would precede the error's line
            sys.exit(main())
    except KeyboardInterrupt as stop:  # its text may say where training stopped
        print(f"\n{str(stop) or 'stopped by Ctrl-C'}", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # the reader of our output has closed it, as in `| head -1`
        sys.stderr.close()
        sys.exit(1)
    except (ValueError, OSError, MemoryError, RuntimeError) as error:
        line = str(error) or type(error).__name__
        if isinstance(error, FileNotFoundError) and error.filename:
            line = f"{error.filename}: no such file or folder"
        if isinstance(error, MemoryError | RuntimeError):
            line = out_of_memory(error)
        if sys.flags.dev_mode or line is None:
            raise
        print(f"{program}: error: {line}", file=sys.stderr)
        sys.exit(1)
