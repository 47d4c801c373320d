"""Every choice of a training run, in one dataclass: its fields are the flags of train.py.

A recipe per preset says how a model of that size is trained; a flag overrides a field of it. What
the tiny recipe adds to Latent-Shift and Stable Diffusion is measured in docs/measurements.md.
"""

import dataclasses
import typing
from dataclasses import dataclass

import torch

import model
import vae
from cli import check_ranges, option
from diffusion import Diffusion
from pipeline import Sampling
from temporal import VARIANTS

STAGES = ("vae", "image", "video")
FREE = {"free": True}  # a resumed run may change it: it is of the machine, or of samples


@dataclass(frozen=True)
class LoopOptions:
    """What every training has (trainer.py), whatever it trains."""

    seed: int = option(0, "seed of weights, data and noise")
    warmup_steps: int = option(30, "steps in which the learning rate rises")
    ema_decay: float = option(0.99, "decay of the average of the weights")
    accumulate: int = option(1, "batches whose gradients make one step")
    device: str = option("auto", "cpu, cuda, cuda:1, ... ", **FREE)
    offload: bool = option(False, "keep AdamW's moments in CPU memory: a third less of a GPU's",
                           **FREE)
    precision: str = option("auto", "bf16 or fp32 (products in TF32) on CUDA; auto: bf16", **FREE,
                            choices=("auto", "bf16", "fp32"))
    compile: bool = option(False, "torch.compile the networks", **FREE)
    workers: int = option(0, "processes that read clips ahead; 0: none", **FREE)
    log_every: int = option(50, "steps between lines of metrics.jsonl", **FREE)
    save_every: int = option(250, "steps between saved states", **FREE)

    def __post_init__(self):
        kinds = typing.get_type_hints(type(self))
        others = {"max_tokens": 3} | dict.fromkeys(
            ("seed", "image_every", "warmup_steps", "max_level", "decoder_steps", "workers"), 0)
        most = {"seed": 2**62, "num_clips": 10**6, "max_tokens": 65536, "workers": 256}
        for name in [name for name, kind in kinds.items() if kind in (int, float)]:
            least = 0 if kinds[name] is float else others.get(name, 1)
            part = name in ("caption_dropout", "ema_decay") or name.endswith("_part")
            limit = 1 if part else most.get(name, 10**6 if name.endswith("_size") else 10**9)
            check_ranges(self, **{name: (least, limit)})


@dataclass(frozen=True)
class TrainOptions(LoopOptions):
    """The options of a run. Steps are optimizer steps, rates peak learning rates."""

    preset: str = option("tiny", "size of the model and defaults of all other options",
                         choices=("tiny", "small", "sd1", "sd2"))
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
    vae_steps: int = option(1000, "steps of the vae stage")
    vae_batch_size: int = option(32, "frames a step")
    vae_learning_rate: float = option(3e-3, "learning rate of the vae stage")
    kl_weight: float = option(2e-2, "weight of the pull of latents towards N(0, 1)")
    motion_weight: float = option(5.0, "additional weight of pixels that differ from their frame")
    image_steps: int = option(325, "steps of the image stage")
    image_batch_size: int = option(64, "images a step")
    image_learning_rate: float = option(2e-3, "learning rate of the image stage")
    text_rate: float = option(0.01, "the text encoder's part of the image stage's learning rate")
    video_steps: int = option(1350, "steps of the video stage")
    video_batch_size: int = option(8, "clips a step")
    video_learning_rate: float = option(1e-3, "learning rate of the video stage")
    image_every: int = option(20, "every so many steps of the video stage see images; 0: none do")
    # the temporal variant
    temporal: str = option("shift", "what mixes frames (temporal.py)", choices=VARIANTS)
    shift_before: str = option("both", "convolutions of a block that see shifted channels",
                               choices=("conv1", "conv2", "both"))
    shift_fold: int = option(3, "the shift moves one in so many channels, each way")
    shift_causal: bool = option(False, "shift only from the frame before")
    start_as_shift: bool = option(False, "initialise --temporal conv as the shift")
    new_layers_rate: float = option(1.0, "temporal layers' part of the video stage's learning rate")
    # diffusion
    prediction_type: str | None = option("v_prediction", "what the U-Net predicts",
                                         choices=("epsilon", "v_prediction"))
    zero_terminal_snr: bool = option(True, "let the last timestep be pure noise")
    snr_divisor: float = option(4.0, "divide signal-to-noise ratios: few latents need more noise")
    early_noise: float = option(3.0, "how much the first half of the video steps prefers noise")
    caption_dropout: float = option(0.1, "part of the captions left out, for guidance")
    max_tokens: int = option(16, "tokens of a caption, with start and end")
    # optimisation
    gradient_checkpointing: bool | None = option(
        False, "compute activations twice, store few of them; None: on a CPU, and on a "
        "GPU where memory needs it", **FREE)
    preview_every: int = option(500, "steps between previews", **FREE)
    # the defaults of sample.py for the run
    guidance_scale: float = option(3.5, "weight of the text in samples", **FREE)
    guidance_max_snr: float | None = option(0.2, "guide samples where the signal-to-noise ratio is "
                                            "at most this", **FREE)
    num_steps: int = option(8, "denoising steps of samples", **FREE)
    timestep_power: float = option(0.6, "below 1: more of the steps where noise prevails", **FREE)
    frames_per_second: float = option(8.0, "of the clips that are written", **FREE)

    def __post_init__(self):
        super().__post_init__()
        if self.start_as_shift and self.temporal != "conv":
            raise ValueError("--start-as-shift needs --temporal conv, got "
                             f"--temporal {self.temporal}; leave it out")
        check_ranges(self, snr_divisor=(1e-3, 1e9))
        self.sampling(self.num_frames)
        if self.init is None:  # or else shapes and schedule are those of that model
            self.check_shapes()

    def check_shapes(self):
        """Refuse now what a later stage or sampling would refuse hours later."""
        factor = self.vae().downscale * self.unet().downscale
        if self.image_size % factor:
            raise ValueError(f"--image-size needs a multiple of {factor}, got {self.image_size}")
        self.diffusion().timestep_pairs(self.num_steps, self.timestep_power)

    @property
    def latent_frames(self):
        """Latent frames of a training clip: as many as frames, but for papers/."""
        return self.num_frames

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

    def temporal_fields(self):
        """The fields of UNetConfig that choose the temporal variant."""
        same = ("temporal", "shift_before", "shift_fold", "shift_causal")
        return {name: getattr(self, name) for name in same} | {"max_frames": self.num_frames}

    def sampling(self, num_frames):
        """The defaults of sample.py for the run."""
        same = ("image_size", "frames_per_second", "num_steps", "guidance_scale",
                "guidance_max_snr", "timestep_power")
        return Sampling(num_frames=num_frames, **{name: getattr(self, name) for name in same})

    def diffusion(self):
        """The noise schedule of the run."""
        zero = self.zero_terminal_snr
        if not zero and self.snr_divisor == 1:
            return Diffusion(prediction_type=self.prediction_type)
        base = Diffusion(prediction_type="v_prediction", rescale_betas_zero_snr=zero).alphas_cumprod
        # SNR = a / (1 - a), so SNR / k belongs to a / (a + k (1 - a)). The betas are rebuilt from
        # it, because a scheduler_config.json holds betas, which diffusers can read.
        alpha_bar = base / (base + self.snr_divisor * (1 - base))
        betas = 1 - alpha_bar / torch.cat([torch.ones(1), alpha_bar[:-1]])
        return Diffusion(prediction_type=self.prediction_type, trained_betas=tuple(betas.tolist()),
                         timestep_spacing="trailing" if zero else "leading",
                         set_alpha_to_one=True)


RECIPES = {
    "tiny": TrainOptions(),
    "small": TrainOptions(
        preset="small", num_frames=16, image_size=64, num_clips=20000, max_tokens=32,
        vae_steps=10000, vae_batch_size=64, vae_learning_rate=3e-4,
        image_steps=10000, image_batch_size=128, image_learning_rate=3e-4,
        video_steps=40000, video_batch_size=16, video_learning_rate=2e-4, image_every=8,
        warmup_steps=500, ema_decay=0.999, save_every=2000, preview_every=2000,
        workers=4, guidance_scale=4.0, num_steps=25,
    ),
    "sd1": TrainOptions(
        preset="sd1", num_frames=16, image_size=256, num_clips=20000, max_tokens=77,
        vae_steps=100000, vae_batch_size=16, vae_learning_rate=1e-4,
        kl_weight=1e-6, motion_weight=0.0,
        image_steps=100000, image_batch_size=32, image_learning_rate=1e-4,
        video_steps=100000, video_batch_size=1, video_learning_rate=1e-5, image_every=8,
        prediction_type="epsilon", zero_terminal_snr=False, snr_divisor=1.0, early_noise=0.0,
        warmup_steps=1000, ema_decay=0.9999, gradient_checkpointing=None,
        save_every=5000, preview_every=5000, workers=4, guidance_scale=7.5,
        guidance_max_snr=None, num_steps=50, timestep_power=1.0,
    ),
}
RECIPES["sd2"] = dataclasses.replace(RECIPES["sd1"], preset="sd2", prediction_type="v_prediction")
