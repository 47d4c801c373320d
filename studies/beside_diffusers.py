"""Compare with diffusers: the same weights and inputs, differences of outputs, and times.

    python -m studies.beside_diffusers                all jobs
    python -m studies.beside_diffusers --only clip    one of: frame, clip, training
    python -m studies.beside_diffusers --only frame --precision bf16    our side in bfloat16

Needs diffusers (studies/requirements.txt) and about 16 GB of memory. The U-Net has random weights
and Stable Diffusion 1.5's full size. Each job first compares the outputs of both sides, then times
them in turns. On a CPU everything is float32, except our side with --precision. On a GPU our side
is set up as in sample.py and train.py, in bfloat16 or under autocast, and diffusers likewise. Both
use PyTorch's own attention.
"""

import dataclasses
import statistics
import sys
from functools import partial

import torch
import torch.nn.functional as F

import model
from checkpoints import configs
from studies.measuring import device_name, measure, ratio, row, table
from support.cli import Parser, number, run_main
from support.devices import DTYPES, PRECISION, choose_device, freeze, precision

try:
    import diffusers
except ImportError as error:
    sys.exit(f"studies.beside_diffusers needs diffusers ({error}); install it "
             "with `pip install -r studies/requirements.txt`")

SIDES = ("ours", "theirs")
FRAMES = 16
CONFIG = dataclasses.replace(model.PRESETS["sd1"], temporal="none")


def make(device, choice, training=False):
    """Our U-Net and theirs, with the same weights, which share memory on a CPU."""
    diffusers.logging.set_verbosity_error()  # it warns of fields that only we have
    theirs = diffusers.UNet2DConditionModel.from_config(configs.unet_to_json(CONFIG))
    theirs.to(device).eval()
    with torch.device("meta"):
        ours = model.UNet(CONFIG).eval()
    ours.load_state_dict(theirs.state_dict(), assign=True)
    if training:
        if device.type != "cpu":
            ours.to(memory_format=torch.channels_last)
        return ours, theirs
    freeze(ours, device, choice)
    return ours, theirs if device.type == "cpu" else theirs.to(next(ours.parameters()).dtype)


def inputs(ours, b, t):
    """Latents (b, t, 4, 32, 32), timesteps (b,) and hidden states (b, 77, 768) for a network."""
    weight = next(ours.parameters())
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(b, t, 4, 32, 32, generator=generator)
    context = torch.randn(b, 77, 768, generator=generator)
    return latents.to(weight), torch.full((b,), 500, device=weight.device), context.to(weight)


def unet_job(device, choice, b, t, training=False):
    """A function per side. Diffusers gets frames as images, each with its own timestep and text."""
    ours, theirs = make(device, choice, training)
    latents, timesteps, context = inputs(ours, b, t)
    images = latents.flatten(0, 1).to(theirs.dtype)
    texts = context.repeat_interleave(t, 0).to(theirs.dtype)
    ours.gradient_checkpointing = training
    if training:
        theirs.train().enable_gradient_checkpointing()

    def call(unet, predict):
        if not training:
            return predict()
        on_cpu = unet is theirs and device.type == "cpu"  # in float32
        with precision(device, "auto" if on_cpu else choice):
            loss = F.mse_loss(predict().float(), images)
        loss.backward()
        gradient = unet.conv_in.weight.grad
        unet.zero_grad()
        return gradient

    return (
        lambda: call(ours, lambda: ours(latents, timesteps, context).flatten(0, 1)),
        lambda: call(theirs, lambda: theirs(images, timesteps.repeat_interleave(t), texts).sample),
    )


JOBS = {  # description, function that makes both sides, turns
    "frame": ("U-Net, one frame with guidance: a batch of two", partial(unet_job, b=2, t=1), 9),
    "clip": (f"U-Net, {FRAMES} frames, which diffusers gets as images with a text each",
             partial(unet_job, b=1, t=FRAMES), 5),
    "training": ("forward and backward of these, gradient checkpointing",
                 partial(unet_job, b=1, t=FRAMES, training=True), 3),
}


def compare(name, device, choice, turns):
    """A row of the table: ratio of times with its range, seconds, memory, difference."""
    torch.manual_seed(0)
    what, make_sides, default = JOBS[name]
    sides = dict(zip(SIDES, make_sides(device, choice), strict=True))
    with torch.set_grad_enabled(name == "training"):
        a, b = (side().float().cpu() for side in sides.values())
        seconds = measure(sides, turns or default, device)
    medians = [f"{statistics.median(seconds[side]):.2f}" for side in SIDES]
    return row(what, ratio(seconds, *SIDES), " and ".join(medians),
               f"{((a - b).abs().max() / b.abs().max()).item():.0e}")


def main():
    parser = Parser(description="Compare with diffusers, at Stable Diffusion 1.5's size.")
    parser.add_argument("--only", choices=JOBS, help="one job (default: all)")
    parser.add_argument("--turns", type=number(int, 1), help="repetitions (default: 3 to 9)")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, ... (default: auto)")
    parser.add_argument("--precision", default="auto", choices=("auto", *DTYPES), help=PRECISION)
    args = parser.parse_args()
    torch.set_flush_denormal(True)
    device = choose_device(args.device)
    print(device_name(device), end="\n\n")
    print(table(["ours over diffusers'", "time", "seconds", "difference"]))
    for name in [args.only] if args.only else JOBS:
        print(compare(name, device, args.precision, args.turns), flush=True)


if __name__ == "__main__":
    run_main(main)
