"""Which temporal variant is best? One image model, every variant, trained equally.

    python -m studies.compare runs/demo --quick               15 minutes on two cores
    python -m studies.compare runs/demo                       all variants, three seeds: for a GPU
    python -m studies.compare runs/demo --variants none,shift-causal --steps 600 --output two

RUN has finished its image stage on MovingShapes. Each variant starts as that image model and learns
clips for the same number of steps on the same batches: the clips, noise, timesteps and captions of
step k follow from the seed and k. Then all draw the same prompts from the same noise.

report.py writes the tables of costs and of agreement with the text, the curves and a sheet of
clips. A comparison that was stopped continues when it is called again, and one with more seeds or
variants reuses the trainings that are finished.
"""

import argparse
import dataclasses
import math
import multiprocessing
import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

import train
from cache import digest_of
from cli import add_flags, check_ranges, choose_device, given_flags, option, run_main
from devices import precision
from evaluate import choose_prompts, draw, evaluate_agreement
from files import read_json, write_json
from metrics import (
    NUM_FEATURES, consistency, features_of, frechet_distance, load_feature_net, mean_over_clips,
    real_clips,
)
from run import Run, load_image_model, open_data, read_record
from shapes import HELD_OUT, SEEN, caption_of
from studies.bench import device_name
from studies.costs import KINDS, measure_costs
from studies.report import write_report, write_sheet
from vae import encode_clip
from weights import load_unet

# The options of train.py for each variant. With three times the rate attention's loss falls faster;
# those of directed and conv do not.
VARIANTS = {
    "none": {"temporal": "none"},
    "shift": {"temporal": "shift"},
    "shift-quarter": {"temporal": "shift", "shift_fold": 4},
    "shift-eighth": {"temporal": "shift", "shift_fold": 8},
    "shift-causal": {"temporal": "shift", "shift_causal": True},
    "shift-conv1": {"temporal": "shift", "shift_before": "conv1"},
    "shift-conv2": {"temporal": "shift", "shift_before": "conv2"},
    "attention": {"temporal": "attention", "new_layers_rate": 3.0},
    "joint": {"temporal": "joint", "new_layers_rate": 3.0},
    "directed": {"temporal": "directed"},
    "conv": {"temporal": "conv"},
    "conv-as-shift": {"temporal": "conv", "start_as_shift": True},
}
ROW = {"colour": 0, "shape": 0, "direction": 0, "all": 0}
# What the files of a comparison hold: 0 is a number, 1 one > 0, None one or null, "*" any key.
COSTS_FORM = {"*": dict.fromkeys(("gib", "gflops", "parameters", "new"), 0)
              | dict.fromkeys(KINDS, [1])}
RESULT_FORM = {"curve": {"*": ROW}, "scores": {
    "clips, seen": ROW, "clips, held out": ROW, "images, all": {"all": 0}, "consistency": 0,
    "FVD-shapes": 0}}
REFERENCES_FORM = {"*": [None]}
PROMPT_SEED = 5000  # of the noise that clips are drawn from, the same for every variant and seed


@dataclass(frozen=True)
class Choices:
    """What a comparison does."""

    variants: str = option(",".join(VARIANTS), "which, with commas between")
    steps: int = option(3000, "training steps of each")
    seeds: int = option(3, "trainings of each; an interval needs three")
    checkpoints: int = option(10, "points of a curve")
    curve_prompts: int = option(96, "clips drawn for a point")
    num_prompts: int = option(512, "clips drawn at the end")
    batch_size: int = option(32, "clips drawn at a time")
    repetitions: int = option(15, "turns in which times are taken")
    jobs: int = option(1, "trainings at a time, each in a process with its share of the cores")
    device: str = option("auto", "cpu, cuda, cuda:1, ...")

    def __post_init__(self):
        unknown = [name for name in self.names if name not in VARIANTS]
        if unknown:
            raise ValueError(f"--variants needs some of {', '.join(VARIANTS)}; got {unknown[0]!r}")
        check_ranges(self, steps=(1, 10**9), seeds=(1, 1000), checkpoints=(1, 10**6),
                     batch_size=(1, 10**6), repetitions=(1, 10**4), jobs=(1, 256),
                     curve_prompts=(2, 10**6), num_prompts=(2, 10**6))
        if self.num_prompts <= NUM_FEATURES:
            raise ValueError(f"--num-prompts needs >= {NUM_FEATURES + 1}, more than there are "
                             "features for FVD-shapes")

    @property
    def names(self):
        return list(dict.fromkeys(self.variants.split(",")))


FULL = Choices()
QUICK = Choices(
    variants="none,shift,attention,directed,conv", steps=600, checkpoints=4, curve_prompts=24,
    num_prompts=64, batch_size=16, repetitions=5, jobs=2,
)


class Comparison:
    """What all trainings share: the run's image model, its clips as latents, and the judges."""

    def __init__(self, run, output, choices):
        self.path, self.output, self.choices = run, output, choices
        self.options, finished = read_record(run)
        if "image" not in finished or self.options.data != "shapes":
            raise ValueError(f"{run}: needs a finished image stage on --data shapes; train one "
                             "with `python train.py NEW_RUN`")
        self.device = choose_device(choices.device)
        self.model = load_image_model(run, self.device, self.options.precision)
        self.model.unet.to(self.device)  # in float32, since trainings start from it
        sampling = self.options.sampling(self.options.num_frames)
        self.model = dataclasses.replace(self.model, sampling=sampling)
        self.prompts = choose_prompts(choices.num_prompts)

    def prepare(self):
        """Make what only training and scoring need: latents, the feature net, real clips."""
        size = self.options.num_frames, self.options.image_size
        clips = open_data(self.options)
        self.captions = clips.captions
        self.latents = [encode_clip(self.model.vae, frames).cpu() for frames, _ in clips]
        self.net = load_feature_net(self.output / "feature_net.safetensors", *size, self.device,
                                    lambda steps: tqdm(steps, "feature net", leave=False))
        self.real, others = (real_clips(len(self.prompts), *size, PROMPT_SEED + i, self.prompts)
                             for i in range(2))
        self.others = features_of(self.net, others)

    def quality(self, clips):
        """How steady clips of the prompts are, and how far from real clips of the same."""
        return {
            "consistency": float(mean_over_clips(consistency, clips[:, None])),
            f"FVD-{self.net.name}": frechet_distance(features_of(self.net, clips), self.others),
        }

    def draw(self, unet, prompts, num_frames):
        """The clips that a U-Net draws of combinations, from noise that is always the same."""
        model = dataclasses.replace(self.model, unet=unet)
        with precision(self.device, self.options.precision):
            return draw(model, prompts, num_frames, PROMPT_SEED, self.choices.batch_size)

    def score(self, unet):
        """Agreement and quality of a U-Net's clips and images of the prompts."""
        clips = self.draw(unet, self.prompts, self.options.num_frames)
        drawn = {"clips": clips, "images": self.draw(unet, self.prompts, 1)}
        return evaluate_agreement(drawn, {}, self.prompts) | self.quality(clips)

    def references(self):
        """{name: (images right, consistency, distance)}: the values to compare with."""
        drawn = {"images": self.draw(self.model.unet, self.prompts, 1)}
        rates = evaluate_agreement(drawn, {}, self.prompts)
        return {
            "the image model": (rates["images, all"]["all"], None, None),
            "real clips": (None, *self.quality(self.real).values()),
        }

    def options_of(self, name, seed=0):
        """TrainOptions of a variant's training on clips, from those of the run."""
        every = max(1, self.choices.steps // self.choices.checkpoints)
        return dataclasses.replace(
            self.options, **{"start_as_shift": False} | VARIANTS[name],
            seed=self.options.seed + seed, preview_every=every, video_steps=self.choices.steps,
            save_every=every, device=self.choices.device,
        )

    def train(self, name, seed):
        """Train a variant on clips, from where an earlier call was stopped, and score it."""
        folder, options = self.output / f"{name}-{seed}", self.options_of(name, seed)
        prompts, curve = choose_prompts(self.choices.curve_prompts), folder / "curve.json"

        def look(step, unet):
            clips = self.draw(unet, prompts, options.num_frames)
            point = evaluate_agreement({"clips": clips}, {}, prompts)["clips, all"]
            write_json(curve, (read_json(curve) if curve.exists() else {}) | {str(step): point})

        torch.manual_seed(options.seed)
        if (folder / "train.json").exists() and "video" in read_record(folder)[1]:
            unet = load_unet(folder / "unet").to(self.device)  # stopped before it was scored
        else:
            run = Run(folder, options, ["vae", "image"],
                      resume=(folder / "train.json").exists())
            unet = train.train_video(run, self.model, self.latents, self.captions, look)
        look(self.choices.steps, unet)
        result = {"scores": self.score(unet), "curve": read_json(curve)}
        write_json(folder / "result.json", result)
        print(f"trained: {name}, seed {seed}", flush=True)


def fits(value, form):
    """Whether a JSON value has a form: at least its keys, and finite numbers, > 0 for a 1."""
    if isinstance(form, dict):
        if not isinstance(value, dict):
            return False
        form = dict.fromkeys(value, form["*"]) if "*" in form else form
        return all(fits(value.get(key), part) for key, part in form.items())
    if isinstance(form, list):
        return isinstance(value, list) and len(value) > 0 and all(fits(x, form[0]) for x in value)
    known = type(value) in (int, float) and math.isfinite(value)
    return known and (form != 1 or value > 0) or form is value is None


def read_form(path, form):
    """The JSON object in a file of a comparison. Raises ValueError unless it has the form."""
    value = read_json(path)
    if not fits(value, form):
        raise ValueError(f"{path}: damaged, or of another version; remove it, and what it held is "
                         "measured again")
    return value


def check_settings(path, now):
    """Keep what makes results comparable. Raises ValueError if a folder has other settings."""
    before = read_json(path) if path.exists() else now
    for key in now:
        if before.get(key) != now[key]:
            raise ValueError(f"{path.parent}: was made with {key} {before.get(key)}, not "
                             f"{now[key]}; choose another --output")
    write_json(path, now)


def train_some(run, output, choices, jobs, threads):
    """What a process does that trains a share of the jobs, (name, seed) each."""
    torch.set_num_threads(threads)
    torch.set_flush_denormal(True)
    comparison = Comparison(run, output, choices)
    comparison.prepare()
    for job in jobs:
        comparison.train(*job)


def train_all(comparison, jobs):
    """Train (name, seed) jobs, in several processes if so chosen.

    Small networks leave cores idle: two trainings with a core each are faster than one with two.
    """
    count = min(comparison.choices.jobs, len(jobs))
    if count < 2:
        for job in jobs:
            comparison.train(*job)
        return
    os.environ["TQDM_DISABLE"] = "1"  # bars of processes would write over each other
    common = comparison.path, comparison.output, comparison.choices
    threads = max(1, torch.get_num_threads() // count)
    spawn = multiprocessing.get_context("spawn")
    shares = [partial(train_some, *common, jobs[i::count], threads) for i in range(count)]
    processes = [spawn.Process(target=run_main, args=(share,)) for share in shares]
    for process in processes:
        process.start()
    for process in processes:  # Ctrl-C reaches them, too: each saves its state and ends
        process.join()
    if any(process.exitcode for process in processes):
        raise ValueError(f"{comparison.output}: a training has failed, see above; call again to "
                         "continue")


def compare(run, output, choices):
    """Do what is not done yet, write the report and return its text."""
    comparison = Comparison(run, output, choices)
    check_settings(output / "settings.json", {
        "run": str(run.resolve()), "steps": choices.steps, "checkpoints": choices.checkpoints,
        "curve_prompts": choices.curve_prompts, "num_prompts": choices.num_prompts, **VARIANTS,
        "image_model": digest_of(comparison.model.unet),
        "sampling": dataclasses.asdict(comparison.model.sampling),
    })
    costs_path, references_path = output / "costs.json", output / "references.json"
    costs = read_form(costs_path, COSTS_FORM) if costs_path.exists() else {}
    if not all(name in costs for name in choices.names):  # first, while this process is small
        settings = {name: comparison.options_of(name) for name in choices.names}
        texts = [caption_of(*prompt) for prompt in comparison.prompts[: choices.batch_size]]
        costs = measure_costs(comparison.model, settings, texts, choices.repetitions)
        write_json(costs_path, costs)
    results = {(name, seed): output / f"{name}-{seed}" / "result.json"
               for seed in range(choices.seeds) for name in choices.names}
    jobs = [job for job, path in results.items() if not path.exists()]
    if jobs or not references_path.exists():
        comparison.prepare()
    if not references_path.exists():
        write_json(references_path, comparison.references())
    train_all(comparison, jobs)
    shown, drawn = [HELD_OUT[0], SEEN[20], HELD_OUT[9]], {}
    for name in choices.names:
        unet = load_unet(output / f"{name}-0" / "unet").to(comparison.device)
        drawn[name] = comparison.draw(unet, shown, comparison.options.num_frames)
    write_sheet(output / "sheet.png", [caption_of(*prompt) for prompt in shown], drawn)
    title = (f"{choices.steps} steps on clips for each, from the image model of {run}; "
             f"{choices.num_prompts} prompts; seeds: {choices.seeds}. "
             f"PyTorch {torch.__version__}, {device_name(comparison.device)}.")
    scores = {name: [read_form(results[name, seed], RESULT_FORM) for seed in range(choices.seeds)]
              for name in choices.names}
    references = read_form(references_path, REFERENCES_FORM)
    return write_report(output, title, costs, scores, references)


def main():
    parser = argparse.ArgumentParser(
        description="Train all temporal variants equally, and compare.", allow_abbrev=False,
        epilog="Defaults are those of the full form.",
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="run with a finished image stage")
    parser.add_argument("--quick", action="store_true", help="fewer steps: 15 minutes on two cores")
    parser.add_argument("--output", type=Path, help="folder (default: RUN/compare)")
    add_flags(parser, FULL)
    args = parser.parse_args()
    choices = dataclasses.replace(QUICK if args.quick else FULL, **given_flags(args, FULL))
    torch.set_flush_denormal(True)
    print(compare(args.run, args.output or args.run / "compare", choices))


if __name__ == "__main__":
    run_main(main)
