"""What a temporal variant costs: parameters, operations, seconds and memory.

Times are taken in turns, A B C A B C ..., so a machine that slows down slows all of them; a ratio
is that of one turn, and the table has the median. Memory is the peak of a process that does nothing
but train one variant.
"""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from devices import precision
from model import UNet
from studies.bench import measure, peak_gib
from temporal import temporal_state
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
