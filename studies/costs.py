"""What a way for frames to talk costs: parameters, operations, seconds and memory.

Times are taken in turns, A B C A B C ..., so a machine that slows down slows all; a ratio is that
of one turn, and the median of those is told. Memory is the peak of a process that does nothing but
train one of them.
"""

import multiprocessing
import resource
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from studies.bench import measure
from losses import DenoisingLoss
from model import UNet
from temporal import new_names, start_as_shift
from weights import load_sibling

KINDS = ("forward", "training step", "sampling")


def build(run, options, device):
    """A sibling on its device as it is before it has seen a clip: `run`'s image model."""
    unet = load_sibling(run / "image_unet", options.way_through_time())
    if options.start_as_shift:
        start_as_shift(unet)
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
    batch = batch_of(options, device)
    objective = DenoisingLoss(unet, options.diffusion())
    optimizer = torch.optim.AdamW(unet.parameters(), lr=0.0, weight_decay=0.0, fused=True)

    def step():
        with torch.autocast("cuda", torch.bfloat16, enabled=options.uses_bf16(device)):
            loss = objective(*batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def peak_memory(run, options, device):
    """GiB that three training steps take at most, everything of this process included."""
    step = training_step(build(run, options, device), options, device)
    for _ in range(3):
        step()
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # kilobytes on Linux


def in_a_process(function, *arguments):
    """function(*arguments), called in a process of its own."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn) as executor:
        return executor.submit(function, *arguments).result()


def gflops(options):
    """Billions of multiplications and additions of the U-Net for one clip."""
    device = torch.device("meta")
    x0, _, timesteps, context = batch_of(replace(options, video_batch_size=1), device)
    with device:
        unet = UNet(options.unet())
    # Attention in its plain form is matrix products, which the counter knows.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        unet(x0, timesteps, context)
    return counter.get_total_flops() / 1e9


def measure_costs(run, settings, pipeline, prompts, repetitions):
    """{sibling: costs} for settings {sibling: TrainOptions}; of the KINDS seconds, turn by turn."""
    device = next(pipeline.unet.parameters()).device
    bar = tqdm(settings.items(), "memory", leave=False)
    costs = {name: {"gib": in_a_process(peak_memory, run, o, device)} for name, o in bar}
    unets = {name: build(run, options, device) for name, options in settings.items()}
    for name, unet in unets.items():
        costs[name]["gflops"] = gflops(settings[name])
        costs[name]["parameters"] = sum(p.numel() for p in unet.parameters())
        costs[name]["new"] = sum(unet.get_parameter(n).numel() for n in new_names(unet))
    options = next(iter(settings.values()))
    x0, _, timesteps, context = batch_of(options, device)

    def forward(unet):
        with torch.no_grad(), torch.autocast("cuda", torch.bfloat16, enabled=bf16):
            unet(x0, timesteps, context)

    def sample(unet):
        with torch.autocast("cuda", torch.bfloat16, enabled=bf16):
            list(replace(pipeline, unet=unet).sample(prompts, range(len(prompts))))

    bf16 = options.uses_bf16(device)
    calls = {
        "forward": {n: lambda u=u: forward(u) for n, u in unets.items()},
        "training step": {n: training_step(u, settings[n], device) for n, u in unets.items()},
        "sampling": {n: lambda u=u: sample(u) for n, u in unets.items()},
    }
    for kind, functions in calls.items():
        for name, seconds in measure(functions, repetitions, device).items():
            costs[name][kind] = seconds
    return costs
