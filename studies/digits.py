"""Captioned Moving MNIST: a handwritten digit bounces, as a folder of clips and as a score.

    python -m studies.digits make my_digits --mnist MNIST    clips with captions
    python train.py runs/digits --data my_digits
    python -m studies.digits evaluate runs/digits            do clips show what their text says?

"the digit 5 is moving left then right ." is the protocol of Sync-DRAW (Mittal et al. 2017), TGANs-C
(Pan et al. 2017), GODIVA (Wu et al. 2021) and MAGE (Hu et al. 2022). Here each clip shows both of
its directions, two steps or more of each. Some pairs of a digit and a motion are held out of
training. The clips for training, the real clips to compare with and the reader (handwriting.py)
have different digits.
"""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from checkpoints.weights import load_pipeline, load_unet
from evaluate import print_table
from media.write import write_clip
from sample import generate
from studies.handwriting import MOTIONS, read_digits, score, train_reader
from support.cli import Parser, add_flags, given_flags, option, run_main
from support.devices import choose_device, freeze
from support.files import from_json, read_json, write_json, write_text
from training.options import read_record
from training.run import progress
from vae import encode_clip

FORMS = {"small": (2000, 8, 32, 20),  # clips, frames, pixels of a frame, pixels of a digit
         "published": (10000, 20, 64, 28)}
PAIRS = [(digit, motion) for digit in range(10) for motion in MOTIONS]
SPEEDS = 2, 3  # pixels per frame; both forms have room for a path at these speeds
MIN_STEPS = 2  # in each direction
PARTS = {"training": (0, 0.6), "reader": (0.6, 0.9), "real": (0.9, 1)}  # of each digit's images


@dataclass(frozen=True)
class Choices:
    """How a folder of clips is made; FOLDER/.digits.json keeps it."""

    mnist: str | None = option(None, "folder of MNIST's idx files, .gz or not; without it, the "
                               "1,797 digits of scikit-learn, 8x8 pixels")
    form: str = option("small", "small: 2,000 clips, 32x32 pixels, 8 frames, for a CPU; published: "
                       "10,000 clips, 64x64 pixels, 20 frames", choices=tuple(FORMS))
    split: str = option("pairs", "held out of training: one motion of each digit (pairs), or one "
                        "axis of each digit, as in MAGE (axis)", choices=("pairs", "axis"))
    seed: int = option(0, "seed of the clips", high=2**62)


@dataclass(frozen=True)
class Drawing:
    """What evaluate draws."""

    num_prompts: int = option(240, "clips to draw, half of them of held-out pairs", low=2)
    guidance_scale: float | None = option(None, "weight of the text; without it, the run's")
    seed: int = option(1000, "seed of the first clip", high=2**62)
    device: str = option("auto", "cpu, cuda, cuda:1, ...")


def caption_of(digit, motion):
    return f"the digit {digit} is moving {motion} ."


def pairs_of(split):
    """(seen, held-out) pairs of a split."""
    names = list(MOTIONS)
    held_out = [(digit, motion) for digit, motion in PAIRS if (
        motion == names[digit % 4] if split == "pairs" else names.index(motion) // 2 != digit % 2)]
    return [pair for pair in PAIRS if pair not in held_out], held_out


class Digits:
    """The images of one of PARTS, {digit: uint8 (n, s, s)}, and clips of them."""

    def __init__(self, choices, part):
        self.num_clips, self.num_frames, self.image_size, self.digit_size = FORMS[choices.form]
        self.rng_key = choices.seed, list(PARTS).index(part)
        images, labels = read_digits(choices.mnist)
        rng = np.random.default_rng(choices.seed)
        self.images = {}
        for digit in range(10):
            mine = rng.permutation(np.flatnonzero(labels == digit))  # the same for every part
            start, end = (round(end * len(mine)) for end in PARTS[part])
            if start == end:
                raise ValueError(f"{choices.mnist}: needs ten images of a {digit}, or more")
            self.images[digit] = np.stack([self.resize(images[i]) for i in mine[start:end]])

    def resize(self, image):
        """A digit of any size as digit_size x digit_size pixels."""
        return np.array(Image.fromarray(image).resize((self.digit_size,) * 2, Image.BICUBIC))

    def clip(self, i, digit, motion):
        """Clip i, of a pair: (t, 3, h, w) in [-1, 1]."""
        rng, size = np.random.default_rng([*self.rng_key, i]), self.digit_size
        image = rng.choice(self.images[digit])
        frames = np.zeros((self.num_frames, self.image_size, self.image_size), np.uint8)
        for frame, (x, y) in zip(frames, self.path(rng, *MOTIONS[motion]), strict=True):
            frame[y : y + size, x : x + size] = image
        return torch.from_numpy(frames)[:, None].expand(-1, 3, -1, -1) / 127.5 - 1

    def path(self, rng, dx, dy):
        """The upper left corners x, y (t, 2) of a digit that goes to a wall and back."""
        room, num_steps = self.image_size - self.digit_size, self.num_frames - 1
        speed = rng.choice(SPEEDS)
        longest = min(room // speed, num_steps - MIN_STEPS)  # steps in one direction
        turn = rng.integers(num_steps - longest, longest + 1)
        to_wall = speed * abs(np.arange(self.num_frames) - turn)
        along = to_wall if dx + dy < 0 else room - to_wall
        across = np.full_like(along, rng.integers(room + 1))
        return np.stack([along, across] if dx else [across, along], axis=1)


def make(folder, choices):
    """Write clips with captions for train.py, and how they were made."""
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder}: is not empty; choose a new folder")
    if choices.mnist is not None:
        choices = dataclasses.replace(choices, mnist=str(Path(choices.mnist).resolve()))
    digits, (seen, _) = Digits(choices, "training"), pairs_of(choices.split)
    lines = []
    for i in progress(range(digits.num_clips), "clips"):
        pair, name = seen[i % len(seen)], f"{i:05d}.gif"
        write_clip(folder / name, digits.clip(i, *pair))
        lines.append(json.dumps({"file_name": name, "text": caption_of(*pair)}) + "\n")
    write_text(folder / "metadata.jsonl", "".join(lines))
    write_json(folder / ".digits.json", dataclasses.asdict(choices))
    source = choices.mnist or "scikit-learn (8x8 pixels; --mnist for MNIST)"
    print(f"{folder}: {digits.num_clips} clips of {sum(map(len, digits.images.values()))} digits "
          f"of {source}; evaluate uses others")


def evaluate(run, drawing):
    """{row: {measure: percent}} of a run's clips and images, and of others to compare with."""
    where = Path(read_record(run)[0].data) / ".digits.json"
    if not where.exists():
        raise ValueError(f"{run}: needs a run of train.py on a folder of `studies.digits make`")
    choices = from_json(Choices, read_json(where), where)
    learned, real = Digits(choices, "reader").images, Digits(choices, "real")
    reader = train_reader(torch.from_numpy(np.concatenate(list(learned.values()))) / 255,
                          torch.tensor([d for d, images in learned.items() for _ in images]))
    pipeline, count = load_pipeline(run).to(choose_device(drawing.device)), drawing.num_prompts // 2
    pairs = [some[7 * i % len(some)] for some in pairs_of(choices.split) for i in range(count)]

    def draw(num_frames, **changes):
        model = dataclasses.replace(pipeline, **changes)
        how = dataclasses.replace(pipeline.sampling, num_frames=num_frames, guidance_scale=(
            drawing.guidance_scale or pipeline.sampling.guidance_scale))
        texts = [caption_of(*pair) for pair in pairs]
        return torch.stack(list(generate(model, texts, how, drawing.seed, batch_size=16)))

    def row(clips, part=slice(None)):
        return score(reader, clips[part], pairs[part], real.digit_size)

    rows = {}
    if pipeline.sampling.num_frames > 1:  # the video stage is finished
        clips = draw(pipeline.sampling.num_frames)
        rows = {"clips, seen pairs": row(clips, slice(count)),
                "clips, held-out pairs": row(clips, slice(count, None)), "images": row(draw(1))}
    image_unet = freeze(load_unet(run / "image_unet"), choose_device(drawing.device))
    rows["images before the video stage"] = row(draw(1, unet=image_unet))
    clips = torch.stack([real.clip(i, *pair) for i, pair in enumerate(pairs)])
    coded = [pipeline.decode(encode_clip(pipeline.vae, 127.5 * (clip + 1))[None]) for clip in clips]
    noise = torch.randn(clips.shape, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)
    return rows | {"real clips": row(clips), "real, autoencoded": row(torch.cat(coded)),
                   "noise": row(noise)}


def main():
    parser = Parser(description="Captioned Moving MNIST: make clips, evaluate a run.")
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("make", help="write a folder of clips with captions")
    command.add_argument("folder", type=Path, metavar="FOLDER", help="a new folder")
    add_flags(command, Choices())
    command = commands.add_parser("evaluate", help="read the clips that a run draws")
    command.add_argument("run", type=Path, metavar="RUN", help="run of train.py on such a folder")
    add_flags(command, Drawing())
    args = parser.parse_args()
    if args.command == "make":
        return make(args.folder, Choices(**given_flags(args, Choices())))
    torch.set_flush_denormal(True)
    drawing = Drawing(**given_flags(args, Drawing()))
    rows = evaluate(args.run, drawing)
    print_table("read as asked, %", rows)
    write_json(args.run / "digits.json", dataclasses.asdict(drawing) | {"rows": rows})


if __name__ == "__main__":
    run_main(main)
