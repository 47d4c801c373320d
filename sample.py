"""Draw clips and images from text with a trained model, or with Stable Diffusion.

    python sample.py runs/demo "a red circle moving left"
    python sample.py v1-5-pruned.safetensors "a red fox in snow" --merges bpe_simple_vocab.txt.gz
    python sample.py runs/demo --prompts-file prompts.txt --output clips/ --format webp
    python sample.py runs/demo "a red square moving up" "a red circle moving up" --output both.gif
    python sample.py runs/demo "a cyan triangle" --num-frames 1 --output triangle.png

A clip depends on its prompt and its seed alone: prompt i is drawn with seed + i, whatever the size
of a batch and on whatever device. A folder as --output gets a file per prompt, a file shows all of
them in a grid: .gif, .webp, .mp4 (with ffmpeg), or .png, one row per clip.
"""

import argparse
import dataclasses
import sys
from pathlib import Path

import torch
from tqdm import tqdm

from cli import add_flags, check_ranges, choose_device, given_flags, run_main
from devices import compile_for_sampling
from files import read_bytes, require_room
from media.write import WRITERS, enlarge, require_writer, write_samples
from memory import check_sampling
from pipeline import Sampling
from weights import add_checkpoint_flags, load_pipeline, use_decoder


def read_prompts(path):
    """The prompts of a text file, one a line; empty lines are skipped."""
    try:  # utf-8-sig drops the mark that some Windows editors write in front
        lines = read_bytes(path).decode("utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise ValueError(f"{path}: not a text file in UTF-8") from None
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise ValueError(f"{path}: no prompts in it; write one a line")
    return prompts


def generate(pipeline, prompts, sampling, seed, batch_size):
    """Yield a clip (t, 3, h, w) in [-1, 1] for each prompt, prompt i drawn with seed + i."""
    total = len(prompts) * sampling.num_steps
    with tqdm(total=total, desc="sample", unit="step", leave=False) as bar:
        for start in range(0, len(prompts), batch_size):
            batch = prompts[start : start + batch_size]
            seeds = range(seed + start, seed + start + len(batch))
            for latents in pipeline.sample(batch, seeds, sampling):  # b t c h/f w/f
                bar.update(len(batch))
            yield from pipeline.decode(latents)  # b t 3 h w, one by one


def main():
    parser = argparse.ArgumentParser(
        description="Draw clips from text.", allow_abbrev=False,
        epilog="Defaults of the drawing are the run's own (sampling.json); other models draw an "
               "image (one frame) of the size that they were trained on.")
    parser.add_argument("path", type=Path, metavar="PATH",
                        help="a run, a diffusers folder or a single file")
    parser.add_argument("prompts", nargs="*", metavar="PROMPT", help="what to draw")
    parser.add_argument("--prompts-file", type=Path, help="a text file with a prompt on each line")
    parser.add_argument("--output", type=Path, help="file or folder (default: samples, in the run)")
    parser.add_argument("--format", choices=[name[1:] for name in WRITERS],
                        help="of files in a folder (default: gif; png for one frame)")
    parser.add_argument("--zoom", type=int, default=1, help="enlarge every pixel (default: 1)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the first prompt (default: 0)")
    parser.add_argument("--batch-size", type=int, default=8, help="clips at a time (default: 8)")
    parser.add_argument("--decoder", type=Path, metavar="FOLDER", help="decode with another "
                        "autoencoder (default: the run's video_decoder/, if it has one)")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, ... (default: auto)")
    parser.add_argument("--compile", action="store_true",
                        help="compile the U-Net: minutes at full size, then faster steps")
    add_flags(parser, Sampling(), show_defaults=False)
    add_checkpoint_flags(parser)
    args = parser.parse_intermixed_args()
    prompts = args.prompts + (read_prompts(args.prompts_file) if args.prompts_file else [])
    if not prompts:
        raise ValueError('needs a prompt, such as "a red circle moving left", or --prompts-file')
    check_ranges(args, batch_size=(1, 10**6), zoom=(1, 10**4), seed=(0, 2**62))
    device = choose_device(args.device)
    pipeline = load_pipeline(args.path, None, args.merges, args.prediction_type, args.ema)
    for note in (*pipeline.report.notes, *use_decoder(pipeline, args.path, args.decoder)):
        print(note, file=sys.stderr)
    pipeline.to(device)
    if args.compile:
        compile_for_sampling(pipeline.unet, device)
    sampling = dataclasses.replace(pipeline.sampling, **given_flags(args, Sampling()))
    is_run = (args.path / "train.json").exists()
    output = args.output or (args.path / "samples" if is_run else Path("samples"))
    suffix = "." + (args.format or ("png" if sampling.num_frames == 1 else "gif"))
    one_file = output.suffix and not output.is_dir()  # or else a file per prompt in this folder
    if one_file and args.format not in (None, output.suffix[1:].lower()):
        raise ValueError(f"--format {args.format} contradicts --output {output}")
    # What would fail at the end fails before the work.
    require_writer(output if one_file else f"x{suffix}")
    require_room(output if one_file else output / "x")
    at_once = min(args.batch_size, len(prompts))
    check_sampling(pipeline, sampling, at_once, len(prompts) if one_file else 1, args.zoom)
    torch.set_flush_denormal(True)  # numbers near 0 would take a CPU many times as long
    # Generators: in a folder, each batch is written before the next one is drawn.
    clips = generate(pipeline, prompts, sampling, args.seed, args.batch_size)
    clips = (enlarge(clip, args.zoom) for clip in clips)
    for path in write_samples(clips, prompts, output, suffix, sampling.frames_per_second):
        print(path)


if __name__ == "__main__":
    run_main(main)
