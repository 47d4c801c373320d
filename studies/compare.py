"""Which way for frames to talk is best? One image model, every sibling, trained equally.

    python compare.py runs/demo --quick                       15 minutes on two cores
    python compare.py runs/demo                               all siblings, three seeds: for a GPU
    python compare.py runs/demo --siblings none,shift,shift-causal --steps 600 --output three

RUN has finished its image stage on MovingShapes. Each sibling starts as that image model and learns
clips for the same number of steps on the same batches: the clips, noise, timesteps and captions of
step k follow from the seed and k. Then all draw the same prompts from the same noise.

report.py says what comes out: tables of costs and of agreement with the text, curves and a sheet of
clips. What is finished is not done again, so a comparison that was stopped goes on when it is
called again, and one with more seeds or siblings takes over what there is.
"""

import argparse
import dataclasses
import multiprocessing
import os
import platform
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

import train
from cli import add_flags, choose_device, given_flags, option, run_main
from studies.costs import build, measure_costs
from evaluate import choose_prompts, draw, evaluate_agreement, mean_over_clips
from files import read_json, write_json
from losses import DenoisingLoss
from metrics import (
    NUM_FEATURES,
    consistency,
    features_of,
    frechet_distance,
    load_feature_net,
    real_clips,
)
from pipeline import Pipeline
from options import read_record
from studies.report import write_report, write_sheet
from shapes import HELD_OUT, SEEN, caption_of
from vae import encode_clip
from weights import load_schedule, load_text, load_unet, load_vae, save_unet

# What each sibling is given: options of train.py. With three times the rate attention's loss falls
# faster; those of the last two do not.
SIBLINGS = {
    "none": {"temporal": "none"},
    "shift": {"temporal": "shift"},
    "shift-quarter": {"temporal": "shift", "shift_fold": 4},
    "shift-eighth": {"temporal": "shift", "shift_fold": 8},
    "shift-causal": {"temporal": "shift", "shift_causal": True},
    "attention": {"temporal": "attention", "new_layers_rate": 3.0},
    "directed": {"temporal": "directed"},
    "conv": {"temporal": "conv"},
    "conv-as-shift": {"temporal": "conv", "start_as_shift": True},
}
GROUND = None  # of a process that trains
PROMPT_SEED = 5000  # of the noise that clips are drawn from, the same for every sibling and seed


@dataclass(frozen=True)
class Choices:
    """What a comparison does."""

    siblings: str = option(",".join(SIBLINGS), "which, with commas between")
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
        unknown = [name for name in self.names if name not in SIBLINGS]
        if unknown:
            raise ValueError(f"--siblings needs some of {', '.join(SIBLINGS)}; got {unknown[0]!r}")
        for name in ("steps", "seeds", "checkpoints", "batch_size", "repetitions", "jobs"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"--{name.replace('_', '-')} needs >= 1, got {getattr(self, name)}"
                )
        if self.num_prompts <= NUM_FEATURES or self.curve_prompts < 2:
            raise ValueError(f"--num-prompts needs >= {NUM_FEATURES + 1}, more than there are "
                             "features for FVD-shapes, and --curve-prompts >= 2")

    @property
    def names(self):
        return list(dict.fromkeys(self.siblings.split(",")))


FULL = Choices()
QUICK = Choices(
    siblings="none,shift,attention,directed,conv", steps=600, checkpoints=4, curve_prompts=24,
    num_prompts=64, batch_size=16, repetitions=5, jobs=2,
)


class Ground:
    """What all siblings stand on: the run's frozen parts, its clips as latents, and the judges."""

    def __init__(self, run, choices):
        self.path, self.choices, self.device = run, choices, choose_device(choices.device)
        self.options, finished = read_record(run)
        if "image" not in finished or self.options.data != "shapes":
            raise ValueError(f"{run}: needs a finished image stage on --data shapes; train one "
                             "with `python train.py NEW_RUN`")
        options, (encoder, tokenizer) = self.options, load_text(run)
        parts = load_unet(run / "image_unet", "none"), load_vae(run / "vae"), encoder, tokenizer
        sampling, (diffusion, _) = options.sampling(options.num_frames), load_schedule(run)
        self.pipeline = Pipeline(*parts, diffusion, sampling).to(self.device)
        self.prompts = choose_prompts(choices.num_prompts)

    def prepare(self, net_path):
        """Make what only training and scoring need: latents, texts, the feature net."""
        options, size = self.options, (self.options.num_frames, self.options.image_size)
        clips, self.captions = train.open_data(options)
        bar = tqdm(clips, "encode", unit="clip", leave=False)
        self.latents = [encode_clip(self.pipeline.vae, c.to(self.device)).cpu() for c in bar]
        unique = ["", *dict.fromkeys(self.captions)]
        self.texts = dict(zip(unique, self.pipeline.encode_text(unique).cpu(), strict=True))
        self.net = load_feature_net(
            net_path, *size, self.device, lambda steps: tqdm(steps, "feature net", leave=False)
        )
        self.real, others = (
            real_clips(len(self.prompts), *size, PROMPT_SEED + i, self.prompts) for i in range(2)
        )
        self.others = features_of(self.net, others)

    def quality(self, clips):
        """How steady clips of the prompts are, and how far from real clips of the same."""
        return {
            "consistency": float(mean_over_clips(consistency, clips[:, None])),
            f"FVD-{self.net.name}": frechet_distance(features_of(self.net, clips), self.others),
        }

    def draw(self, unet, prompts, num_frames):
        """The clips that a U-Net draws of combinations, from noise that is always the same."""
        pipeline = dataclasses.replace(self.pipeline, unet=unet)
        return draw(pipeline, prompts, num_frames, PROMPT_SEED, self.choices.batch_size)

    def score(self, unet):
        """All that is told of a U-Net's clips and pictures of the prompts."""
        clips = self.draw(unet, self.prompts, self.options.num_frames)
        drawn = {"clips": clips, "pictures": self.draw(unet, self.prompts, 1)}
        return evaluate_agreement(drawn, {}, self.prompts) | self.quality(clips)

    def references(self):
        """{name: (pictures right, consistency, distance)}: what to hold the numbers to."""
        pictures = self.draw(self.pipeline.unet, self.prompts, 1)
        rates = evaluate_agreement({"pictures": pictures}, {}, self.prompts)
        return {
            "the image model": (rates["pictures, all"]["all"], None, None),
            "real clips": (None, *self.quality(self.real).values()),
        }


def options_of(base, name, choices, seed=0):
    """TrainOptions of a sibling's training on clips, from those of the run."""
    every = max(1, choices.steps // choices.checkpoints)
    return dataclasses.replace(
        base, **SIBLINGS[name], seed=base.seed + seed, video_steps=choices.steps,
        preview_every=every, save_every=every, device=choices.device,
    )


def fine_tune(ground, name, seed, folder):
    """Train a sibling on clips, from where an earlier call was stopped, and score it."""
    choices = ground.choices
    options = options_of(ground.options, name, choices, seed)
    run = train.Run(folder, options, ["vae", "image"], resume=True)
    torch.manual_seed(options.seed)
    unet = build(ground.path, options, ground.device)
    diffusion, data = ground.pipeline.diffusion, (ground.latents, ground.captions, ground.texts)
    batches = train.denoising_batches(run, "video", *data, diffusion.num_train_timesteps)
    loss = DenoisingLoss(unet, diffusion, new_layers_rate=options.new_layers_rate)
    prompts, path = choose_prompts(choices.curve_prompts), folder / "curve.json"

    def look(step):
        clips = ground.draw(unet, prompts, options.num_frames)
        point = {str(step): evaluate_agreement({"clips": clips}, {}, prompts)["clips, all"]}
        write_json(path, (read_json(path) if path.exists() else {}) | point)

    run.fit("video", loss, batches, look)
    look(choices.steps)
    save_unet(folder / "unet", unet)
    write_json(folder / "result.json", {"scores": ground.score(unet), "curve": read_json(path)})
    run.finish("video")


def remember(path, now):
    """Keep what makes results comparable. Raises ValueError if those of a folder are others."""
    before = read_json(path) if path.exists() else now
    different = [f"{key} {before.get(key)}, not {now[key]}" for key in now
                 if before.get(key) != now[key]]
    if different:
        raise ValueError(f"{path.parent}: was made with {'; '.join(different)}; choose another "
                         "--output")
    write_json(path, now)


def work_on(ground, places):
    """Train (sibling, seed, folder)s, in processes side by side if so chosen; yields what is done.

    Small networks leave cores idle: two trainings with a core each are faster than one with two.
    """
    jobs = min(ground.choices.jobs, len(places))
    if jobs < 2:
        for place in places:
            fine_tune(ground, *place)
            yield place[:2]
        return
    os.environ["TQDM_DISABLE"] = "1"  # bars of processes would write over each other
    threads = max(1, torch.get_num_threads() // jobs)
    start = prepare_worker, (ground.path, places[0][2].parent, ground.choices, threads)
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, spawn, *start) as pool:
        futures = [pool.submit(fine_tune_here, *place) for place in places]
        try:
            for future in as_completed(futures):
                yield future.result()
        finally:  # after Ctrl-C or an error, start no more of them
            pool.shutdown(cancel_futures=True)


def prepare_worker(run, output, choices, threads):
    """The start of a process that trains."""
    global GROUND
    torch.set_num_threads(threads)
    torch.set_flush_denormal(True)
    GROUND = Ground(run, choices)
    GROUND.prepare(output / "feature_net.safetensors")


def fine_tune_here(name, seed, folder):
    fine_tune(GROUND, name, seed, folder)
    return name, seed


def train_all(ground, output):
    """Train and score what is not done yet. Returns ({sibling: [result, ...]}, references)."""
    choices = ground.choices
    places = [(n, seed, output / f"{n}-{seed}") for seed in range(choices.seeds)
              for n in choices.names]
    todo = [place for place in places if not (place[2] / "result.json").exists()]
    references_path = output / "references.json"
    if todo or not references_path.exists():
        ground.prepare(output / "feature_net.safetensors")
    if not references_path.exists():
        write_json(references_path, ground.references())
    for i, (name, seed) in enumerate(work_on(ground, todo), start=1):
        print(f"{i} of {len(todo)} is trained: {name}, seed {seed}", flush=True)
    results = {name: [] for name in choices.names}
    for name, _, folder in places:
        results[name].append(read_json(folder / "result.json"))
    return results, read_json(references_path)


def compare(run, output, choices):
    """Do what is not done yet, write the report and return its text."""
    ground = Ground(run, choices)
    remember(output / "settings.json", {
        "run": str(run.resolve()), "steps": choices.steps, "checkpoints": choices.checkpoints,
        "curve_prompts": choices.curve_prompts, "num_prompts": choices.num_prompts,
        **SIBLINGS,
    })
    costs_path = output / "costs.json"
    costs = read_json(costs_path) if costs_path.exists() else {}
    if not all(name in costs for name in choices.names):  # first, while this process is small
        settings = {name: options_of(ground.options, name, choices) for name in choices.names}
        texts = [caption_of(*prompt) for prompt in ground.prompts[: choices.batch_size]]
        costs = measure_costs(run, settings, ground.pipeline, texts, choices.repetitions)
        write_json(costs_path, costs)
    results, references = train_all(ground, output)
    shown = [HELD_OUT[0], SEEN[20], HELD_OUT[9]]
    drawn = {}
    for name in choices.names:
        unet = load_unet(output / f"{name}-0" / "unet").to(ground.device)
        drawn[name] = ground.draw(unet, shown, ground.options.num_frames)
    write_sheet(output / "sheet.png", [caption_of(*prompt) for prompt in shown], drawn)
    title = (
        f"{choices.steps} steps on clips for each, from the image model of {run}; "
        f"{choices.num_prompts} prompts; seeds: {choices.seeds}. "
        f"PyTorch {torch.__version__}, {device_name(ground.device)}."
    )
    return write_report(output, title, costs, results, references)


def device_name(device):
    """The machine that the numbers are of."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"


def main():
    parser = argparse.ArgumentParser(
        description="Train every way for frames to talk equally, and compare.", allow_abbrev=False,
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
