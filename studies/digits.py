"""Captioned Moving MNIST: a handwritten digit bounces, as a folder of clips and as a score.

    python -m studies.digits make my_digits --mnist MNIST    clips with captions
    python train.py runs/digits --data my_digits
    python -m studies.digits evaluate runs/digits            do clips show what their text says?

"the digit 5 is moving left then right ." is the protocol of Sync-DRAW (Mittal et al. 2017), TGANs-C
(Pan et al. 2017), GODIVA (Wu et al. 2021) and MAGE (Hu et al. 2022). Here each clip shows both of
its directions, two steps or more of each. Some pairs of a digit and a motion are held out of
training. The clips for training, the real clips to compare with and the reader (digit_reader.py)
have different digits.
"""

import dataclasses
import gzip
import json
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from checkpoints.weights import load_pipeline, load_unet
from evaluate import print_table
from media.write import write_clip
from sample import generate
from studies.digit_reader import MOTIONS, score, train_reader
from support.cli import Parser, add_flags, given_flags, number, option, run_main
from support.devices import choose_device
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
    """How a folder of clips is made; FOLDER/digits.json keeps it."""

    mnist: str | None = option(None, "folder of MNIST's idx files, .gz or not; without it, the "
                               "1,797 digits of scikit-learn, 8x8 pixels")
    form: str = option("small", "small: 2,000 clips, 32x32 pixels, 8 frames, for a CPU; published: "
                       "10,000 clips, 64x64 pixels, 20 frames", choices=tuple(FORMS))
    split: str = option("pairs", "held out of training: one motion of each digit (pairs), or one "
                        "axis of each digit, as in MAGE (axis)", choices=("pairs", "axis"))
    seed: int = option(0, "seed of the clips", high=2**62)


def caption_of(digit, motion):
    return f"the digit {digit} is moving {motion} ."


def pairs_of(split):
    """(seen, held-out) pairs of a split."""
    names = list(MOTIONS)
    held_out = [(digit, motion) for digit, motion in PAIRS if (
        motion == names[digit % 4] if split == "pairs" else names.index(motion) // 2 != digit % 2)]
    return [pair for pair in PAIRS if pair not in held_out], held_out


def read_idx(path):
    """The array in one of MNIST's files: bytes 0, 0, 8 and the number of axes, lengths, values."""
    with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
        data = file.read()
    shape = struct.unpack_from(f">{data[3]}i", data, 4) if data[:3] == b"\0\0\x08" else ()
    start = 4 + 4 * len(shape)
    if not shape or len(data) != start + np.prod(shape):
        raise ValueError(f"{path}: damaged, or not an idx file of bytes; download it again")
    return np.frombuffer(data, np.uint8, offset=start).reshape(shape)


def read_digits(mnist):
    """Images (n, h, w) uint8 and labels (n,)."""
    if mnist is None:
        from sklearn.datasets import load_digits
        images, labels = load_digits(return_X_y=True)  # values from 0 to 16
        return (images.reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8), labels
    # By name without .gz, because torchvision leaves each file there twice.
    found = {path.name.removesuffix(".gz"): path for path in Path(mnist).rglob("*images*idx3*")}
    if not found:
        raise ValueError(f"{mnist}: needs MNIST's files train-images-idx3-ubyte and "
                         "train-labels-idx1-ubyte, also with .gz")
    parts = []
    for path in (found[name] for name in sorted(found)):
        name = path.name.replace("images", "labels").replace("idx3", "idx1")
        parts.append((read_idx(path), read_idx(path.with_name(name))))
    return tuple(np.concatenate(arrays) for arrays in zip(*parts, strict=True))


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
    write_json(folder / "digits.json", dataclasses.asdict(choices))
    source = choices.mnist or "scikit-learn (8x8 pixels; --mnist for MNIST)"
    print(f"{folder}: {digits.num_clips} clips of {sum(map(len, digits.images.values()))} digits "
          f"of {source}; evaluate uses others")


def evaluate(run, mnist, num_prompts, guidance_scale, seed, device):
    """{row: {measure: percent}} of a run's clips and images, and of others to compare with."""
    where = Path(read_record(run)[0].data) / "digits.json"
    if not where.exists():
        raise ValueError(f"{run}: needs a run of train.py on a folder of `studies.digits make`")
    choices = from_json(Choices, read_json(where), where)
    choices = dataclasses.replace(choices, mnist=mnist or choices.mnist)
    learned, real = Digits(choices, "reader").images, Digits(choices, "real")
    reader = train_reader(torch.from_numpy(np.concatenate(list(learned.values()))) / 255,
                          torch.tensor([d for d, images in learned.items() for _ in images]))
    pipeline, count = load_pipeline(run).to(device), num_prompts // 2
    pairs = [some[7 * i % len(some)] for some in pairs_of(choices.split) for i in range(count)]
    sampling = dataclasses.replace(pipeline.sampling, guidance_scale=(
        guidance_scale or pipeline.sampling.guidance_scale))

    def draw(model, num_frames):
        how, texts = dataclasses.replace(sampling, num_frames=num_frames), [
            caption_of(*pair) for pair in pairs]
        return torch.stack(list(generate(model, texts, how, seed, batch_size=16)))

    def row(clips, part=slice(None)):
        return score(reader, clips[part], pairs[part], real.digit_size)

    rows = {}
    if sampling.num_frames > 1:  # the video stage is finished
        clips = draw(pipeline, sampling.num_frames)
        rows = {"clips, seen pairs": row(clips, slice(count)),
                "clips, held-out pairs": row(clips, slice(count, None)),
                "images": row(draw(pipeline, 1))}
    image_model = dataclasses.replace(pipeline, unet=load_unet(run / "image_unet").to(device))
    rows["images before the video stage"] = row(draw(image_model, 1))
    clips = torch.stack([real.clip(i, *pair) for i, pair in enumerate(pairs)])
    coded = [pipeline.decode(encode_clip(pipeline.vae, 127.5 * (clip + 1))[None]) for clip in clips]
    noise = torch.randn(clips.shape, generator=torch.Generator().manual_seed(seed)).clamp(-1, 1)
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
    command.add_argument("--mnist", help="MNIST's folder, if it has moved")
    command.add_argument("--num-prompts", type=number(int, 2), default=240,
                         help="clips to draw, half of them of held-out pairs (default: 240)")
    command.add_argument("--guidance-scale", type=number(float, 0),
                         help="weight of the text (default: the run's)")
    command.add_argument("--seed", type=number(int, 0, 2**62), default=1000,
                         help="seed of the first clip (default: 1000)")
    command.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, ... (default: auto)")
    args = parser.parse_args()
    if args.command == "make":
        return make(args.folder, Choices(**given_flags(args, Choices())))
    torch.set_flush_denormal(True)
    rows = evaluate(args.run, args.mnist, args.num_prompts, args.guidance_scale, args.seed,
                    choose_device(args.device))
    print_table("read as asked, %", rows)
    write_json(args.run / "digits.json", {"seed": args.seed, "num_prompts": args.num_prompts,
                                          "guidance_scale": args.guidance_scale, "rows": rows})


if __name__ == "__main__":
    run_main(main)
