"""Beside diffusers: the same weights and inputs, the same numbers, and who is faster.

    python -m studies.beside_diffusers                every job, each in a process of its own
    python -m studies.beside_diffusers --only clip    one of: frame, clip, training, decode, image,
                                                      loading

Needs diffusers and transformers (studies/requirements.txt). Weights are random, of Stable Diffusion
1.5's full size. The numbers of both sides are compared before any time is taken, then the sides
take turns. On a CPU all is float32. On a GPU ours are set up as sample.py and train.py do: bfloat16
weights, and for training float32 weights under autocast; theirs likewise. PyTorch's own attention
on both.
"""

import argparse
import ctypes
import dataclasses
import statistics
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

import model
import text
import vae
from checkpoints import configs
from checkpoints.names import current_names, names_in_file
from checkpoints.tokenizers import save_tokenizer
from cli import check_ranges, choose_device, run_main
from devices import freeze, precision
from diffusion import Diffusion, randn
from files import save_safetensors, write_json
from pipeline import Pipeline, Sampling
from studies.bench import measure, ratio, row, status, table
from studies.costs import in_a_process
from tokenizer import CLIPTokenizer
from weights import load_pipeline, save_schedule

try:
    import diffusers
    import transformers
except ImportError as error:
    sys.exit(f"studies.beside_diffusers needs diffusers and transformers ({error}); install them "
             "with `pip install -r studies/requirements.txt`")

TURNS = {"frame": 9, "clip": 5, "training": 3, "decode": 3, "image": 5, "loading": 3}
SIDES = ("ours", "theirs")
FRAMES, PROMPT = 16, "a red circle"
PARTS = {  # our class, its config, the function that makes config.json, their class from that
    "unet": (model.UNet, dataclasses.replace(model.PRESETS["sd1"], temporal="none"),
             configs.unet_to_json, diffusers.UNet2DConditionModel.from_config),
    "vae": (vae.AutoencoderKL, vae.PRESETS["sd"],
            configs.vae_to_json, diffusers.AutoencoderKL.from_config),
    "text_encoder": (
        text.CLIPTextModel, text.PRESETS["sd1"], configs.text_to_json,
        lambda values: transformers.CLIPTextModel(transformers.CLIPTextConfig(**values))),
}


def make(part, device, training=False):
    """(ours, theirs) of a part, with the same weights; on a CPU in the same memory."""
    network, config, to_json, build_theirs = PARTS[part]
    diffusers.logging.set_verbosity_error()  # it warns of the fields that are ours
    theirs = build_theirs(to_json(config)).to(device).eval()
    with torch.device("meta"):
        ours = network(config).eval()
    ours.load_state_dict(current_names(theirs.state_dict())[0], assign=True)
    if training:
        if device.type != "cpu":
            ours.to(memory_format=torch.channels_last)
        return ours, theirs
    freeze(ours, device)
    return ours, theirs.to(next(ours.parameters()).dtype)


def inputs(ours, b, t):
    """Latents (b, t, 4, 32, 32), timesteps (b,) and hidden states (b, 77, 768) for a network."""
    weight = next(ours.parameters())
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(b, t, 4, 32, 32, generator=generator)
    context = torch.randn(b, 77, 768, generator=generator)
    return latents.to(weight), torch.full((b,), 500, device=weight.device), context.to(weight)


def unet_job(device, b, t, training=False):
    """For diffusers the frames are a batch of images, each with its own timestep and text."""
    ours, theirs = make("unet", device, training)
    latents, timesteps, context = inputs(ours, b, t)
    images, texts = latents.flatten(0, 1), context.repeat_interleave(t, 0)
    ours.gradient_checkpointing = training
    if training:
        theirs.train().enable_gradient_checkpointing()

    def call(unet, predict):
        if not training:
            return predict()
        with precision(device):
            loss = F.mse_loss(predict().float(), images)
        loss.backward()
        gradient = unet.conv_in.weight.grad
        unet.zero_grad()
        return gradient

    return (
        lambda: call(ours, lambda: ours(latents, timesteps, context).flatten(0, 1)),
        lambda: call(theirs, lambda: theirs(images, timesteps.repeat_interleave(t), texts).sample),
    )


def decode_job(device):
    ours, theirs = make("vae", device)
    latents = inputs(ours, 1, FRAMES)[0]
    factor = ours.config.scaling_factor
    return (lambda: vae.decode_clips(ours, latents)[0],
            lambda: theirs.decode(latents[0] / factor).sample.clamp(-1, 1))


def image_job(device):
    (unet, their_unet), (autoencoder, their_vae), (encoder, their_encoder) = (
        make(part, device) for part in PARTS)
    tokenizer = CLIPTokenizer.train([PROMPT, "moving left"], 20)  # a much smaller vocabulary
    with tempfile.TemporaryDirectory() as folder:
        save_tokenizer(folder, tokenizer)
        their_tokenizer = transformers.CLIPTokenizer.from_pretrained(folder)
    ours = Pipeline(unet, autoencoder, encoder, tokenizer, Diffusion(),
                    Sampling(num_frames=1, image_size=256, num_steps=4))
    theirs = diffusers.StableDiffusionPipeline(
        their_vae, their_encoder, their_tokenizer, their_unet,
        diffusers.DDIMScheduler.from_config(configs.diffusion_to_json(Diffusion())), None, None,
        requires_safety_checker=False,
    )
    theirs.set_progress_bar_config(disable=True)
    noise = randn((1, 1, 4, 32, 32), [torch.Generator().manual_seed(0)])[:, 0]

    def draw():
        *_, latents = ours.sample([PROMPT], [0])
        return ours.decode(latents)[0]

    def draw_theirs():
        images = theirs(PROMPT, 256, 256, 4, guidance_scale=7.5, output_type="pt",
                        latents=noise.to(device, their_unet.dtype)).images
        return images.float().cpu() * 2 - 1  # [0, 1] -> [-1, 1]

    return draw, draw_theirs


JOBS = {  # what it is, and a function that makes both sides
    "frame": ("U-Net, one frame with guidance: a batch of two", partial(unet_job, b=2, t=1)),
    "clip": (f"U-Net, {FRAMES} frames, which diffusers gets as images with a text each",
             partial(unet_job, b=1, t=FRAMES)),
    "training": ("forward and backward of these, gradient checkpointing",
                 partial(unet_job, b=1, t=FRAMES, training=True)),
    "decode": (f"decoder, {FRAMES} frames of 256x256", decode_job),
    "image": ("prompt to pixels: 256x256, four DDIM steps, guidance", image_job),
}


def memory_of(function, device):
    """(the result of a call, the GiB that it needs at most on top of what was there before)."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = function()
        return result, (torch.cuda.max_memory_allocated() - before) / 2**30

    ctypes.CDLL(None).malloc_trim(0)  # give back what building the networks has freed (Linux)
    Path("/proc/self/clear_refs").write_text("5")  # the peak is from now on
    before = status("VmRSS")
    result = function()
    return result, (status("VmHWM") - before) / 2**20


def job_memory(name, side, device):
    """The GiB of one side of a job, in a process that does nothing else."""
    function = JOBS[name][1](device)[SIDES.index(side)]
    with torch.set_grad_enabled(name == "training"):
        return memory_of(function, device)[1]


def print_row(what, seconds, peaks, difference):
    medians = " and ".join(f"{statistics.median(seconds[side]):.2f}" for side in SIDES)
    peaks = " and ".join(f"{peak:.2f}" for peak in peaks)
    print(row(what, ratio(seconds, *SIDES), medians, peaks, f"{difference:.0e}"), flush=True)


def compare(name, device, repetitions):
    """Print a line of the table: ratio of times with its range, seconds, memory, difference."""
    if name == "loading":
        compare_loading(repetitions or TURNS[name])
        return
    torch.manual_seed(0)
    torch.set_flush_denormal(True)
    what, make_sides = JOBS[name]
    sides = dict(zip(SIDES, make_sides(device), strict=True))
    with torch.set_grad_enabled(name == "training"):
        a, b = (side().float().cpu() for side in sides.values())
        seconds = measure(sides, repetitions or TURNS[name], device)
    sides.clear()  # the processes that measure memory need it
    peaks = [in_a_process(job_memory, name, side, device) for side in SIDES]
    print_row(what, seconds, peaks, ((a - b).abs().max() / b.abs().max()).item())


def write_checkpoint(folder):
    """A single file of Stable Diffusion 1's full size, and the configs that diffusers wants."""
    tensors, form = {}, {f"{configs.TEXT}transformer.text_model.": None}
    for part, (_, config, to_json, _) in PARTS.items():
        ours, _ = make(part, torch.device("cpu"))
        state = ours.state_dict()
        for name, place in names_in_file(part, ours, form, ema=False).items():
            tensors[place] = state[name]
        write_json(folder / part / "config.json", to_json(config))
    save_safetensors(folder / "model.safetensors", tensors)
    save_tokenizer(folder / "tokenizer", CLIPTokenizer.train([PROMPT], 20))
    save_schedule(folder, Diffusion(), Sampling(num_frames=1, image_size=512))


def load(folder, side):
    """Load the single file and read every weight: the seconds until either, the weights' sum."""
    path, start = folder / "model.safetensors", time.perf_counter()
    if side == "ours":
        pipeline = load_pipeline(path)
    else:
        pipeline = diffusers.StableDiffusionPipeline.from_single_file(
            path, config=str(folder), local_files_only=True, safety_checker=None,
            feature_extractor=None,
        )
    loaded = time.perf_counter() - start
    networks = pipeline.unet, pipeline.vae, pipeline.text_encoder
    total = sum(p.sum().item() for network in networks for p in network.parameters())
    return loaded, time.perf_counter() - start, total


def compare_loading(repetitions):
    """Print the lines of the table for a file of 4.3 GB."""
    turns = {side: [] for side in SIDES}
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint(Path(folder))
        for _ in range(repetitions + 1):  # the first turn brings the file into the system's cache
            for side in SIDES:
                work = partial(load, Path(folder), side)
                turns[side].append(in_a_process(memory_of, work, torch.device("cpu")))
    peaks = [statistics.median(gib for _, gib in turns[side][1:]) for side in SIDES]
    ours, theirs = (turns[side][0][0][2] for side in SIDES)  # the sums
    kinds = ("loading a single file of 4.3 GB", "the same, and reading every weight once")
    for i, what in enumerate(kinds):
        seconds = {side: [found[i] for found, _ in turns[side][1:]] for side in SIDES}
        print_row(what, seconds, peaks, abs(ours - theirs) / abs(theirs))


def compare_all(device, repetitions):
    """Print the whole table, each job in a process of its own."""
    columns = ["ours over diffusers'", "time", "seconds", "peak memory, GiB", "difference"]
    print(table(columns), flush=True)
    for name in TURNS:
        in_a_process(compare, name, device, repetitions)


def main():
    parser = argparse.ArgumentParser(description="Compare with diffusers.", allow_abbrev=False)
    parser.add_argument("--only", choices=TURNS, help="one job (default: all)")
    parser.add_argument("--repetitions", type=int, help=f"turns (default: {TURNS})")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, ... (default: auto)")
    parser.add_argument("--side", choices=SIDES, help="measure the memory of one side only")
    args = parser.parse_args()
    check_ranges(args, repetitions=(1, 10**4))
    device = choose_device(args.device)
    if args.side and args.only not in JOBS:
        raise ValueError(f"--side needs --only with one of {', '.join(JOBS)}")
    if args.side:
        print(f"{job_memory(args.only, args.side, device):.2f}")
    elif args.only:
        compare(args.only, device, args.repetitions)
    else:
        compare_all(device, args.repetitions)


if __name__ == "__main__":
    run_main(main)
