"""Seconds and operations of functions, and tables of them in Markdown.

Functions that are compared take turns, A B A B ..., and a ratio is taken turn by turn, so a machine
that slows down slows both. On a shared machine, look at ratios and not at seconds.
"""

import platform
import statistics
import time
from functools import partial

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode


def measure(functions, turns, device, clock=time.perf_counter):
    """{name: seconds of each turn} of functions {name: function}, after one turn to warm up."""
    seconds = {name: [] for name in functions}
    wait = partial(torch.cuda.synchronize, device) if device.type == "cuda" else lambda: None
    for _ in range(1 + turns):
        for name, function in functions.items():
            wait()
            start = clock()
            function()
            wait()
            seconds[name].append(clock() - start)
    return {name: values[1:] for name, values in seconds.items()}


def ratio(seconds, a, b):
    """The median and the range of a's time over b's, turn by turn."""
    ratios = sorted(x / y for x, y in zip(seconds[a], seconds[b], strict=True))
    return f"{statistics.median(ratios):.3f} ({ratios[0]:.3f} to {ratios[-1]:.3f})"


def operations(network, *inputs):
    """{operator: multiplications and additions} of a call; the meta device is enough."""
    # Attention in its plain form is matrix products (bmm), which the counter knows.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        network(*inputs)
    return {str(name): count for name, count in counter.get_flop_counts()["Global"].items()}


def device_name(device):
    """The machine and the software that are measured."""
    name = f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    return f"PyTorch {torch.__version__}, {name}"


def row(*cells):
    """A row of a Markdown table."""
    return "| " + " | ".join(cells) + " |"


def table(columns, *rows):
    """A Markdown table; without rows, its head."""
    return "\n".join(row(*cells) for cells in (columns, ["---"] * len(columns), *rows))
