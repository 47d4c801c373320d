"""Key frames, then what lies between them, at a chosen frame rate: MagicVideo, Zhou et al. 2022.

All key frames are drawn at once, far apart in time; then the same model draws the frames between
two of them, which it knows (MagicVideo has a separate one for this). It is told the frame rate, as
a number that is embedded like the timestep: asked for a lower one, things move further from frame
to frame.

    python -m papers.key_frames sample runs/long "a red circle moving left" --frame-rate 8
    python -m papers.key_frames interpolate runs/long clip.gif --frames-between 3

It needs a run of papers/long_video.py, whose training has both tasks.
"""

import argparse
import dataclasses
from pathlib import Path

import torch

from cli import check_ranges, choose_device, run_main
from files import require_room
from media.read import read_clip
from media.write import require_writer, write_clip
from memory import check_sampling
from papers.chains import Chain, begin, seeds_of
from papers.known_frames import Guidance, draw, load_model
from vae import encode_clip

WINDOW = 8  # frames from the first to the last of a window of interpolation, as in training


def interpolate(model, context, keys, between, frame_rate, seeds, how=Guidance()):
    """Frames (b, (t - 1) (between + 1) + 1, c, h, w) with `between` new ones after each of keys.

    keys (b, t, c, h, w) are latents, frame_rate is that of all frames. A window has about 9 frames,
    as in training, so with few frames between a new one sees more than the nearest key frames.
    """
    step, last = between + 1, keys.shape[1] - 1
    gaps = max(1, WINDOW // step)
    frames = [keys[:, :1]]
    for first in range(0, last, gaps):
        start = max(0, min(first, last - gaps))  # the last window reaches back into the one before
        part = keys[:, start : start + gaps + 1]
        count = (part.shape[1] - 1) * step + 1
        known = torch.arange(count) % step == 0
        latents = keys.new_zeros(len(keys), count, *keys.shape[2:])
        latents[:, known] = part
        latents = draw(model, context, latents, known, frame_rate, seeds_of(seeds, 1 + first), how)
        frames.append(latents[:, 1 + (first - start) * step :])
    return torch.cat(frames, dim=1)


def draw_key_frames(model, context, num_frames, frame_rate, seeds):
    """Key frames (b, num_frames, c, h, w) of the text alone, all at once."""
    size = model.sampling.image_size // model.vae.config.downscale
    return begin(model, context, Chain(num_frames, frame_rate=frame_rate), seeds, size)


def add_result_flags(command):
    command.add_argument("--frames-between", type=int, default=3, help="(default: 3)")
    command.add_argument("--frame-rate", type=float,
                         help="frames per second of the result (default: the run's)")
    command.add_argument("--seed", type=int, default=0)
    command.add_argument("--output", type=Path, default=Path("key_frames.gif"))
    command.add_argument("--device", default="auto")


def main():
    parser = argparse.ArgumentParser(description="Key frames and interpolation.",
                                     allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("sample", help="draw key frames and what lies between them")
    command.add_argument("run", type=Path, metavar="RUN", help="run of papers.long_video")
    command.add_argument("prompt", metavar="PROMPT")
    command.add_argument("--num-key-frames", type=int, default=16, help="(default: 16)")
    add_result_flags(command)
    command = commands.add_parser("interpolate", help="draw frames between those of a clip")
    command.add_argument("run", type=Path, metavar="RUN")
    command.add_argument("clip", type=Path, metavar="CLIP")
    command.add_argument("--prompt", default="", help="what the clip shows (default: nothing)")
    add_result_flags(command)
    args = parser.parse_args()
    check_ranges(args, frames_between=(1, 100), seed=(0, 2**40), frame_rate=(0.1, 50),
                 num_key_frames=(2, 10**5))
    require_writer(args.output)
    require_room(args.output)
    torch.set_flush_denormal(True)
    model = load_model(args.run).to(choose_device(args.device))
    rate = args.frame_rate or model.sampling.frames_per_second
    context = model.encode_text([args.prompt])
    step = args.frames_between + 1
    frames, num_key_frames = None, getattr(args, "num_key_frames", None)
    if args.command == "interpolate":
        frames, _ = read_clip(args.clip, image_size=model.sampling.image_size)
        num_key_frames = len(frames)
        if num_key_frames < 2:
            raise ValueError(f"{args.clip}: needs two frames to draw others between, got 1")
    check_sampling(model, dataclasses.replace(
        model.sampling, num_frames=(num_key_frames - 1) * step + 1), 1, 1)
    if frames is None:
        keys = draw_key_frames(model, context, num_key_frames, rate / step, [args.seed])
    else:
        frames = torch.from_numpy(frames).permute(0, 3, 1, 2)  # t h w c -> t c h w
        keys = encode_clip(model.vae, frames)[None]
    latents = interpolate(model, context, keys, args.frames_between, rate, [args.seed])
    write_clip(args.output, model.decode(latents)[0], rate)
    print(args.output)


if __name__ == "__main__":
    run_main(main)
