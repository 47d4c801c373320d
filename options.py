"""Every choice of a training run, in one dataclass: its fields are the flags of train.py.

A recipe per preset says how a model of that size is trained; a flag overrides a field of it. Where
the tiny recipe goes beyond Latent-Shift and Stable Diffusion, the README says what it brings.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import torch

import model
import vae
from cli import option
from diffusion import Diffusion
from files import read_json
from pipeline import Sampling
from temporal import WAYS

STAGES = ("vae", "image", "video")
FREE = {"free": True}  # a resumed run may change it, since it does not touch the result


@dataclass(frozen=True)
class TrainOptions:
    """The options of a run. Steps are optimizer steps, rates peak learning rates."""

    preset: str = option("tiny", "size of the model and defaults of all other options",
                         choices=("tiny", "small", "sd1", "sd2"))
    seed: int = option(0, "seed of weights, data and noise")
    init: str | None = option(None, "start from a trained image model: a single file of Stable "
                              "Diffusion, a diffusers folder or another run")
    merges: str | None = option(None, "the tokenizer's merges file, where --init PATH has none")
    data: str = option("shapes", "`shapes` for MovingShapes, or a folder of captioned clips")
    num_frames: int = option(8, "frames of a training clip")
    image_size: int = option(32, "height and width of a frame, in pixels")
    num_clips: int = option(1536, "clips of MovingShapes")
    stride: int = option(1, "keep every stride-th frame of a folder's clips")
    frame_rate: float | None = option(None, "resample a folder's clips to this rate instead")
    max_frames: int = option(512, "frames kept of a folder's clip")
    # stages
    vae_steps: int = option(500, "steps of the vae stage")
    vae_batch_size: int = option(32, "frames a step")
    vae_learning_rate: float = option(3e-3, "learning rate of the vae stage")
    kl_weight: float = option(1e-3, "weight of the pull of latents towards N(0, 1)")
    motion_weight: float = option(5.0, "additional weight of pixels that differ from their frame")
    image_steps: int = option(650, "steps of the image stage")
    image_batch_size: int = option(64, "pictures a step")
    image_learning_rate: float = option(2e-3, "learning rate of the image stage")
    text_rate: float = option(0.01, "the text encoder's part of the image stage's learning rate")
    video_steps: int = option(1200, "steps of the video stage")
    video_batch_size: int = option(8, "clips a step")
    video_learning_rate: float = option(2e-3, "learning rate of the video stage")
    image_every: int = option(20, "every so many steps of the video stage see pictures; 0: none do")
    # the model's way through time
    temporal: str = option("shift", "how frames talk", choices=WAYS)
    shift_before: str = option("both", "convolutions of a block that see shifted channels",
                               choices=("conv1", "conv2", "both"))
    shift_fold: int = option(3, "the shift moves one in so many channels, each way")
    shift_causal: bool = option(False, "shift only from the frame before")
    start_as_shift: bool = option(False, "--temporal conv begins as the shift, not as the identity")
    new_layers_rate: float = option(1.0, "temporal layers' part of the video stage's learning rate")
    # diffusion
    prediction_type: str | None = option("v_prediction", "what the U-Net predicts",
                                  choices=("epsilon", "v_prediction"))
    zero_terminal_snr: bool = option(True, "let the last timestep be pure noise")
    snr_divisor: float = option(
        4.0, "divide all signal-to-noise ratios: few latents need more noise"
    )
    shared_noise: float = option(0.0, "part of the noise's variance that a clip's frames share")
    early_noise: float = option(
        3.0, "how much the first half of the video steps prefers noise; 0: not"
    )
    caption_dropout: float = option(0.1, "part of the captions left out, for guidance")
    max_tokens: int = option(16, "tokens of a caption, with start and end")
    # optimisation
    warmup_steps: int = option(30, "steps in which the learning rate rises")
    weight_decay: float = option(0.01, "of AdamW")
    gradient_clip: float = option(1.0, "largest norm of the gradient")
    ema_decay: float = option(0.99, "decay of the average of the weights")
    accumulate: int = option(1, "batches whose gradients make one step")
    gradient_checkpointing: bool = option(False, "compute activations twice, store them once")
    # machine
    device: str = option("auto", "cpu, cuda, cuda:1, ... ", **FREE)
    precision: str = option("auto", "bf16 arithmetic or fp32; auto: bf16 on CUDA", **FREE,
                            choices=("auto", "bf16", "fp32"))
    compile: bool = option(False, "torch.compile the networks", **FREE)
    log_every: int = option(50, "steps between lines of metrics.jsonl", **FREE)
    save_every: int = option(250, "steps between saved states", **FREE)
    preview_every: int = option(500, "steps between previews", **FREE)
    # what sample.py does with the run unless told otherwise
    guidance_scale: float = option(2.5, "weight of the text in samples", **FREE)
    num_steps: int = option(12, "denoising steps of samples", **FREE)
    frames_per_second: float = option(8.0, "of the clips that are written", **FREE)

    def __post_init__(self):
        kinds = type(self).__annotations__
        others = {"seed": 0, "image_every": 0, "warmup_steps": 0, "max_tokens": 3}
        for name in [name for name, kind in kinds.items() if kind in (int, float)]:
            least = 0 if kinds[name] is float else others.get(name, 1)
            if not getattr(self, name) >= least:  # so put, NaN fails, too
                raise ValueError(f"--{name.replace('_', '-')} needs >= {least}, "
                                 f"got {getattr(self, name)}")
        for name in ("shared_noise", "caption_dropout", "ema_decay"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"--{name.replace('_', '-')} needs to lie in [0, 1], "
                                 f"got {getattr(self, name)}")
        if self.init is not None:  # shapes and schedule are those of that model
            return
        # What a later stage or sampling would refuse is refused now, and not hours later.
        factor = self.vae().downscale * 2 ** (len(self.unet().block_out_channels) - 1)
        if self.image_size % factor:
            raise ValueError(f"--image-size needs a multiple of {factor}, got {self.image_size}")
        self.diffusion().timestep_pairs(self.num_steps)
        self.sampling(self.num_frames)

    def uses_bf16(self, device):
        """Whether the networks compute in bfloat16 (their weights stay float32)."""
        return device.type == "cuda" and self.precision != "fp32"

    def vae(self):
        """The autoencoder's configuration, before the scale of its latents is known."""
        preset = "sd" if self.preset in ("sd1", "sd2") else self.preset
        return dataclasses.replace(
            vae.PRESETS[preset], sample_size=self.image_size, scaling_factor=1.0
        )

    def unet(self):
        """The U-Net's configuration."""
        size = self.image_size // self.vae().downscale
        way = self.way_through_time()
        return dataclasses.replace(model.PRESETS[self.preset], sample_size=size, **way)

    def way_through_time(self):
        """The fields of UNetConfig that say how frames talk."""
        return {
            "temporal": self.temporal, "shift_before": self.shift_before,
            "shift_fold": self.shift_fold, "shift_causal": self.shift_causal,
            "max_frames": self.num_frames,
        }

    def sampling(self, num_frames):
        """What sample.py does with the run unless told otherwise."""
        return Sampling(
            num_frames, self.image_size, self.frames_per_second, self.num_steps,
            self.guidance_scale, shared_noise=self.shared_noise,
        )

    def diffusion(self):
        """The noise schedule of the run."""
        plain = Diffusion(prediction_type=self.prediction_type)
        if not self.zero_terminal_snr and self.snr_divisor == 1:
            return plain
        zero = self.zero_terminal_snr
        base = Diffusion(prediction_type="v_prediction", rescale_betas_zero_snr=zero).alphas_cumprod
        # SNR = a / (1 - a), so SNR / k belongs to a / (a + k (1 - a)).
        alpha_bar = base / (base + self.snr_divisor * (1 - base))
        betas = 1 - alpha_bar / torch.cat([torch.ones(1), alpha_bar[:-1]])
        return Diffusion(
            prediction_type=self.prediction_type,
            timestep_spacing="trailing" if zero else "leading",
            trained_betas=tuple(betas.tolist()),
        )


RECIPES = {
    "tiny": TrainOptions(),
    "small": TrainOptions(
        preset="small", num_frames=16, image_size=64, num_clips=20000, max_tokens=32,
        vae_steps=10000, vae_batch_size=64, vae_learning_rate=3e-4,
        image_steps=10000, image_batch_size=128, image_learning_rate=3e-4,
        video_steps=40000, video_batch_size=16, video_learning_rate=2e-4, image_every=8,
        warmup_steps=500, ema_decay=0.999, save_every=2000, preview_every=2000,
        guidance_scale=4.0, num_steps=25,
    ),
    "sd1": TrainOptions(
        preset="sd1", num_frames=16, image_size=256, num_clips=20000, max_tokens=77,
        vae_steps=100000, vae_batch_size=16, vae_learning_rate=1e-4, kl_weight=1e-6,
        motion_weight=0.0,
        image_steps=100000, image_batch_size=32, image_learning_rate=1e-4,
        video_steps=100000, video_batch_size=1, video_learning_rate=1e-5, image_every=8,
        prediction_type="epsilon", zero_terminal_snr=False, snr_divisor=1.0,
        early_noise=0.0,
        warmup_steps=1000, ema_decay=0.9999, gradient_checkpointing=True,
        save_every=5000, preview_every=5000, guidance_scale=7.5, num_steps=50,
    ),
}
RECIPES["sd2"] = dataclasses.replace(
    RECIPES["sd1"], preset="sd2", prediction_type="v_prediction", image_size=256
)


def read_record(path):
    """(TrainOptions, finished stages) of a run, as its train.json tells them."""
    record_path = Path(path) / "train.json"
    record = read_json(record_path)
    try:
        options, finished = TrainOptions(**record["options"]), record["finished"]
        if finished != list(STAGES[: len(finished)]):
            raise ValueError(f"finished stages {finished}")
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{record_path}: damaged, or of another version ({error})") from None
    return options, finished


def merge_options(path, given):
    """(TrainOptions, finished stages) of a run: its own if it exists, with the flags given.

    Raises ValueError if a flag contradicts what the run has been trained with.
    """
    known = (Path(path) / "train.json").exists()
    if not known and Path(path).exists() and any(Path(path).iterdir()):
        raise ValueError(f"{path}: is not empty and no run; choose a new folder")
    stored, finished = read_record(path) if known else (None, [])
    begun = STAGES[: len(finished) + (Path(path) / "training_state.pt").exists()]
    if not known or (not begun and {"init", "preset"} & given.keys()):
        base = RECIPES[given.get("preset", "sd1" if "init" in given else "tiny")]
        if "init" in given:  # None: as that model has it
            base = dataclasses.replace(base, init=given["init"], prediction_type=None)
        return dataclasses.replace(base, **given), []
    for field in dataclasses.fields(stored):
        name, old = field.name, getattr(stored, field.name)
        of_stage, _, what = name.partition("_")  # image_steps is of a stage, image_size is not
        to_come = (
            what in ("steps", "batch_size", "learning_rate")
            and of_stage in STAGES and of_stage not in begun
        )
        free = field.metadata.get("free") or not begun
        if given.get(name, old) != old and not free and not to_come:
            raise ValueError(f"{path} was trained with --{name.replace('_', '-')} {old}, not "
                             f"{given[name]}; choose a new folder for other options")
    return dataclasses.replace(stored, **given), finished


def stages_to_run(path, stage, finished):
    """The stages that this call trains. Raises ValueError if the one asked for cannot be."""
    if stage is None:
        return [name for name in STAGES if name not in finished]
    if stage in finished:
        raise ValueError(
            f"the {stage} stage of {path} is finished; choose a new folder to train anew"
        )
    needed = [name for name in STAGES[: STAGES.index(stage)] if name not in finished]
    if needed:
        raise ValueError(f"--stage {stage} needs the {needed[0]} stage of {path}, which is not "
                         "finished; without --stage all that is missing is trained")
    return [stage]
