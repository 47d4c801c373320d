"""The folder of a training run: its options, the finished stages, the state of an unfinished one.

    train.json                 options, finished stages, and a digest of the clips
    training_state.pt          while a stage is unfinished: everything that --resume needs
    unet/ vae/ text_encoder/ tokenizer/ scheduler/ model_index.json sampling.json
                               the model in the layout of diffusers (checkpoints/weights.py)
    image_unet/                the U-Net before it saw a clip
    metrics.jsonl previews/    losses; samples drawn during training, and their captions
    cache/                     while stages are unfinished: clips and captions, encoded (cache.py)
    .lock                      locked by the process that trains
"""

import copy
import dataclasses
import hashlib
import json
import os
import shutil
import sys
from pathlib import Path

import torch
from tqdm import tqdm

from checkpoints import finite, weights
from checkpoints.errors import DAMAGED
from media.write import contact_sheet, enlarge, side_by_side, write_clip
from model import UNet
from support import devices
from support.devices import barrier, is_main
from support.files import atomic, lock, read_json, write_json, write_text
from temporal import temporal_state
from training.options import check_image_size


class Run:
    """An open run: `path`, `options`, the `finished` stages, and the `device` that it trains on.

    The options' class names the record and the stages, so papers/ has runs of its own. `state` is
    the training state of an unfinished stage, or None. `checkpointing` says whether U-Nets
    compute their activations twice to save memory.
    """

    def __init__(self, path, options, finished, resume):
        self.path, self.options, self.finished = Path(path), options, finished
        self.device, self.state, self.clips = devices.start(options.device), None, None
        self.noted = set()  # lines that note() has printed
        large = getattr(options, "preset", "tiny") in ("sd1", "sd2")
        self.checkpointing = large and self.device.type != "cuda"  # on a GPU, rehearsal.py decides
        state_path = self.path / "training_state.pt"
        if resume and not (self.path / options.record).exists():
            raise ValueError(f"{path}: nothing to resume, because it is not a run; leave out "
                             "--resume to start one")
        barrier()  # wait until all processes have looked
        if is_main():
            lock(self.path / ".lock")
        if state_path.exists():
            self.state = read_state(state_path)
            if self.state["stage"] in finished:  # killed just before removing it
                self.state = None
            elif not resume:
                raise ValueError(f"{state_path}: belongs to an unfinished stage; add --resume to "
                                 "continue it, or remove that file to start the stage again")

    def start(self, clips, stages):
        """Say what will be trained. Raises ValueError if a new --data has other clips."""
        options, path, size = self.options, self.path / self.options.record, self.options.image_size
        versions = [clips.version(i) for i in range(len(clips))]
        self.clips = hashlib.sha256(repr(versions).encode()).hexdigest()
        before = read_json(path) if self.finished or self.state else {"clips": self.clips}
        if before.get("clips") != self.clips and before["options"]["data"] != options.data:
            raise ValueError(f"--data {options.data}: has other clips than "
                             f"{before['options']['data']}, on which {self.path} was trained")
        dtype = str(devices.compute_dtype(self.device, options.precision)).removeprefix("torch.")
        steps = ", ".join(f"{stage} {getattr(options, f'{stage}_steps')}" for stage in stages)
        if is_main():
            print(f"training on {options.data}: {len(clips)} clips, {options.num_frames} frames of "
                  f"{size} x {size}; steps: {steps}; on {self.device} in {dtype}")

    def save_record(self):
        """Write options, finished stages and the digest of the clips."""
        barrier()  # wait until all processes have read the old ones
        if is_main():
            options = dataclasses.asdict(self.options)
            write_json(self.path / self.options.record,
                       {"options": options, "finished": self.finished, "clips": self.clips})

    def save_state(self, state):
        """Write the training state, which is everything that the next step needs, as one file."""
        if is_main():
            with atomic(self.path / "training_state.pt") as file:
                torch.save(state, file)

    def log(self, entry):
        """Add a line to metrics.jsonl."""
        if is_main():
            with open(self.path / "metrics.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps(entry) + "\n")

    def note(self, lines):
        """Print lines for the user, each once and by the first process only."""
        for line in lines:
            if is_main() and line not in self.noted:
                print(line, file=sys.stderr)
            self.noted.add(line)

    def begin(self, stage, step):
        """Save the record, now that the data have been read, so that a failed start leaves none.

        The lines of a stage's later steps in metrics.jsonl are removed; they will be repeated.
        """
        self.save_record()
        path = self.path / "metrics.jsonl"
        if is_main() and path.exists():
            entries = [json.loads(line) for line in path.read_text().splitlines()
                       if line.endswith("}")]  # a kill may cut the last line short
            kept = [e for e in entries if e["stage"] != stage or e["step"] <= step]
            write_text(path, "".join(json.dumps(entry) + "\n" for entry in kept))

    def save(self, unet=None, image_unet=None, vae=None, text=None, schedule=None):
        """Write parts of the model: networks, (encoder, tokenizer), (diffusion, sampling)."""
        if not is_main():
            return
        for part, network in (("unet", unet), ("image_unet", image_unet), ("vae", vae)):
            if network is not None:
                weights.save_network(self.path / part, network)
        if text is not None:
            weights.save_text(self.path, *text)
        if schedule is not None:
            weights.save_schedule(self.path, *schedule)

    def finish(self, stage):
        """Record that a stage is finished, after its results have been written."""
        stages = self.options.stages
        self.finished = list(stages[: stages.index(stage) + 1])
        self.save_record()
        if is_main():
            (self.path / "training_state.pt").unlink(missing_ok=True)
            if stage == stages[-1]:
                shutil.rmtree(self.path / "cache", ignore_errors=True)
                print(f"{self.path}: all stages are finished")
        barrier()

    def adopt(self, read_clips):
        """Use the model that --init names as the result of stages one and two.

        read_clips(autoencoder) is called before anything is written, because it may fail.
        """
        options = self.options
        model = weights.load_pipeline(options.init, None, options.merges, options.prediction_type,
                                      zero_terminal_snr=options.zero_terminal_snr)
        finite.require_finite(model, options.init)
        model.encode_text([""])  # fails now if the model has no tokenizer
        model.diffusion = options.diffusion(model.diffusion)
        check_image_size(options.image_size, model.vae.config, model.unet.config)
        own, most = model.unet.config.temporal, model.unet.config.max_frames
        per_frame = own in ("attention", "joint", "directed")  # these have parameters for each
        if per_frame and own == options.temporal and options.num_frames > most:
            raise ValueError(f"--num-frames {options.num_frames}: {options.init} has parameters for"
                             f" {most} frames; lower it, or choose another --temporal")
        autoencoder = copy.deepcopy(model.vae).to(memory_format=torch.channels_last)
        read_clips(devices.freeze(autoencoder, self.device, options.precision))
        self.save_record()  # a kill while the model is written leaves a run
        self.note(model.report.notes)
        if is_main():
            weights.save_network(self.path / "image_unet", model.unet)
            weights.save_pipeline(model, self.path)
        self.finish("image")

    def draw_previews(self, stage, pipeline, captions):
        """preview(step) for the trainer, which draws nine captions.

        Frozen networks stay in CPU memory except while a preview is drawn.
        """
        frozen = [network for network in (pipeline.vae, pipeline.text_encoder)
                  if not next(network.parameters()).requires_grad]
        for network in frozen:
            network.to("cpu")
        unique = list(dict.fromkeys(captions))
        # Evenly spaced, with the first and the last, because captions are often sorted
        prompts = [unique[i] for i in dict.fromkeys(n * (len(unique) - 1) // 8 for n in range(9))]
        if is_main():
            write_text(self.path / "previews" / "captions.txt", "\n".join(prompts) + "\n")

        def preview(step):
            size = 1 if self.device.type == "cuda" else 9  # training fills a GPU's memory
            clips = []
            with devices.visit(frozen, self.device):
                for start in range(0, len(prompts), size):
                    some = prompts[start : start + size]
                    with self.precision():
                        *_, latents = pipeline.sample(some, range(start, start + len(some)))
                    clips.append(enlarge(pipeline.decode(latents)))  # in the decoder's precision
            suffix = ".png" if stage == "image" else ".gif"
            path = self.path / "previews" / f"{stage}-{step:06d}{suffix}"
            write_clip(path, side_by_side(torch.cat(clips)), pipeline.sampling.frames_per_second)

        return preview

    def preview_vae(self, autoencoder, frames):
        """preview(step) for the trainer, which draws frames uint8 (n, 3, h, w) before and after."""
        @torch.no_grad()
        def preview(step):
            some = frames[[i * (len(frames) - 1) // 7 for i in range(8)]]
            x = self.to_device(some)[0].float() / 127.5 - 1
            with self.precision():
                y = autoencoder.decode(autoencoder.encode(x).mean).float()
            sheet = contact_sheet([enlarge(x.cpu()), enlarge(y.cpu())])
            write_clip(self.path / "previews" / f"vae-{step:06d}.png", sheet)

        return preview

    @property
    def layout(self):
        """The memory layout in which convolutions of networks that learn are fastest."""
        dtype = devices.compute_dtype(self.device, self.options.precision)
        half_on_cpu = self.device.type == "cpu" and dtype != torch.float32
        return torch.contiguous_format if half_on_cpu else torch.channels_last

    def precision(self):
        """A context in which networks that learn compute in the run's --precision."""
        return devices.precision(self.device, self.options.precision)

    def to_device(self, *tensors):
        """Tensors on the run's device, copied from pinned memory so that no step waits for them."""
        if self.device.type != "cuda":
            return tuple(x.to(self.device) for x in tensors)
        return tuple(x.pin_memory().to(self.device, non_blocking=True) for x in tensors)


def read_state(path):
    """A training state. Only loads tensors and plain values. Raises ValueError if it is damaged."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except DAMAGED as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"{path}: not a training state ({reason}); remove it to start the stage "
                         "again") from None


def load_vae(path, device, precision):
    """A run's autoencoder, frozen."""
    network = weights.load_vae(Path(path) / "vae").to(memory_format=torch.channels_last)
    return devices.freeze(network, device, precision)


def load_image_model(path, device, precision, temporal="none"):
    """A run's model before it saw a clip, a Pipeline with all of it except the U-Net on a device.

    The U-Net stays mapped from its file, because training copies its weights and then drops it. If
    it began as a video model (--init RUN), it keeps temporal layers only of the variant `temporal`.
    """
    unet = weights.load_unet(Path(path) / "image_unet")
    if temporal_state(unet) and unet.config.temporal != temporal:
        state, unet = unet.state_dict(), UNet(dataclasses.replace(unet.config, temporal="none"))
        unet.load_state_dict({name: state[name] for name in unet.state_dict()})
    model = weights.load_folder(Path(path), unet=unet)
    devices.freeze(model.vae.to(memory_format=torch.channels_last), device, precision)
    devices.freeze(model.text_encoder, device, precision)
    return model


def open_data(options):
    """The clips that --data names: a sequence of (frames uint8 (t, 3, h, w), caption)."""
    size = options.num_frames, options.image_size
    if options.data == "shapes":
        from shapes import MovingShapes  # imported here, because only one data set is read
        return MovingShapes(options.num_clips, *size, options.seed)
    from training.data import ClipFolder
    return ClipFolder(options.data, *size, options.stride, options.frame_rate, options.max_frames)


def progress(items, title, total=None, unit="clip"):
    """The items, with a progress bar that only the first process draws."""
    return tqdm(items, title, total, unit=unit, leave=False,
                disable=not is_main() or "TQDM_DISABLE" in os.environ)
