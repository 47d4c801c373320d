"""Command lines: flags made from a dataclass, and errors that are one line.

Options are a dataclass whose fields carry their help text (`option(default, "help")`). A default is
written only there. `add_flags` turns the fields into flags: `learning_rate` becomes
--learning-rate, a boolean becomes --flag / --no-flag.
"""

import argparse
import dataclasses
import sys
import types
import typing

import torch


def option(default, help, **metadata):
    """A dataclass field with a help text; metadata may hold `choices`."""
    return dataclasses.field(default=default, metadata={"help": help, **metadata})


def add_flags(parser, options):
    """Add one flag per field of a dataclass instance, whose values are the defaults."""
    hints = typing.get_type_hints(type(options))
    for field in dataclasses.fields(options):
        flag, default = "--" + field.name.replace("_", "-"), getattr(options, field.name)
        text, kind = f"{field.metadata['help']} (default: {default})", hints[field.name]
        if isinstance(kind, types.UnionType):  # `int | None`: parse as the first of the two
            kind = typing.get_args(kind)[0]
        if kind is bool:
            parser.add_argument(flag, help=text, action=argparse.BooleanOptionalAction)
        else:
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
    if device.type == "cuda":  # shapes repeat: cuDNN may look for the fastest kernels
        torch.backends.cudnn.benchmark = True
        torch.set_float32_matmul_precision("high")  # products of what stays float32 are TF32
    return device


def run_main(main):
    """Call main() and exit. A user's mistake is one line; `python -X dev` shows the traceback."""
    try:
        sys.exit(main())
    except KeyboardInterrupt as stop:  # its text may say where the script stopped
        print(f"\n{str(stop) or 'stopped by Ctrl-C'}", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # the reader of our output has closed it, as in `| head -1`
        sys.stderr.close()
        sys.exit(1)
    except (ValueError, OSError) as error:
        if sys.flags.dev_mode:
            raise
        program = sys.argv[0].rsplit("/", 1)[-1]
        print(f"{program}: error: {str(error) or type(error).__name__}", file=sys.stderr)
        sys.exit(1)
