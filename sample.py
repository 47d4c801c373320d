"""Draw clips and images from text with a trained model or with Stable Diffusion.

    python sample.py runs/demo "a red circle moving left"
    python sample.py v1-5-pruned.safetensors "a red fox in snow" --merges bpe_simple_vocab.txt.gz

A clip depends only on its prompt and its seed: prompt i is drawn with seed + i, at any batch size
and on any device. A folder as --output gets a file per prompt; a file shows all of them in a grid:
.gif, .mp4 (with ffmpeg), or .png with one row per clip.
"""

import dataclasses
import sys
from pathlib import Path

import torch
from tqdm import tqdm

from checkpoints.finite import decode_finite
from checkpoints.tokenizers import describe_cuts
from checkpoints.weights import add_checkpoint_flags, load_pipeline
from media.write import WRITERS, require_writer, write_samples
from pipeline import Sampling
from support.cli import Parser, add_flags, given_flags, number, run_main
from support.devices import add_drawing_flags, choose_device, compile_for_sampling, precision_notes
from support.files import read_prompts


def generate(pipeline, prompts, sampling, seed, batch_size):
    """Yield a clip (t, 3, h, w) in [-1, 1] for each prompt, prompt i drawn with seed + i."""
    texts = [*prompts, sampling.negative_prompt] if sampling.negative_prompt else prompts
    for note in describe_cuts(pipeline.tokenizer, texts, "prompts"):
        print(note, file=sys.stderr)
    total = len(prompts) * sampling.num_steps
    with tqdm(total=total, desc="sample", unit="step", leave=False) as bar:
        for start in range(0, len(prompts), batch_size):
            batch = prompts[start : start + batch_size]  # b texts
            seeds = range(seed + start, seed + start + len(batch))  # one per clip
            for latents in pipeline.sample(batch, seeds, sampling):  # b t c h/f w/f
                bar.update(len(batch))
            yield from decode_finite(pipeline, batch, latents)  # b t 3 h w, one by one


def main():
    parser = Parser(description="Draw clips from text.", epilog="Sampling options default to the "
                    "run's own (sampling.json). Other models draw an image (one frame) of the size "
                    "that they were trained on.")
    parser.add_argument("path", type=Path, metavar="PATH",
                        help="a run, a diffusers folder or a single file")
    parser.add_argument("prompts", nargs="*", metavar="PROMPT", help="what to draw")
    parser.add_argument("--prompts-file", type=Path, help="a text file with a prompt on each line")
    parser.add_argument("--output", type=Path, help="file or folder (default: samples, in the run)")
    parser.add_argument("--format", choices=[name[1:] for name in WRITERS],
                        help="format of files in a folder (default: gif; png for one frame)")
    parser.add_argument("--zoom", type=number(int, 1, 64), default=0,
                        help="enlarge every pixel (default: small clips, to 128 pixels or more)")
    add_drawing_flags(parser, seed=0, batch_size=8)
    parser.add_argument("--compile", action="store_true",
                        help="compile the U-Net; takes minutes, then steps are faster")
    add_flags(parser, Sampling(), show_defaults=False)
    add_checkpoint_flags(parser)
    args = parser.parse_intermixed_args()
    prompts = args.prompts + (read_prompts(args.prompts_file) if args.prompts_file else [])
    if not prompts:
        raise ValueError('needs a prompt, such as "a red circle moving left", or --prompts-file')
    device = choose_device(args.device)
    pipeline = load_pipeline(args.path, None, args.merges, args.prediction_type, args.ema,
                             zero_terminal_snr=args.zero_terminal_snr)
    sampling = dataclasses.replace(pipeline.sampling, **given_flags(args, Sampling()))
    for note in *pipeline.report.notes, *precision_notes(pipeline.unet, device, args.precision):
        print(note, file=sys.stderr)
    pipeline.to(device, args.precision)
    if args.compile:
        compile_for_sampling(pipeline.unet, device)
    is_run = (args.path / "train.json").exists()
    output = args.output or (args.path / "samples" if is_run else Path("samples"))
    suffix = "." + (args.format or ("png" if sampling.num_frames == 1 else "gif"))
    one_file = output.suffix and not output.is_dir()  # otherwise a file per prompt in this folder
    if one_file and args.format not in (None, output.suffix[1:].lower()):
        raise ValueError(f"--format {args.format} contradicts --output {output}")
    require_writer(output if one_file else f"x{suffix}")  # fail before the work, not after it
    torch.set_flush_denormal(True)  # numbers near 0 would make a CPU many times slower
    clips = generate(pipeline, prompts, sampling, args.seed, args.batch_size)  # batch by batch
    for path in write_samples(clips, prompts, output, suffix, sampling.frames_per_second,
                              args.zoom):
        print(path)


if __name__ == "__main__":
    run_main(main)
