"""The folder of a training run: its options, the stages that are done, the state of a stopped one.

    train.json                 options and finished stages
    training_state.pt          while a stage is unfinished: all that --resume needs
    unet/ vae/ text_encoder/ tokenizer/ scheduler/ model_index.json sampling.json
                               the model in the layout of diffusers (weights.py)
    image_unet/                the U-Net before it saw a clip
    metrics.jsonl previews/    losses, and samples drawn during training
    cache/                     while stages are unfinished: clips and captions, encoded (cache.py)
    .lock                      locked by the process that trains
"""

import dataclasses
import errno
import os
import shutil
import socket
import sys
from pathlib import Path

import torch
from tqdm import tqdm

import devices
import memory
import processes
import weights
from data import ClipFolder
from files import from_json, full_disk, open_regular, read_json, write_json
from media.write import side_by_side, write_clip
from options import RECIPES, STAGES, TrainOptions
from shapes import MovingShapes

try:
    import fcntl
except ImportError:  # on Windows nothing is locked
    fcntl = None

LOCKS = {}  # {path: open file}: a file that is closed loses its lock
REMOVED = ("weight_decay", "gradient_clip", "shared_noise")  # options that only older runs have


class Run:
    """An open run: `path`, `options`, the `finished` stages, and the `device` that it trains on."""

    record, stages, options_type = "train.json", STAGES, TrainOptions

    def __init__(self, path, options, finished, resume):
        self.path, self.options, self.finished = Path(path), options, finished
        self.device, self.plans = processes.start(options.device), {}
        if resume and not (self.path / self.record).exists():
            raise ValueError(f"{path}: nothing to resume, it is no run; leave out --resume to "
                             "start one")
        processes.barrier()  # until all processes have looked
        if processes.is_main():
            lock(self.path / ".lock")
        processes.barrier()
        known = (self.path / self.record).exists()
        if known and read_record(self.path, type(self))[1] != finished:
            raise ValueError(f"{path}: another training has finished a stage of it; start again")
        self.state, state_path = None, self.path / "training_state.pt"
        if state_path.exists():
            self.state = read_state(state_path)
            if self.state["stage"] in finished:  # a kill came just before its removal
                self.state = None
            elif not resume:
                raise ValueError(f"{state_path}: is of an unfinished stage; add --resume to "
                                 "continue it, or remove that file to start the stage anew")
        self._save_record()

    def _save_record(self):
        processes.barrier()  # until all processes have read what was there
        if processes.is_main():
            options = dataclasses.asdict(self.options)
            write_json(self.path / self.record, {"options": options, "finished": self.finished})
        processes.barrier()

    def save(self, unet=None, image_unet=None, vae=None, text=None, schedule=None):
        """Write parts of the model: networks, (encoder, tokenizer), (diffusion, sampling)."""
        if not processes.is_main():
            return
        for part, network in (("unet", unet), ("image_unet", image_unet), ("vae", vae)):
            if network is not None:
                weights.save_network(self.path / part, network)
        if text is not None:
            weights.save_text(self.path, *text)
        if schedule is not None:
            weights.save_schedule(self.path, *schedule)

    def finish(self, stage):
        """Note that a stage is done, after what it made has been written."""
        processes.barrier()  # until all processes have read what they needed
        if processes.is_main():  # the stages in between share the latents
            used = "cache" if stage == self.stages[-1] else "cache/frames"
            shutil.rmtree(self.path / used, ignore_errors=True)
        self.finished = list(self.stages[: self.stages.index(stage) + 1])
        self._save_record()
        if processes.is_main():
            (self.path / "training_state.pt").unlink(missing_ok=True)

    def adopt(self):
        """Take the model that --init names as stages one and two."""
        options = self.options
        model = weights.load_pipeline(options.init, "none", options.merges, options.prediction_type)
        model.encode_text([""])  # a model without a tokenizer is refused now
        factor = model.vae.config.downscale * model.unet.config.downscale
        if options.image_size % factor:
            raise ValueError(f"--image-size needs a multiple of {factor}, got {options.image_size}")
        # Refuse now what a preview or the video stage would refuse hours later.
        model.diffusion.timestep_pairs(options.num_steps, options.timestep_power)
        dataclasses.replace(model.unet.config, **options.temporal_fields())
        if processes.is_main():
            for note in model.report.notes:
                print(note, file=sys.stderr)
            weights.save_network(self.path / "image_unet", model.unet)
            weights.save_pipeline(model, self.path)
        self.finish("image")

    def precision(self):
        """On a GPU networks that learn compute in bfloat16; their weights stay float32."""
        return devices.precision(self.device, self.options.precision)

    def plan(self, stage):
        """memory.Plan of a stage, made at the first call. Raises ValueError if it cannot fit."""
        if stage not in self.plans:
            self.plans[stage] = memory.plan(self, stage)
        return self.plans[stage]

    def to_device(self, *tensors):
        """Tensors on the run's device; from pinned memory, so that no step waits for a copy."""
        if self.device.type != "cuda":
            return tuple(x.to(self.device) for x in tensors)
        return tuple(x.pin_memory().to(self.device, non_blocking=True) for x in tensors)


def lock(path):
    """Lock a file for this process until it ends. Raises ValueError if another process has it."""
    if path.absolute() in LOCKS or fcntl is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    file = open(path, "a+", encoding="utf-8", errors="replace")
    try:  # lockf and not flock: processes that are forked for the data do not inherit it
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EAGAIN):
            return  # a disk that knows no locks
        file.seek(0)
        who = " ".join(file.read(200).split()) or "another process"
        raise ValueError(f"{path.parent}: {who} is training here; stop it or wait for its end, or "
                         "choose another folder") from None
    with full_disk(path, path):
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
    LOCKS[path.absolute()] = file


def load_vae(path, device, precision):
    """A run's autoencoder, frozen."""
    network = weights.load_vae(Path(path) / "vae").to(memory_format=torch.channels_last)
    return devices.freeze(network, device, precision)


def load_image_model(path, device, precision):
    """A run's model as it was before it saw a clip: a Pipeline, all but its U-Net on a device.

    The U-Net stays mapped from its file: training copies its weights and then needs it no more.
    """
    model = weights.load_folder(Path(path), "none", unet="image_unet")
    devices.freeze(model.vae.to(memory_format=torch.channels_last), device, precision)
    devices.freeze(model.text_encoder, device, precision)
    return model


def open_data(options):
    """The clips that --data names: a sequence of (frames uint8 (t, 3, h, w), caption)."""
    size = options.num_frames, options.image_size
    if options.data == "shapes":
        return MovingShapes(options.num_clips, *size, options.seed)
    return ClipFolder(options.data, *size, options.stride, options.frame_rate, options.max_frames)


def draw_previews(run, stage, pipeline, captions):
    """A function of the step that draws nine captions with the average's weights.

    From now on the networks that do not learn are in CPU memory but while a preview is drawn.
    """
    frozen = [network for network in (pipeline.vae, pipeline.text_encoder)
              if not next(network.parameters()).requires_grad]
    for network in frozen:
        network.to("cpu")
    prompts = list(dict.fromkeys(captions))
    prompts = prompts[:: max(1, len(prompts) // 9)][:9]

    def preview(step):
        clips = []
        with devices.visit(frozen, run.device), run.precision():
            for seed, prompt in enumerate(prompts):  # one by one, as training holds the memory
                *_, latents = pipeline.sample([prompt], [seed])
                clips.append(pipeline.decode(latents))
        suffix = ".png" if stage == "image" else ".gif"
        path = run.path / "previews" / f"{stage}-{step:06d}{suffix}"
        write_clip(path, side_by_side(torch.cat(clips)), pipeline.sampling.frames_per_second)

    return preview


def progress(items, title, total=None):
    """The items behind a bar, which only the first process draws."""
    return tqdm(items, title, total, unit="clip", leave=False,
                disable=not processes.is_main() or "TQDM_DISABLE" in os.environ)


def read_state(path):
    """A training state; nothing but tensors and plain values is ever loaded from it."""
    with open_regular(path) as file:
        start = file.read(4)
    try:
        if start != b"PK\3\4":  # torch would read it as a file of its first versions
            raise RuntimeError("no archive")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # an unpickler may raise anything for a damaged file
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"{path}: no training state ({reason}); remove it to start the stage "
                         "anew") from None
    if not _is_state(state):
        raise ValueError(f"{path}: no training state (damaged, or of another program); remove it "
                         "to start the stage anew")
    return state


def _is_state(state):
    """Whether a state has the form of what Trainer.save_state writes."""
    def tensors(values, like):
        return (isinstance(values, list) and len(values) == len(like) and
                all(isinstance(x, torch.Tensor) and x.is_floating_point() and x.shape == y.shape
                    for x, y in zip(values, like, strict=True)))

    try:
        parameters, optimizer = state["parameters"], state["optimizer"]
        groups, moments = optimizer["param_groups"], optimizer["state"]
        numbers = [number for group in groups for number in group["params"]]
        return (type(state["stage"]) is str and type(state["step"]) is int and state["step"] >= 1
                # States of older versions have neither.
                and type(state.get("processes", 1)) is int and type(state.get("threads", 1)) is int
                and tensors(parameters, parameters) and tensors(state["average"], parameters)
                and numbers == list(range(len(parameters))) and moments.keys() <= set(numbers)
                and all(tensors([moment["exp_avg"], moment["exp_avg_sq"]], 2 * [parameters[i]])
                        and moment["step"].numel() == 1 and bool(moment["step"] >= 1)
                        for i, moment in moments.items()))
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError):
        return False


def read_record(path, kind=Run):
    """(options, finished stages) of a run of that class, from its record."""
    record_path = Path(path) / kind.record
    record = read_json(record_path)
    values, finished = record.get("options"), record.get("finished")
    if not isinstance(values, dict) or not isinstance(finished, list) or (
        finished != list(kind.stages[: len(finished)])
    ):
        raise ValueError(f"{record_path}: damaged, or of another version (options "
                         f"{values!r:.60}, finished stages {finished!r:.60})")
    values = {k: v for k, v in values.items() if k not in REMOVED}
    return from_json(kind.options_type, values, record_path), finished


def is_used(path):
    """Whether there is something in a folder; a lock alone is what a kill left at the start."""
    return Path(path).exists() and any(file.name != ".lock" for file in Path(path).iterdir())


def recipe_for(init):
    """The preset of a new run that starts from a model: of a run its own, else Stable Diffusion."""
    if init is None:
        return "tiny"
    return read_record(Path(init))[0].preset if (Path(init) / "train.json").exists() else "sd1"


def merge_options(path, given):
    """(TrainOptions, finished stages) of a run: its own if it exists, with the flags given.

    Raises ValueError if a flag contradicts what the run has been trained with.
    """
    known = (Path(path) / "train.json").exists()
    if not known and is_used(path):
        raise ValueError(f"{path}: is not empty and no run; choose a new folder")
    stored, finished = read_record(path) if known else (None, [])
    begun = STAGES[: len(finished) + (Path(path) / "training_state.pt").exists()]
    if not known or (not begun and {"init", "preset"} & given.keys()):
        base = RECIPES[given.get("preset", recipe_for(given.get("init")))]
        if "init" in given:  # None: what that model predicts
            base = dataclasses.replace(base, init=given["init"], prediction_type=None)
        return dataclasses.replace(base, **given), []
    return with_flags(path, stored, given, STAGES, begun), finished


def with_flags(path, stored, given, stages, begun):
    """A run's options with the flags given. Raises ValueError if one contradicts a begun stage."""
    for field in dataclasses.fields(stored):
        name, old = field.name, getattr(stored, field.name)
        stage, _, what = name.partition("_")  # image_steps is of a stage, image_size is not
        of_stage = stage in stages and what in ("steps", "batch_size", "learning_rate")
        free = field.metadata.get("free") or not begun or (of_stage and stage not in begun)
        if given.get(name, old) != old and not free:
            raise ValueError(f"{path} was trained with --{name.replace('_', '-')} {old}, not "
                             f"{given[name]}; choose a new folder for other options")
    return dataclasses.replace(stored, **given)


def stages_to_run(path, stage, finished):
    """The stages that this call trains. Raises ValueError if the one asked for cannot be."""
    if stage is None:
        return [name for name in STAGES if name not in finished]
    if stage in finished:
        raise ValueError(f"the {stage} stage of {path} is finished; choose a new folder to train "
                         "anew")
    needed = [name for name in STAGES[: STAGES.index(stage)] if name not in finished]
    if needed:
        raise ValueError(f"--stage {stage} needs the {needed[0]} stage of {path}, which is not "
                         "finished; without --stage all that is missing is trained")
    return [stage]
