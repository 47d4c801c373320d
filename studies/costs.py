"""What a temporal variant costs: parameters, operations, seconds and memory.

    python -m studies.costs --preset sd1               a forward pass at full size, on the CPU
    python -m studies.costs --preset sd1 --turns 0     the same, only counted: needs no memory

Times are taken in turns, A B C A B C ..., so a machine that slows down slows all of them; a ratio
is that of one turn, and the table has the median. compare.py measures training as well; there
memory is the peak of a process that does nothing but train one variant. Here it is counted: the
bytes of all tensors that exist at once in a forward pass, without a kernel's own.
"""

import argparse
import multiprocessing
import statistics
import time
import weakref
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial

import torch
from torch._subclasses import FakeTensorMode
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from cli import check_ranges, run_main
from devices import precision
from model import UNet
from options import RECIPES
from studies.bench import device_name, measure, peak_gib, ratio, table
from temporal import VARIANTS, temporal_state
from train import denoising_loss

KINDS = ("forward", "training step", "sampling")


def build(options, device):
    """The U-Net of a training's options, untrained: times do not depend on the weights."""
    torch.manual_seed(0)
    unet = UNet(options.unet())
    unet.gradient_checkpointing = options.gradient_checkpointing
    return unet.to(device, memory_format=torch.channels_last)


def batch_of(options, device):
    """Latents, noise, timesteps and context of a training step, numbers without a meaning."""
    config, b = options.unet(), options.video_batch_size
    shape = b, options.num_frames, config.in_channels, config.sample_size, config.sample_size
    generator = torch.Generator().manual_seed(0)
    x0, noise = torch.randn(2, *shape, generator=generator)
    context = torch.randn(b, options.max_tokens, config.cross_attention_dim, generator=generator)
    return tuple(x.to(device) for x in (x0, noise, torch.full((b,), 500), context))


def training_step(unet, options, device):
    """A function that does a training step, of learning rate 0, on a batch that stays."""
    batch, diffusion = batch_of(options, device), options.diffusion()
    optimizer = torch.optim.AdamW(unet.parameters(), lr=0.0, weight_decay=0.0, fused=True)

    def step():
        with precision(device, options.precision):
            loss = denoising_loss(unet, diffusion, *batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def peak_memory(options, device):
    """GiB that three training steps take at most, everything of this process included."""
    step = training_step(build(options, device), options, device)
    for _ in range(3):
        step()
    return peak_gib(device)


def in_a_process(function, *arguments):
    """function(*arguments), called in a process of its own."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn) as executor:
        return executor.submit(function, *arguments).result()


def operations(network, *inputs):
    """{operator: multiplications and additions} of a call; the meta device is enough."""
    # Attention in its plain form is matrix products (bmm), which the counter knows.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        network(*inputs)
    return {str(name): count for name, count in counter.get_flop_counts()["Global"].items()}


def gflops(options):
    """Billions of multiplications and additions of the U-Net for one clip."""
    device = torch.device("meta")
    x0, _, timesteps, context = batch_of(replace(options, video_batch_size=1), device)
    with device:
        unet = UNet(options.unet())
    return sum(operations(unet, x0, timesteps, context).values()) / 1e9


def measure_costs(model, settings, prompts, repetitions):
    """{variant: costs} for settings {variant: TrainOptions}; of the KINDS seconds, turn by turn."""
    device = next(model.unet.parameters()).device
    bar = tqdm(settings.items(), "memory", leave=False)
    costs = {name: {"gib": in_a_process(peak_memory, o, device)} for name, o in bar}
    unets = {name: build(options, device) for name, options in settings.items()}
    for name, unet in unets.items():
        costs[name]["gflops"] = gflops(settings[name])
        costs[name]["parameters"] = sum(p.numel() for p in unet.parameters())
        costs[name]["new"] = sum(value.numel() for value in temporal_state(unet).values())
    options = next(iter(settings.values()))
    bf16 = precision(device, options.precision)
    x0, _, timesteps, context = batch_of(options, device)

    def forward(unet):
        with torch.no_grad(), bf16:
            unet(x0, timesteps, context)

    def sample(unet):
        with bf16:
            list(replace(model, unet=unet).sample(prompts, range(len(prompts))))

    calls = {
        "forward": {n: lambda u=u: forward(u) for n, u in unets.items()},
        "training step": {n: training_step(u, settings[n], device) for n, u in unets.items()},
        "sampling": {n: lambda u=u: sample(u) for n, u in unets.items()},
    }
    for kind, functions in calls.items():
        for name, seconds in measure(functions, repetitions, device).items():
            costs[name][kind] = seconds
    return costs


class PeakBytes(TorchDispatchMode):
    """Counts the bytes of the tensors that are made inside and exist at once: `peak`."""

    def __init__(self, *existing):
        super().__init__()
        self.known, self.bytes, self.peak = {x.untyped_storage()._cdata for x in existing}, 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        outputs = function(*args, **(kwargs or {}))
        for x in tree_leaves(outputs):
            if isinstance(x, torch.Tensor):
                self.add(x.untyped_storage())
        return outputs

    def add(self, storage):
        key, size = storage._cdata, storage.nbytes()
        if key not in self.known:  # others are views, or tensors that were written into
            self.known.add(key)
            self.bytes += size
            self.peak = max(self.peak, self.bytes)
            weakref.finalize(storage, self.remove, key, size)

    def remove(self, key, size):
        self.known.discard(key)
        self.bytes -= size


def activation_bytes(unet, options):
    """The peak of a forward pass of a U-Net of the meta device, beside weights and inputs."""
    shapes = {name: x.shape for name, x in unet.state_dict().items()}
    with FakeTensorMode(), torch.no_grad():  # without memory, and yet they take the CPU's kernels
        weights = {name: torch.empty(shape) for name, shape in shapes.items()}
        x0, _, *conditions = batch_of(options, torch.device("cpu"))
        with PeakBytes(x0, *conditions, *weights.values()) as counter:
            functional_call(unet, weights, (x0, *conditions))
    return counter.peak


def share_weights(unets):
    """Give U-Nets of the meta device numbers; those of one name are the same memory in all."""
    shared = {}
    for unet in unets:
        for name, value in unet.state_dict().items():
            if name not in shared:
                shared[name] = torch.empty(value.shape).uniform_(-0.05, 0.05)
        unet.load_state_dict({name: shared[name] for name in unet.state_dict()}, assign=True)


def on_pixels(options):
    """operations() of the same U-Net on the pixels of a clip, without an autoencoder."""
    config = replace(options.unet(), in_channels=3, out_channels=3)
    *_, timesteps, context = batch_of(options, torch.device("meta"))
    with torch.device("meta"):
        pixels = torch.empty(1, options.num_frames, 3, options.image_size, options.image_size)
        return operations(UNet(config), pixels, timesteps, context)


def measure_forward(unets, options, turns):
    """{variant: CPU seconds of a forward pass, one for each turn} of U-Nets of the meta device."""
    share_weights(unets.values())
    x0, _, *conditions = batch_of(options, torch.device("cpu"))

    def forward(unet, num_frames=options.num_frames):
        with torch.no_grad():
            unet(x0[:, :num_frames], *conditions)

    for unet in unets.values():
        forward(unet, 2)  # warms up in less time
    calls = {name: partial(forward, unet) for name, unet in unets.items()}
    # Other programs change these seconds less than those of a clock on the wall.
    return measure(calls, turns, x0.device, time.process_time, warm_up=0)


def main():
    parser = argparse.ArgumentParser(
        description="What the U-Net of each temporal variant costs for one clip, on the CPU.",
        allow_abbrev=False)
    parser.add_argument("--preset", choices=RECIPES, default="sd1", help="(default: sd1)")
    parser.add_argument("--turns", type=int, default=3, help="0: only count (default: 3)")
    args = parser.parse_args()
    check_ranges(args, turns=(0, 1000))
    torch.set_flush_denormal(True)
    options = replace(RECIPES[args.preset], video_batch_size=1)
    x0, _, *conditions = batch_of(options, torch.device("meta"))
    configs = {name: replace(options, temporal=name).unet() for name in VARIANTS}
    with torch.device("meta"):
        unets = {name: UNet(config) for name, config in configs.items()}
    counts = {name: operations(unet, x0, *conditions) for name, unet in unets.items()}
    rows = {}
    for name, unet in unets.items():
        size, new = (sum(x.numel() for x in state.values())
                     for state in (unet.state_dict(), temporal_state(unet)))
        rows[name] = [
            name, f"{size / 1e6:.1f}", f"{new / 1e6:.1f}",
            f"{sum(counts[name].values()) / 1e12:.3g}",
            f"{size * 4 / 1e9:.2f} + {activation_bytes(unet, options) / 1e9:.2f}",
        ]
    columns = ["variant", "parameters, M", "new, M", "TFLOP", "weights + activations, GB"]
    if args.turns:
        seconds = measure_forward(unets, options, args.turns)
        columns += ["time over the shift's", "CPU seconds, median"]
        for name, row in rows.items():
            row += [ratio(seconds, name, "shift"), f"{statistics.median(seconds[name]):.3g}"]
    print(f"{args.preset}: a forward pass for {options.num_frames} frames of {x0.shape[-1]} x "
          f"{x0.shape[-1]} latents, fp32, {device_name(torch.device('cpu'))}\n")
    print(table(columns, *rows.values()))
    print(f"\nThe shift's U-Net on {options.image_size} x {options.image_size} pixels instead:")
    pixels, latents = on_pixels(options), counts["shift"]
    products = {"aten.bmm"}
    parts = {"all": latents.keys(), "attention": products, "others": latents.keys() - products}
    for part, names in parts.items():
        many, few = (sum(count[name] for name in names) for count in (pixels, latents))
        print(f"{part}: {many / 1e12:.3g} TFLOP, {many / few:.1f} times as many")


if __name__ == "__main__":
    run_main(main)
