"""Which temporal variant is best? One image model, every variant, trained equally.

    python -m studies.compare runs/demo --quick       one seed, for a CPU
    python -m studies.compare runs/demo               three seeds, for a GPU
    python -m studies.compare runs/demo --variants shift,shift-front,shift-end --steps 1350

RUN has finished its image stage on MovingShapes. Each variant starts as that image model and learns
clips for the same number of steps on the same batches, because everything random in step k follows
from the seed and k. Then all variants draw the same prompts from the same noise.

report.py writes tables and a sheet of clips; costs.py measures what the variants cost. The
same call again continues a comparison that was stopped; more seeds or variants add to it.
"""

import dataclasses
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

import temporal
import train
from checkpoints.weights import load_unet
from evaluate import (choose_prompts, consistency, draw, evaluate_agreement, mean_over_clips,
                      real_clips)
from shapes import HELD_OUT, SEEN, caption_of
from studies.measuring import device_name
from studies.places import PLACES, place_shift
from studies.report import write_report, write_sheet
from support.cli import Parser, add_flags, given_flags, option, run_main
from support.devices import choose_device, precision
from support.files import read_json, write_json
from training.cache import cache_texts, digest
from training.options import read_record
from training.run import Run, load_image_model, open_data
from trainer import Stopped
from vae import encode_clip


@dataclass(frozen=True)
class Variant:
    """The options of a row's training that are its own, and none of the run's."""

    temporal: str
    shifts: int = 1
    new_layers_rate: float = 1.0
    # except this one, which train.py does not have
    place: str | None = None  # another position of the shift, a name of PLACES


VARIANTS = {
    **{name: Variant(name) for name in temporal.VARIANTS},  # a row for a new layer, too
    "shift-twice": Variant("shift", shifts=2),
    # Three times the rate makes attention's loss fall faster, but not the losses of other variants.
    "attention": Variant("attention", new_layers_rate=3.0),
    "joint": Variant("joint", new_layers_rate=3.0),
    **{f"shift-{place}": Variant("none", place=place) for place in PLACES},
}
PROMPT_SEED = 5000  # seed of the first clip drawn, the same for every variant


@dataclass(frozen=True)
class Choices:
    """The size of a comparison."""

    variants: str = option("none,shift,shift-twice,attention,joint,directed,conv",
                           f"some of {', '.join(VARIANTS)}, separated by commas")
    steps: int = option(3000, "training steps per variant", low=1)
    seeds: int = option(3, "trainings per variant, each with its own seed", low=1)
    checkpoints: int = option(10, "points of a curve", low=1)
    curve_prompts: int = option(96, "clips drawn for a point", low=2)
    num_prompts: int = option(512, "clips drawn at the end", low=2)
    device: str = option("auto", "cpu, cuda, cuda:1, ...")


FULL = Choices()
# 1,200 steps, because after 600 only the shift has learned motion.
QUICK = Choices(
    variants="none,shift,attention,directed,conv", steps=1200, seeds=1, checkpoints=4,
    curve_prompts=24, num_prompts=64,
)


class Comparison:
    """The run's image model and clips, which all trainings share, and the measures."""

    def __init__(self, run, output, choices):
        self.output, self.choices = output, choices
        self.options, finished = read_record(run)
        if "image" not in finished or self.options.data != "shapes":
            raise ValueError(f"{run}: needs a finished image stage on MovingShapes (--data shapes)")
        self.device = choose_device(choices.device)
        model = load_image_model(run, self.device, self.options.precision)
        model.unet.to(self.device)  # in float32, because trainings start from it
        sampling = self.options.sampling(self.options.num_frames)
        self.model = dataclasses.replace(model, sampling=sampling)
        self.prompts = choose_prompts(choices.num_prompts)

    @cached_property
    def data(self):
        """The run's clips as latents, and their captions."""
        clips = open_data(self.options)
        return [encode_clip(self.model.vae, frames).cpu() for frames, _ in clips], clips.captions

    def draw(self, unet, prompts, num_frames):
        """Clips of combinations that a U-Net draws, always from the same noise."""
        model = dataclasses.replace(self.model, unet=unet)
        with precision(self.device, self.options.precision):
            return draw(model, prompts, num_frames, PROMPT_SEED, batch_size=32)

    def score(self, unet):
        """Agreement and consistency of a U-Net's clips and images of the prompts."""
        clips = self.draw(unet, self.prompts, self.options.num_frames)
        drawn = {"clips": clips, "images": self.draw(unet, self.prompts, 1)}
        steady = float(mean_over_clips(consistency, clips[:, None]))
        return evaluate_agreement(drawn, {}, self.prompts) | {"consistency": steady}

    def references(self):
        """{name: {column of the quality table: value}} to compare with."""
        drawn = {"images": self.draw(self.model.unet, self.prompts, 1)}
        rates = evaluate_agreement(drawn, {}, self.prompts)
        real = real_clips(len(self.prompts), self.options.num_frames, self.options.image_size,
                          PROMPT_SEED, self.prompts)
        return {"the image model": {"images right, %": rates["images, all"]["all"]},
                "real clips": {"consistency": mean_over_clips(consistency, real[:, None])}}

    def options_of(self, name, seed):
        """TrainOptions of a variant's training, from the run's."""
        own, steps = dataclasses.asdict(VARIANTS[name]), self.choices.steps
        del own["place"]
        return dataclasses.replace(
            self.options, **own, seed=self.options.seed + seed, video_steps=steps,
            save_every=max(1, steps // self.choices.checkpoints), device=self.choices.device)

    def load(self, name, seed):
        """The trained U-Net of a variant."""
        unet = load_unet(self.output / f"{name}-{seed}" / "unet").to(self.device)
        return place_shift(unet, VARIANTS[name].place)

    def train(self, name, seed):
        """Train a variant on clips, from where an earlier call was stopped, and score it."""
        folder, options = self.output / f"{name}-{seed}", self.options_of(name, seed)
        prompts, path = choose_prompts(self.choices.curve_prompts), folder / "curve.json"
        curve = read_json(path) if path.exists() else {}

        def look(step):
            clips = self.draw(unet, prompts, options.num_frames)
            curve[str(step)] = evaluate_agreement({"clips": clips}, {}, prompts)["clips, all"]
            write_json(path, curve)

        begun = (folder / "train.json").exists()
        if begun and "video" in read_record(folder)[1]:  # stopped before it was scored
            unet = self.load(name, seed)
        else:
            run = Run(folder, options, ["vae", "image"], resume=begun)
            latents, captions = self.data
            torch.manual_seed(options.seed)  # for new weights
            unet = train.video_unet(self.model.unet, options)
            unet = place_shift(unet, VARIANTS[name].place)
            train.train_video(run, dataclasses.replace(self.model, unet=unet), latents, captions,
                              cache_texts(run, captions, self.model), look,
                              self.choices.checkpoints)
        if str(options.video_steps) not in curve:
            look(options.video_steps)
        write_json(folder / "result.json", {"scores": self.score(unet), "curve": curve})
        print(f"trained: {name}, seed {seed}", flush=True)


def check_settings(path, now):
    """Record the settings that make results comparable, beside the settings of earlier calls.

    Raises ValueError if an earlier call had other settings.
    """
    before = read_json(path) if path.exists() else {}
    for key, value in now.items():
        if before.get(key, value) != value:
            raise ValueError(f"{path.parent}: was made with {key} {before[key]}, not {value}; "
                             "choose another --output")
    write_json(path, before | now)


def compare(run, output, choices):
    """Do what is not done yet, write the report and return its text."""
    names = list(dict.fromkeys(choices.variants.split(",")))
    if unknown := set(names) - VARIANTS.keys():
        raise ValueError(f"--variants needs some of {', '.join(VARIANTS)}; got {min(unknown)}")
    comparison = Comparison(run, output, choices)
    check_settings(output / "settings.json", {
        "image_model": digest(comparison.model.unet),
        "sampling": dataclasses.asdict(comparison.model.sampling),
        **{key: getattr(choices, key)
           for key in ("steps", "checkpoints", "curve_prompts", "num_prompts")},
        **{name: dataclasses.asdict(VARIANTS[name]) for name in names}})
    paths = {(name, seed): output / f"{name}-{seed}" / "result.json"
             for seed in range(choices.seeds) for name in names}
    try:
        for job, path in paths.items():
            if not path.exists():
                comparison.train(*job)
    except Stopped:
        raise Stopped("stopped, and the state is saved; call again to continue") from None
    results = {n: [read_json(paths[n, seed]) for seed in range(choices.seeds)] for n in names}
    shown, num_frames = [HELD_OUT[0], SEEN[20], HELD_OUT[9]], comparison.options.num_frames
    drawn = {name: comparison.draw(comparison.load(name, 0), shown, num_frames) for name in names}
    write_sheet(output / "sheet.png", [caption_of(*prompt) for prompt in shown], drawn)
    title = (f"{choices.steps} steps from the image model of {run}; {choices.seeds} seeds, "
             f"{choices.num_prompts} prompts. {device_name(comparison.device)}.")
    return write_report(output, title, results, comparison.references())


def main():
    parser = Parser(description="Train temporal variants equally, and compare what they draw.")
    parser.add_argument("run", type=Path, metavar="RUN", help="run with a finished image stage")
    parser.add_argument("--quick", action="store_true", help="defaults for one seed, fewer steps")
    parser.add_argument("--output", type=Path, help="folder (default: RUN/compare)")
    add_flags(parser, FULL)
    args = parser.parse_args()
    choices = dataclasses.replace(QUICK if args.quick else FULL, **given_flags(args, FULL))
    torch.set_flush_denormal(True)
    print(compare(args.run, args.output or args.run / "compare", choices))


if __name__ == "__main__":
    run_main(main)
