"""Commands called in this process, and one small run that all tests of a trained model share."""

import json
import shutil
import sys

import pytest
import torch

import train
import trainer

# Four steps a stage at 16 x 16 pixels. States and metrics every other step, so that there is a
# step after the last saved one to be lost in a kill.
SMALL = {
    "num_clips": 8, "num_frames": 3, "image_size": 16, "vae_steps": 4, "image_steps": 4,
    "video_steps": 4, "vae_batch_size": 4, "image_batch_size": 4, "video_batch_size": 2,
    "image_every": 3, "warmup_steps": 2, "num_steps": 2, "log_every": 2, "save_every": 2,
    "preview_every": 1000, "device": "cpu",
}


def flags(**options):
    """{"num_clips": 8} as ["--num-clips", "8"]."""
    pairs = ((f"--{name.replace('_', '-')}", str(value)) for name, value in options.items())
    return [word for pair in pairs for word in pair]


def call(main, *arguments):
    """main() as the command line `python script.py ARGUMENTS` calls it, but in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["script.py", *map(str, arguments)])
        try:
            return main()
        finally:
            torch.set_flush_denormal(False)  # the scripts set it for their whole process


def train_small(path, *arguments, **options):
    """Train a run of SMALL's options."""
    call(train.main, path, *flags(**SMALL | options), *arguments)


def metrics_of(path):
    """The entries of a run's metrics.jsonl."""
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


def weights_of(path):
    """The bytes of everything that training has made, but for its clock and its options."""
    files = [file for file in sorted(path.rglob("*")) if file.is_file()]
    names = [file.relative_to(path).as_posix() for file in files]
    return {
        name: file.read_bytes() for name, file in zip(names, files, strict=True)
        if name not in ("metrics.jsonl", "train.json") and "previews" not in name
    }


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A finished run, not to be written into. Beside it, in states/, each state that it saved."""
    path = tmp_path_factory.mktemp("trained") / "run"
    save_state = trainer.Trainer.save_state

    def save_and_keep(self):
        save_state(self)
        kept = path.parent / "states" / f"{self.plan.stage}-{self.step}.pt"
        kept.parent.mkdir(exist_ok=True)
        shutil.copy(self.state_path, kept)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer.Trainer, "save_state", save_and_keep)
        train_small(path)
    return path


@pytest.fixture
def run(trained, tmp_path):
    """A copy of the finished run, to do with as one likes."""
    return shutil.copytree(trained, tmp_path / "run")
