"""Every choice of a training run, in one dataclass whose fields are the flags of train.py.

A recipe per preset says how a model of that size is trained; a flag overrides a field of it. The
tiny recipe's additions to Latent-Shift and Stable Diffusion are measured in docs/measurements.md.
A run's record keeps its options, so that a resume needs no flags.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import model
import vae
from diffusion import schedule_for
from pipeline import Sampling
from support.cli import option
from support.devices import DTYPES, PRECISION
from support.files import from_json, read_json
from temporal import VARIANTS

STAGES = ("vae", "image", "video")
FREE = {"free": True}  # a resumed run may change it, because it only concerns the machine
# The first stage that uses an option, besides each stage's steps, batch size and learning rate
STAGE_OF = {"kl_weight": "vae", "motion_weight": "vae", "max_tokens": "image", **dict.fromkeys(
    ("temporal", "shifts", "new_layers_rate", "image_every", "early_noise"), "video")}


@dataclass(frozen=True)
class LoopOptions:
    """The options of every training (trainer.py), in papers/ as well.

    Each subclass names the file that records the options in a run's folder, and the run's stages.
    """

    record: ClassVar[str]
    stages: ClassVar[tuple[str, ...]]

    seed: int = option(0, "seed of weights, data and noise", high=2**62)
    warmup_steps: int = option(30, "steps over which the learning rate rises")
    ema_decay: float = option(0.99, "decay of the average of the weights; 0: no average", high=1)
    accumulate: int = option(1, "batches whose gradients make one step", low=1)
    device: str = option("auto", "cpu, cuda, cuda:1, ...", **FREE)
    offload: bool = option(False, "keep AdamW's moments in CPU memory", **FREE)
    precision: str = option("auto", PRECISION, choices=("auto", *DTYPES), **FREE)
    compile: bool = option(False, "torch.compile the networks", **FREE)
    workers: int = option(0, "processes that read clips ahead; 0: none", high=256, **FREE)
    save_every: int = option(250, "save the training state every N steps", low=1, **FREE)

    @classmethod
    def recipe(cls, given):
        """The recipe for a new run with the given flags, before the flags override it."""
        return cls()

    def unused(self):
        """{option that has no effect: why}, given the other options."""
        return {}


@dataclass(frozen=True)
class TrainOptions(LoopOptions):
    """The options of train.py. Steps are optimizer steps, rates peak learning rates."""

    record: ClassVar[str] = "train.json"
    stages: ClassVar[tuple[str, ...]] = STAGES

    preset: str = option("tiny", "size of a new model, and defaults of all other options",
                         choices=("tiny", "small", "sd1", "sd2"))
    init: str | None = option(None, "start from a trained image model: a single file of Stable "
                              "Diffusion, a diffusers folder or another run")
    merges: str | None = option(None, "the tokenizer's merges file, if --init PATH has none")
    data: str = option("shapes", "`shapes` for MovingShapes, or a folder of captioned clips",
                       **FREE)  # Run.start() refuses other clips
    num_frames: int = option(8, "frames of a training clip", low=1)
    image_size: int = option(32, "height and width of a frame, in pixels", low=16, high=16384)
    num_clips: int = option(1536, "clips of MovingShapes", low=1, high=10**6)
    stride: int = option(1, "keep every N-th frame of a folder's clips", low=1)
    frame_rate: float | None = option(None, "resample a folder's clips to N frames per second, "
                                      "before the stride", low=0.01, high=1000)
    max_frames: int = option(512, "most frames to keep of a folder's clip; with N = --num-frames, "
                             "windows start with the clip, for captions that tell an order", low=1)
    # stages
    vae_steps: int = option(1000, "steps of the vae stage", low=1)
    vae_batch_size: int = option(32, "frames per step", low=1)
    vae_learning_rate: float = option(3e-3, "learning rate of the vae stage")
    kl_weight: float = option(2e-2, "weight of the KL term, which pulls latents towards N(0, 1)")
    motion_weight: float = option(5.0, "extra weight of pixels unlike their frame's median")
    image_steps: int = option(325, "steps of the image stage", low=1)
    image_batch_size: int = option(64, "images per step", low=1)
    image_learning_rate: float = option(2e-3, "learning rate of the image stage")
    video_steps: int = option(1350, "steps of the video stage", low=1)
    video_batch_size: int = option(8, "clips per step", low=1)
    video_learning_rate: float = option(1e-3, "learning rate of the video stage")
    image_every: int = option(20, "train on images every N video steps; 0: never")
    # the temporal variant
    temporal: str = option("shift", "how frames see each other (temporal.py)", choices=VARIANTS)
    shifts: int = option(2, "temporal shifts per ResnetBlock; the paper has 1", low=1, high=2)
    new_layers_rate: float = option(1.0, "learning-rate multiplier of temporal layers")
    # diffusion
    prediction_type: str | None = option("v_prediction", "the U-Net's target",
                                         choices=("epsilon", "v_prediction"))
    zero_terminal_snr: bool | None = option(True, "let the last timestep be pure noise")
    snr_divisor: float | None = option(4.0, "divide signal-to-noise ratios: small latents need "
                                       "more noise", low=1e-3)
    early_noise: float = option(3.0, "preference for noisy timesteps in the first half of the "
                                "video stage; 0: uniform")
    max_tokens: int | None = option(None, "tokens of a caption, with start and end; by default as "
                                    "many as the longest has, 16 to 77", low=3, high=65536)

    def __post_init__(self):
        if self.init is None:  # otherwise shapes and schedule are the adopted model's
            self.diffusion()
            check_image_size(self.image_size, self.vae(), self.unet())

    @classmethod
    def recipe(cls, given):
        init = given.get("init")
        is_run = init is not None and (Path(init) / cls.record).exists() and "preset" not in given
        if "data" not in given and not is_run:
            raise ValueError("a new run needs --data shapes (MovingShapes, drawn by shapes.py) or "
                             "--data FOLDER (a folder of captioned clips)")
        if init is None:
            return RECIPES[given.get("preset", "tiny")]
        # A run is trained further, without --preset; other models count as Stable Diffusion 1.
        own = read_record(init)[0] if is_run else RECIPES[given.get("preset", "sd1")]
        # With None, the adopted model's own schedule is kept.
        return dataclasses.replace(own, init=init, merges=None, prediction_type=None,
                                   zero_terminal_snr=None, snr_divisor=None)

    def unused(self):
        folder, adopted = self.data != "shapes", self.init is not None
        early = [name for name in vars(self) if stage_of(name) in ("vae", "image")]
        return {name: why for true, why, names in (
            (folder, "all clips of a folder are used", ["num_clips"]),
            (not folder, "shapes are drawn", ["stride", "frame_rate", "max_frames"]),
            (self.temporal != "shift", "only --temporal shift has shifts", ["shifts"]),
            (self.temporal in ("none", "shift"), "it needs other --temporal", ["new_layers_rate"]),
            (not adopted, "the tokenizer is trained", ["merges"]),
            (adopted, "--init brings an image model", early),
        ) if true for name in names}

    def vae(self):
        """The autoencoder's configuration, before the scale of its latents is known."""
        preset = "sd" if self.preset in ("sd1", "sd2") else self.preset
        return dataclasses.replace(vae.PRESETS[preset], sample_size=self.image_size,
                                   scaling_factor=1.0)

    def unet(self):
        """The U-Net's configuration."""
        size = self.image_size // self.vae().downscale
        return dataclasses.replace(model.PRESETS[self.preset], sample_size=size,
                                   **self.temporal_fields())

    @property
    def latent_frames(self):
        """Latent frames of a training clip."""
        return self.num_frames

    def temporal_fields(self):
        """The fields of UNetConfig that choose the temporal variant."""
        return {"temporal": self.temporal, "shifts": self.shifts,
                "max_frames": self.latent_frames}

    def diffusion(self, own=None):
        """The noise schedule of the run, or an adopted model's `own` with the options' changes."""
        kind, zero, divisor = self.prediction_type, self.zero_terminal_snr, self.snr_divisor
        if own is None:
            return schedule_for(kind, zero, divisor)
        if zero is divisor is None:
            return dataclasses.replace(own, prediction_type=kind or own.prediction_type)
        if own.trained_betas is not None:
            raise ValueError(f"--init {self.init}: has a noise schedule of its own, which is kept; "
                             "leave out --zero-terminal-snr and --snr-divisor")
        zero = own.rescale_betas_zero_snr if zero is None else zero
        return schedule_for(kind or own.prediction_type, zero, divisor or 1.0, own)

    def sampling(self, num_frames):
        """The defaults of sample.py for the run."""
        return dataclasses.replace(SAMPLING[self.preset], num_frames=num_frames,
                                   image_size=self.image_size)


def check_image_size(image_size, vae_config, unet_config):
    """Raise ValueError unless the U-Net's levels can halve the latents of such frames."""
    factor = vae_config.downscale * unet_config.downscale
    if image_size % factor:
        raise ValueError(f"--image-size needs a multiple of {factor}, got {image_size}")


def stage_of(name):
    """The first stage that uses an option: image_steps has one, image_size has none."""
    stage, _, what = name.partition("_")
    return stage if what in ("steps", "batch_size", "learning_rate") else STAGE_OF.get(name)


def read_record(path, kind=TrainOptions):
    """(options, finished stages) of a run whose options are of class `kind`."""
    where = Path(path) / kind.record
    record = read_json(where)
    if not {"options", "finished"} <= record.keys():
        raise ValueError(f"{where}: is not a record of a run; it lacks options or finished stages")
    return from_json(kind, record["options"], where), record["finished"]


def merge_options(path, given, kind=TrainOptions):
    """(options, finished stages) of a run: its own if it exists, with the flags given.

    Raises ValueError if a flag contradicts the options that the run was trained with, or if the run
    would not use it.
    """
    stored, finished = None, []
    if (path / kind.record).exists():
        stored, finished = read_record(path, kind)
    elif path.exists() and {file.name for file in path.iterdir()} - {".lock", "cache"}:
        raise ValueError(f"{path}: is not empty and not a run of this command; choose a new folder")
    begun = kind.stages[: len(finished) + (path / "training_state.pt").exists()]
    if stored is None or (not begun and {"init", "preset"} & given.keys()):
        stored = kind.recipe(given)
    for field in dataclasses.fields(stored) if begun else ():
        name, old = field.name, getattr(stored, field.name)
        later = stage_of(name) in kind.stages and stage_of(name) not in begun
        if given.get(name, old) != old and not (later or field.metadata.get("free")):
            further = kind is TrainOptions and name == "video_steps" and "video" in finished
            raise ValueError(f"{path} was trained with --{name.replace('_', '-')} {old}, not "
                             f"{given[name]}; choose a new folder for other options"
                             + further * f" (--init {path} trains it further)")
    options = dataclasses.replace(stored, **given)
    for name, why in options.unused().items():
        if name in given:
            raise ValueError(f"--{name.replace('_', '-')} has no effect, because {why}; leave it "
                             "out")
    return options, finished


def stages_to_run(path, stage, finished):
    """The stages that this call trains. Raises ValueError if the one asked for is impossible."""
    missing = [name for name in STAGES if name not in finished]
    if stage is None:
        return missing
    if stage in finished:
        raise ValueError(f"the {stage} stage of {path} is finished, or --init brings its result; "
                         "choose a new folder to train it again")
    if missing[0] != stage:
        raise ValueError(f"--stage {stage} needs the {missing[0]} stage of {path}, which is not "
                         "finished; leave out --stage to train all that is missing")
    return [stage]


# How samples are drawn. The tiny and small models guide only at high noise, where the text decides,
# and spend more of their few steps there.
SAMPLING = {
    "tiny": Sampling(num_steps=8, guidance_scale=3.5, guidance_max_snr=0.2, timestep_power=0.6),
    "small": Sampling(num_steps=25, guidance_scale=4.0, guidance_max_snr=0.2, timestep_power=0.6),
    "sd1": Sampling(num_steps=50, guidance_scale=7.5),
    "sd2": Sampling(num_steps=50, guidance_scale=7.5),
}
RECIPES = {
    "tiny": TrainOptions(),
    "small": TrainOptions(
        preset="small", shifts=1, num_frames=16, image_size=64, num_clips=20000,
        vae_steps=10000, vae_batch_size=64, vae_learning_rate=3e-4,
        image_steps=10000, image_batch_size=128, image_learning_rate=3e-4,
        video_steps=40000, video_batch_size=16, video_learning_rate=2e-4, image_every=8,
        warmup_steps=500, ema_decay=0.999, save_every=2000, workers=4,
    ),
    "sd1": TrainOptions(
        preset="sd1", shifts=1, num_frames=16, image_size=256, num_clips=20000, max_tokens=77,
        vae_steps=100000, vae_batch_size=16, vae_learning_rate=1e-4,
        kl_weight=1e-6, motion_weight=0.0,
        image_steps=100000, image_batch_size=32, image_learning_rate=1e-4,
        video_steps=100000, video_batch_size=1, video_learning_rate=1e-5, image_every=8,
        prediction_type="epsilon", zero_terminal_snr=False, snr_divisor=1.0, early_noise=0.0,
        warmup_steps=1000, ema_decay=0.9999, save_every=5000, workers=4,
    ),
}
RECIPES["sd2"] = dataclasses.replace(RECIPES["sd1"], preset="sd2", prediction_type="v_prediction")
