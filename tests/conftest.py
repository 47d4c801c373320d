"""One small run that all tests of a trained model share."""

import os
import shutil

import pytest
from helpers import train_small

from training.run import Run

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # tests run on the CPU, even if there is a GPU


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A finished run, not to be written into. states/ beside it has each state that it saved."""
    path = tmp_path_factory.mktemp("trained") / "run"
    save_state = Run.save_state

    def save_and_keep(self, state):
        save_state(self, state)
        kept = path.parent / "states" / f"{state['stage']}-{state['step']}.pt"
        kept.parent.mkdir(exist_ok=True)
        shutil.copy(self.path / "training_state.pt", kept)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "save_state", save_and_keep)
        train_small(path)
    return path


@pytest.fixture
def run(trained, tmp_path):
    """A copy of the finished run, to change freely."""
    return shutil.copytree(trained, tmp_path / "run")
