"""Command lines: flags made from a dataclass, and errors that are one line.

Options are a dataclass whose fields carry their help text (`option(default, "help")`). A default is
written only there. `add_flags` turns the fields into flags: `learning_rate` becomes
--learning-rate, a boolean becomes --flag / --no-flag.
"""

import argparse
import dataclasses
import re
import sys
import types
import typing
import warnings

import torch


def option(default, help, **metadata):
    """A dataclass field with a help text; metadata may hold `choices`."""
    return dataclasses.field(default=default, metadata={"help": help, **metadata})


def number(kind):
    """A function that reads a finite int or float below 2**63, as argparse calls it for a flag."""
    def parse(text):
        value = kind(text)
        if not abs(value) < 2**63:  # so that NaN fails; a larger int is no number of torch
            raise argparse.ArgumentTypeError(f"needs a finite number below 2**63, got {text:.40}")
        return value

    parse.__name__ = kind.__name__  # "invalid int value"
    return parse


def check_ranges(args, **limits):
    """Raise ValueError unless flags lie in their limits, name=(low, high). None is not checked."""
    for name, (low, high) in limits.items():
        value = getattr(args, name, None)
        if value is not None and not low <= value <= high:  # "not <=", so that NaN fails
            raise ValueError(f"--{name.replace('_', '-')} needs to lie in [{low}, {high}], got "
                             f"{value}")


def add_flags(parser, options, show_defaults=True):
    """Add one flag per field of a dataclass instance, whose values are the defaults."""
    hints = typing.get_type_hints(type(options))
    for field in dataclasses.fields(options):
        flag, default = "--" + field.name.replace("_", "-"), getattr(options, field.name)
        text, kind = field.metadata["help"], hints[field.name]
        if show_defaults:
            text += f" (default: {default})"
        if isinstance(kind, types.UnionType):  # `int | None`: parse as the first of the two
            kind = typing.get_args(kind)[0]
        if kind is bool:
            parser.add_argument(flag, help=text, action=argparse.BooleanOptionalAction)
        else:
            kind = number(kind) if kind in (int, float) else kind
            parser.add_argument(flag, help=text, type=kind, choices=field.metadata.get("choices"))


def given_flags(args, options):
    """{field: value} of the fields of `options` that the command line set."""
    names = [field.name for field in dataclasses.fields(options)]
    return {name: getattr(args, name) for name in names if getattr(args, name) is not None}


def choose_device(name):
    """The torch.device of a --device flag. Raises ValueError if it is not usable."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:  # the latter from a PyTorch built without CUDA
        raise ValueError(f"--device {name}: not usable ({str(error).splitlines()[0]})") from None
    device = torch.device(name)
    if device.type == "meta":
        raise ValueError(f"--device {name}: not usable (its tensors have no numbers)")
    if device.type == "cuda":  # shapes repeat: cuDNN may look for the fastest kernels
        torch.backends.cudnn.benchmark = True
        torch.set_float32_matmul_precision("high")  # products of what stays float32 are TF32
    return device


# Flags that decide how much memory a command takes.
LARGE = r"--[\w-]*(?:size|frames|zoom|clips|prompts|tokens|file|between|accumulate)\b"


def out_of_memory(error):
    """The one line for an error of an allocator, of torch, numpy or Python; None for others."""
    if not isinstance(error, MemoryError) and not re.search(
        r"can't allocate memory|out of memory|overflowed|multiplication overflow", str(error)
    ):
        return None
    # "tried to allocate N bytes", "Tried to allocate 20.00 GiB", "Unable to allocate 7.28 TiB"
    asked = re.search(r"allocate ([\d.]+ ?\w+)", str(error))
    given = re.findall(LARGE, " ".join(sys.argv[1:]))
    flags = ", ".join(dict.fromkeys(given)) or "batch sizes, frames or the image size"
    return f"out of memory{f' when asked for {asked[1]} more' if asked else ''}; lower {flags}"


def run_main(main):
    """Call main() and exit. A user's mistake is one line; `python -X dev` shows the traceback."""
    program = sys.argv[0].rsplit("/", 1)[-1]
    try:
        with warnings.catch_warnings():
            if not sys.flags.dev_mode and not sys.warnoptions:
                warnings.simplefilter("ignore")  # what torch warns of would precede an error's line
            sys.exit(main())
    except KeyboardInterrupt as stop:  # its text may say where the script stopped
        print(f"\n{str(stop) or 'stopped by Ctrl-C'}", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # the reader of our output has closed it, as in `| head -1`
        sys.stderr.close()
        sys.exit(1)
    except (ValueError, OSError, MemoryError, RuntimeError) as error:
        line = str(error) or type(error).__name__
        if isinstance(error, MemoryError | RuntimeError):
            line = out_of_memory(error)
        if sys.flags.dev_mode or line is None:
            raise
        print(f"{program}: error: {line}", file=sys.stderr)
        sys.exit(1)
