"""The costs of the shift and of the other variants of temporal.py.

    python -m studies.costs                           the tiny preset, in about a minute
    python -m studies.costs --preset sd1              Stable Diffusion's size; on a CPU half an hour
    python -m studies.costs --preset sd1 --variants none,shift,attention --only forward
    python -m studies.costs --preset sd1 --turns 0    count only, which needs no memory

A row has the parameters and operations of a variant, and the times of a forward pass and of a
training step (forward and backward), divided by the times of "none".
"""

import statistics
from dataclasses import replace
from functools import partial

import torch

from model import UNet
from studies.measuring import device_name, measure, operations, ratio, table
from support.cli import Parser, number, run_main
from support.devices import choose_device, precision
from temporal import VARIANTS, temporal_state
from tokenizer import SHORTEST
from train import denoising_loss
from training.options import RECIPES


def batch_of(options, device):
    """Random latents and noise, timesteps and a random context of a training step."""
    config, b = options.unet(), options.video_batch_size
    shape = b, options.num_frames, config.in_channels, config.sample_size, config.sample_size
    generator = torch.Generator().manual_seed(0)
    x0, noise = torch.randn(2, *shape, generator=generator)
    length = options.max_tokens or SHORTEST
    context = torch.randn(b, length, config.cross_attention_dim, generator=generator)
    return tuple(x.to(device) for x in (x0, noise, torch.full((b,), 500), context))


def count(unet, options):
    """Parameters and operations of a U-Net on the meta device, the latter for one clip."""
    options = replace(options, video_batch_size=1)
    x0, _, *conditions = batch_of(options, torch.device("meta"))
    return {
        "parameters": sum(x.numel() for x in unet.parameters()),
        "new": sum(x.numel() for x in temporal_state(unet).values()),
        "operations": sum(operations(unet, x0, *conditions).values()),
    }


def share_weights(unets, device):
    """Give U-Nets on the meta device random weights; weights of the same name share memory."""
    shared = {}
    for unet in unets:
        # The memory layout of weights in train.py; empty_like keeps it.
        state = unet.to(memory_format=torch.channels_last).state_dict()
        for name, value in state.items():
            if name not in shared:
                shared[name] = torch.empty_like(value, device=device).uniform_(-0.05, 0.05)
        unet.load_state_dict({name: shared[name] for name in state}, assign=True)


def forward(unet, options, batch):
    """A forward pass as in sampling."""
    x0, _, *conditions = batch
    with torch.no_grad(), precision(x0.device, options.precision):
        unet(x0, *conditions)


def training_step(unet, options, batch):
    """The forward and backward pass of a training step."""
    unet.gradient_checkpointing = options.preset in ("sd1", "sd2")  # as train.py on a CPU
    with precision(batch[0].device, options.precision):
        loss = denoising_loss(unet, options.diffusion(), *batch)
    loss.backward()
    unet.zero_grad()


KINDS = {"forward": forward, "training step": training_step}


def measure_costs(configs, options, turns, device, kinds=KINDS):
    """{variant: costs} for {variant: UNetConfig}.

    Costs are the numbers of `count` and, for each of `kinds`, the seconds of each turn.
    """
    with torch.device("meta"):
        unets = {name: UNet(config) for name, config in configs.items()}
    costs = {name: count(unet, options) for name, unet in unets.items()}
    if turns:
        share_weights(unets.values(), device)
        batch = batch_of(options, device)
        for kind in kinds:
            calls = {name: partial(KINDS[kind], unet, options, batch)
                     for name, unet in unets.items()}
            for name, seconds in measure(calls, turns, device).items():
                costs[name][kind] = seconds
    return costs


def cost_table(costs):
    """A table with a row per variant; times are divided by the first variant's."""
    first = next(iter(costs))
    kinds = [kind for kind in KINDS if kind in costs[first]]  # none if nothing was measured
    seconds = {kind: {name: cost[kind] for name, cost in costs.items()} for kind in kinds}
    rows = [[
        name, f"{cost['parameters']:,}", f"{cost['new']:,}", f"{cost['operations'] / 1e9:.4g}",
        *(ratio(seconds[kind], name, first) for kind in kinds),
        *(f"{statistics.median(cost[kind]):.3g}" for kind in kinds),
    ] for name, cost in costs.items()]
    return table(["variant", "parameters", "new", "GFLOP per clip",
                  *(f"{kind} over {first}" for kind in kinds),
                  *(f"{kind}, s" for kind in kinds)], *rows)


def main():
    parser = Parser(description="Measure what the shift and the other temporal variants cost.")
    parser.add_argument("--preset", choices=RECIPES, default="tiny", help="(default: tiny)")
    parser.add_argument("--turns", type=number(int, 0), default=3,
                        help="repetitions of the variants; 0: only count (default: 3)")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, ... (default: auto)")
    parser.add_argument("--variants", help="some of them, separated by commas; times are over the "
                        "first one's (default: all)")
    parser.add_argument("--only", choices=KINDS, help="time one of these (default: both)")
    args = parser.parse_args()
    torch.set_flush_denormal(True)
    options, device = RECIPES[args.preset], choose_device(args.device)
    t, size = options.num_frames, options.unet().sample_size
    print(f"{args.preset}: {options.video_batch_size} x {t} frames of {size} x {size} latents. "
          f"{device_name(device)}\n")
    configs = {name: replace(options, temporal=name).unet() for name in VARIANTS}
    configs["shift-twice"] = replace(options, temporal="shift", shifts=2).unet()
    names = args.variants.split(",") if args.variants else configs
    if unknown := set(names) - configs.keys():
        raise ValueError(f"--variants needs some of {', '.join(configs)}; got {min(unknown)}")
    print(cost_table(measure_costs({name: configs[name] for name in names}, options, args.turns,
                                   device, [args.only] if args.only else KINDS)))


if __name__ == "__main__":
    run_main(main)
