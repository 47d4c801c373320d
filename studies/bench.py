"""What does it cost? Medians of interleaved repetitions, as tables for docs/measurements.md.

    python -m studies.bench                 everything, on the GPU if there is one, else on the CPU
    python -m studies.bench --only tiny     one of: shift, tiny, sd1, diffusers

Two things that are compared take turns, A B A B ..., and the ratio is taken turn by turn: so a
machine that slows down slows both. Each part runs in a process of its own, whose peak memory it
reports. Single times say little on a shared machine; the ratios are what to look at.
"""

import argparse
import dataclasses
import importlib.util
import platform
import re
import resource
import statistics
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

from cli import check_ranges, choose_device, run_main
from devices import precision
from model import PRESETS, UNet
from shift import temporal_shift

PARTS = ("shift", "tiny", "sd1", "diffusers")
SHAPES = {  # b, t, c, h, w of a U-Net's first level, where the shift moves most
    "tiny": (8, 8, 32, 8, 8),
    "sd1": (1, 16, 320, 32, 32),
}


def measure(functions, repetitions, device, clock=time.perf_counter, warm_up=1):
    """Seconds of each function, repetitions times in turn: {name: [seconds, ...]}."""
    seconds = {name: [] for name in functions}
    wait = partial(torch.cuda.synchronize, device) if device.type == "cuda" else lambda: None
    for turn in range(warm_up + repetitions):
        for name, function in functions.items():
            wait()
            start = clock()
            function()
            wait()
            if turn >= warm_up:
                seconds[name].append(clock() - start)
    return seconds


def ratio(seconds, a, b):
    """The median and the range of a's time over b's, turn by turn."""
    ratios = sorted(x / y for x, y in zip(seconds[a], seconds[b], strict=True))
    return f"{statistics.median(ratios):.3f} ({ratios[0]:.3f} to {ratios[-1]:.3f})"


def device_name(device):
    """The machine that the numbers are of."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"


def row(*cells):
    """A row of a markdown table."""
    return "| " + " | ".join(cells) + " |"


def table(columns, *rows):
    """A markdown table; without rows its head."""
    lines = columns, ["---"] * len(columns), *rows
    return "\n".join(row(*cells) for cells in lines)


def peak_gib(device):
    """The most memory that this process has used so far, in GiB; on a GPU, of the GPU's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    if sys.platform == "linux":  # whose ru_maxrss begins with what the parent had
        return status("VmHWM") / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**30  # bytes on macOS


def status(name):
    """Kilobytes of this process's memory on Linux: "VmRSS" now, "VmHWM" the most so far."""
    return int(re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])


def repeat(function, x, gradient, times):
    """Call function(x) so often and, if there is a gradient of its result, its backward."""
    for _ in range(times):
        y = function(x)
        if gradient is not None:
            torch.autograd.grad(y, x, gradient)


def bench_shift(device, repetitions):
    """The shift beside x.clone(), which is one read and one write: the least that it could cost."""
    print(table(["shift over clone", "forward", "forward and backward"]))
    functions = {"shift": temporal_shift, "clone": torch.clone}
    for name, (b, t, c, h, w) in SHAPES.items():
        for layout in (torch.contiguous_format, torch.channels_last):
            frames = torch.randn(b * t, c, h, w, device=device).to(memory_format=layout)
            x = frames.unflatten(0, (b, t)).requires_grad_()
            times, cells = max(1, int(2e7 / x.numel())), []  # some 10 ms a turn
            for inputs in ((x.detach(), None), (x, torch.randn_like(x))):
                calls = {n: partial(repeat, f, *inputs, times) for n, f in functions.items()}
                cells.append(ratio(measure(calls, repetitions, device), "shift", "clone"))
            print(row(f"{name}, {str(layout).removeprefix('torch.')}", *cells), flush=True)


def bench_unet(preset, device, repetitions):
    """A training step's forward and backward, with the shift and without."""
    (b, t, _, h, w), config = SHAPES[preset], PRESETS[preset]
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(b, t, 4, h, w, generator=generator).to(device)
    context = torch.randn(b, 16 if preset == "tiny" else 77, config.cross_attention_dim,
                          generator=generator).to(device)
    timesteps = torch.full((b,), 500, device=device)
    torch.manual_seed(0)
    shifted = UNet(config).to(device, memory_format=torch.channels_last)
    with torch.device("meta"):
        apart = UNet(dataclasses.replace(config, temporal="none"))
    apart.load_state_dict(shifted.state_dict(), assign=True)  # the same weights in the same memory

    def step(unet):
        unet.gradient_checkpointing = preset != "tiny"
        with precision(device):
            loss = F.mse_loss(unet(latents, timesteps, context), latents)
        loss.backward()
        unet.zero_grad()

    functions = {"shift": lambda: step(shifted), "none": lambda: step(apart)}
    seconds = measure(functions, repetitions, device)
    median = statistics.median(seconds["shift"])
    print(table(
        [f"{preset}: {b} x {t} frames of {h}x{w} latents, forward and backward", ""],
        ["with the shift over without", ratio(seconds, "shift", "none")],
        ["seconds, median", f"{median:.3f}"], ["frames per second", f"{b * t / median:.2f}"],
        ["peak memory, GiB", f"{peak_gib(device):.2f}"],
    ))


def bench_diffusers(device, repetitions):
    """Everything of beside_diffusers.py, which needs diffusers and transformers."""
    if importlib.util.find_spec("diffusers") is None:
        print("beside diffusers: not measured, diffusers and transformers are not installed")
    else:
        from studies.beside_diffusers import compare_all  # imports this file
        compare_all(device, repetitions)


def main():
    parser = argparse.ArgumentParser(description="Measure the cost of things.", allow_abbrev=False)
    parser.add_argument("--only", choices=PARTS, help="run one part, in this process")
    parser.add_argument("--repetitions", type=int, help="turns (default: as each part deserves)")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, ... (default: auto)")
    args = parser.parse_args()
    check_ranges(args, repetitions=(1, 10**4))
    device = choose_device(args.device)
    torch.set_flush_denormal(True)
    if args.only == "shift":
        bench_shift(device, args.repetitions or 31)
    elif args.only == "diffusers":
        bench_diffusers(device, args.repetitions)
    elif args.only:
        default = 3 if args.only == "sd1" and device.type == "cpu" else 15
        bench_unet(args.only, device, args.repetitions or default)
    else:
        print(f"PyTorch {torch.__version__} on {device_name(device)}")
        for part in PARTS:
            print(flush=True)
            command = [sys.executable, "-m", "studies.bench", *sys.argv[1:], "--only", part]
            if status := subprocess.call(command):
                sys.exit(status)


if __name__ == "__main__":
    run_main(main)
