"""Beside diffusers: the same weights and inputs, the same numbers, and who is faster.

    python -m studies.beside_diffusers                every job, each in a process of its own
    python -m studies.beside_diffusers --only clip    one of: frame, clip, training, decode, image,
                                                      loading

Needs diffusers and transformers (studies/requirements.txt). Weights are random, of Stable Diffusion
1.5's full size; the numbers of both sides are compared before any time is taken,
then the sides take turns. float32 on a CPU, bfloat16 on a GPU, PyTorch's own attention on both.
"""

import argparse
import ctypes
import dataclasses
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from checkpoints import configs, names
from checkpoints.tokenizers import save_tokenizer
import model
import text
import vae
from cli import choose_device, run_main
from diffusion import Diffusion, randn
from files import save_safetensors, write_json
from model import UNet
from pipeline import Pipeline, Sampling
from studies.bench import measure, ratio, row, table
from text import CLIPTextModel
from tokenizer import CLIPTokenizer
from vae import AutoencoderKL, decode_clips
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


def make_unet(device):
    """(ours, diffusers') with the same weights in the same memory; frames apart."""
    theirs = diffusers.UNet2DConditionModel(sample_size=64, cross_attention_dim=768)
    theirs.to(device, torch.bfloat16 if device.type == "cuda" else torch.float32)
    with torch.device("meta"):
        ours = UNet(dataclasses.replace(model.PRESETS["sd1"], temporal="none"))
    ours.load_state_dict(theirs.state_dict(), assign=True)
    ours.requires_grad_(True)
    return ours, theirs


def make_vae(device):
    """Likewise."""
    config = vae.PRESETS["sd"]
    levels = len(config.block_out_channels)
    theirs = diffusers.AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * levels, latent_channels=4,
        up_block_types=["UpDecoderBlock2D"] * levels, layers_per_block=config.layers_per_block,
        block_out_channels=config.block_out_channels, sample_size=512,
    )
    theirs.to(device, torch.bfloat16 if device.type == "cuda" else torch.float32).eval()
    with torch.device("meta"):
        ours = AutoencoderKL(config)
    ours.load_state_dict(theirs.state_dict(), assign=True)
    return ours, theirs


def make_text(device):
    """Likewise, and (our tokenizer, transformers'), of a vocabulary much smaller than CLIP's."""
    config = text.PRESETS["sd1"]
    theirs = transformers.CLIPTextModel(transformers.CLIPTextConfig(**dataclasses.asdict(config)))
    theirs.to(device, torch.bfloat16 if device.type == "cuda" else torch.float32).eval()
    with torch.device("meta"):
        ours = CLIPTextModel(config)
    names = {
        f"text_model.{n.removeprefix('text_model.')}": p for n, p in theirs.state_dict().items()
    }
    ours.load_state_dict(names, assign=True)
    tokenizer = CLIPTokenizer.train([PROMPT, "moving left"], 20)
    with tempfile.TemporaryDirectory() as folder:
        save_tokenizer(folder, tokenizer)
        return ours, theirs, tokenizer, transformers.CLIPTokenizer.from_pretrained(folder)


def for_sampling(device, unet=None, autoencoder=None, encoder=None, tokenizer=None):
    """A Pipeline of ours, laid out as sample.py does it."""
    empty = torch.nn.Module
    pipeline = Pipeline(
        unet or empty(), autoencoder or empty(), encoder or empty(), tokenizer,
        Diffusion(), Sampling(num_frames=1, image_size=256, num_steps=4),
    )
    return pipeline.to(device)


def inputs(device, b, t):
    """Latents (b, t, 4, 32, 32), timesteps (b,) and hidden states (b, 77, 768)."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(b, t, 4, 32, 32, generator=generator).to(device, dtype)
    context = torch.randn(b, 77, 768, generator=generator).to(device, dtype)
    return latents, torch.full((b,), 500, device=device), context


def frame_job(device):
    """The U-Net on one frame with guidance: a batch of two."""
    ours, theirs = make_unet(device)
    ours = for_sampling(device, unet=ours).unet
    latents, timesteps, _ = inputs(device, 1, 1)
    _, _, context = inputs(device, 2, 1)
    twice, both = latents.repeat(2, 1, 1, 1, 1), timesteps.repeat(2)
    return (
        lambda: ours(twice, both, context)[:, 0],
        lambda: theirs(twice[:, 0], both, context).sample,
    )


def clip_job(device):
    """The U-Net on a clip of 16 frames, which diffusers gets as 16 images with 16 texts."""
    ours, theirs = make_unet(device)
    ours = for_sampling(device, unet=ours).unet
    latents, timesteps, context = inputs(device, 1, FRAMES)
    texts = context.repeat(FRAMES, 1, 1)
    return (
        lambda: ours(latents, timesteps, context)[0],
        lambda: theirs(latents[0], timesteps.repeat(FRAMES), texts).sample,
    )


def training_job(device):
    """Forward and backward of the same clip, with gradient checkpointing."""
    ours, theirs = make_unet(device)
    ours.gradient_checkpointing = True
    theirs.train().enable_gradient_checkpointing()
    latents, timesteps, context = inputs(device, 1, FRAMES)

    def step(unet, *arguments):
        output = unet(*arguments)
        F.mse_loss(getattr(output, "sample", output).flatten(), latents.flatten()).backward()
        gradient = unet.conv_in.weight.grad
        unet.zero_grad()
        return gradient

    texts = context.repeat(FRAMES, 1, 1)
    return (
        lambda: step(ours, latents, timesteps, context),
        lambda: step(theirs, latents[0], timesteps.repeat(FRAMES), texts),
    )


def decode_job(device):
    """The autoencoder's decoder on 16 frames of 256x256."""
    ours, theirs = make_vae(device)
    ours = for_sampling(device, autoencoder=ours).vae
    latents = inputs(device, 1, FRAMES)[0]
    factor = ours.config.scaling_factor
    return (
        lambda: decode_clips(ours, latents)[0],
        lambda: theirs.decode(latents[0] / factor).sample.clamp(-1, 1),
    )


def image_job(device):
    """From a prompt to pixels: an image of 256x256, four DDIM steps, guidance."""
    encoder, their_encoder, tokenizer, their_tokenizer = make_text(device)
    (unet, their_unet), (autoencoder, their_vae) = make_unet(device), make_vae(device)
    scheduler = diffusers.DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
        set_alpha_to_one=False, steps_offset=1,
    )
    theirs = diffusers.StableDiffusionPipeline(
        their_vae, their_encoder, their_tokenizer, their_unet, scheduler, None, None,
        requires_safety_checker=False,
    )
    theirs.set_progress_bar_config(disable=True)
    ours = for_sampling(device, unet, autoencoder, encoder, tokenizer)
    noise = randn((1, 1, 4, 32, 32), [torch.Generator().manual_seed(0)])[:, 0]

    def draw():
        *_, latents = ours.sample([PROMPT], [0])
        return ours.decode(latents)[0]

    def draw_theirs():
        images = theirs(PROMPT, 256, 256, 4, guidance_scale=7.5, output_type="pt",
                          latents=noise.to(device, their_unet.dtype)).images
        return images.float().cpu() * 2 - 1

    return draw, draw_theirs


JOBS = {
    "frame": frame_job, "clip": clip_job, "training": training_job, "decode": decode_job,
    "image": image_job,
}


def peak_memory(function, device):
    """GiB that a call needs on top of what was there before it."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        return (torch.cuda.max_memory_allocated() - before) / 2**30
    ctypes.CDLL(None).malloc_trim(0)  # give back what building the networks has freed (Linux)
    Path("/proc/self/clear_refs").write_text("5")  # the peak is from now on
    before = _status("VmRSS")
    function()
    return (_status("VmHWM") - before) / 2**20


def _status(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith(name)))  # kB


def compare(name, device, repetitions):
    """One line of the table: ratio of times with its range, seconds, memory, difference."""
    torch.manual_seed(0)
    ours, theirs = JOBS[name](device)
    with torch.set_grad_enabled(name == "training"):
        a, b = ours().float().cpu(), theirs().float().cpu()
        difference = ((a - b).abs().max() / b.abs().max()).item()
        seconds = measure({"ours": ours, "theirs": theirs}, repetitions, device)
    del ours, theirs  # the processes that measure memory need it
    medians = " and ".join(f"{statistics.median(seconds[side]):.2f}" for side in SIDES)
    peaks = " and ".join(in_new_process(name, device, "--side", side) for side in SIDES)
    what = " ".join(JOBS[name].__doc__.split()).rstrip(".")
    print(row(what, ratio(seconds, "ours", "theirs"), medians, peaks, f"{difference:.0e}"))


def in_new_process(name, device, *arguments):
    """What a process prints that runs one job for one side."""
    command = [sys.executable, "-m", "studies.beside_diffusers", "--only", name,
               "--device", str(device), *arguments]
    return subprocess.check_output(command, text=True, stderr=subprocess.DEVNULL).strip()


def write_checkpoint(folder):
    """A single file of Stable Diffusion 1's full size, and the configs that diffusers wants."""
    with torch.device("meta"):
        networks = {
            "unet": UNet(model.PRESETS["sd1"]), "vae": AutoencoderKL(vae.PRESETS["sd"]),
            "text_encoder": CLIPTextModel(text.PRESETS["sd1"]),
        }
    tensors, form = {}, {f"{configs.TEXT}transformer.text_model.": None}
    for part, network in networks.items():
        state = network.state_dict()
        for name, (place, _) in names.names_in_file(part, network, form, ema=False).items():
            tensors[place] = 0.02 * torch.randn(state[name].shape)
    save_safetensors(folder / "model.safetensors", tensors)
    to_json = configs.unet_to_json, configs.vae_to_json, configs.text_to_json
    for (part, network), values in zip(networks.items(), to_json, strict=True):
        write_json(folder / part / "config.json", values(network.config))
    save_tokenizer(folder / "tokenizer", CLIPTokenizer.train([PROMPT], 20))
    save_schedule(folder, Diffusion(), Sampling(num_frames=1, image_size=512))


def load(folder, side):
    """Load the single file, then read all of its weights; prints both times and the memory."""
    start = time.perf_counter()

    def work():
        path = folder / "model.safetensors"
        if side == "ours":
            model = load_pipeline(path)
        else:
            model = diffusers.StableDiffusionPipeline.from_single_file(
                path, config=str(folder), local_files_only=True, safety_checker=None,
                feature_extractor=None,
            )
        loaded = time.perf_counter() - start
        networks = model.unet, model.vae, model.text_encoder
        total = sum(p.sum().item() for network in networks for p in network.parameters())
        print(f"{loaded:.2f} {time.perf_counter() - start:.2f} {total:.6g}", end=" ")

    print(f"{peak_memory(work, torch.device('cpu')):.2f}")


def compare_loading(device, repetitions):
    """The lines of the table for a file of 4.3 GB."""
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint(Path(folder))
        rows = {side: [] for side in SIDES}
        for _ in range(repetitions + 1):  # the first turn brings the file into the system's cache
            for side in SIDES:
                line = in_new_process("loading", device, "--side", side, "--folder", folder)
                rows[side].append([float(cell) for cell in line.split()])
    kinds = ("loading a single file of 4.3 GB", "the same, and reading every weight once")
    ours, theirs = (list(zip(*rows[side][1:], strict=True)) for side in SIDES)
    for i, what in enumerate(kinds):
        medians = " and ".join(f"{statistics.median(side[i]):.2f}" for side in (ours, theirs))
        peaks = " and ".join(f"{statistics.median(side[3]):.2f}" for side in (ours, theirs))
        difference = abs(ours[2][0] - theirs[2][0]) / abs(theirs[2][0])
        seconds = {"ours": ours[i], "theirs": theirs[i]}
        print(row(what, ratio(seconds, "ours", "theirs"), medians, peaks, f"{difference:.0e}"))


def main():
    parser = argparse.ArgumentParser(description="Compare with diffusers.", allow_abbrev=False)
    parser.add_argument("--only", choices=TURNS, help="one job (default: all)")
    parser.add_argument("--repetitions", type=int, help=f"turns (default: {TURNS})")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, ... (default: auto)")
    parser.add_argument("--side", choices=SIDES, help="measure the memory of one side only")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)  # of --only loading
    args = parser.parse_args()
    device = choose_device(args.device)
    torch.set_flush_denormal(True)
    if args.folder:
        return load(args.folder, args.side)
    if args.side:
        function = JOBS[args.only](device)[SIDES.index(args.side)]
        with torch.set_grad_enabled(args.only == "training"):
            return print(f"{peak_memory(function, device):.2f}")
    if not args.only:
        print(table(["ours over diffusers'", "time", "seconds", "peak memory, GiB", "difference"]))
        for name in TURNS:
            turns = ["--repetitions", str(args.repetitions)] if args.repetitions else []
            print(in_new_process(name, device, *turns), flush=True)
        return None
    turns = args.repetitions or TURNS[args.only]
    if args.only == "loading":
        return compare_loading(device, turns)
    return compare(args.only, device, turns)


if __name__ == "__main__":
    run_main(main)
