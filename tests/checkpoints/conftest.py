"""Small single files of Stable Diffusion, weights by the rule of the recordings."""

import pytest
from checkpoint_files import RECORDED
from recorded.rule import checkpoint

from checkpoints.safetensors_file import save_safetensors
from checkpoints.tokenizers import save_tokenizer
from checkpoints.weights import load_pipeline
from tokenizer import CLIPTokenizer


@pytest.fixture(scope="session")
def files(tmp_path_factory):
    """The paths {"sd1", "sd2"} of small single files, and of a merges file."""
    path = tmp_path_factory.mktemp("files")
    words = ["a red circle", "a blue square", "a green triangle", "moving left", "moving right"]
    save_tokenizer(path / "tokenizer", CLIPTokenizer.train(words, 20, max_length=12))
    for family in RECORDED:
        save_safetensors(path / family, checkpoint(RECORDED[family]["shapes"]))
    paths = {family: path / family for family in RECORDED}
    return paths | {"merges": path / "tokenizer" / "merges.txt"}


@pytest.fixture(scope="session")
def loaded(files):
    """{"sd1", "sd2"} loaded from these files, as image models."""
    return {family: load_pipeline(files[family], temporal="none", merges=files["merges"])
            for family in RECORDED}
