"""Moving digits whose content is known, as clips in a folder and as read from pixels."""

import gzip
import json
import struct

import numpy as np
import pytest
import torch
from helpers import call, train_quickly

from media.read import read_clip
from studies import digits
from studies.digits import FORMS, PAIRS, Choices, Digits, pairs_of
from studies.handwriting import (MOTIONS, centres_of, read_digits, read_idx, recognise_motion,
                                 score, train_reader)


def write_idx(path, array):
    data = struct.pack(f">4B{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


@pytest.fixture(scope="module")
def mnist(tmp_path_factory):
    """Twenty images of each digit, a pattern of its own with a gray value of its own."""
    folder, rng = tmp_path_factory.mktemp("mnist"), np.random.default_rng(3)
    patterns = np.kron(rng.integers(0, 2, (10, 4, 4)), np.ones((7, 7)))
    images = np.concatenate([(200 - 7 * i) * patterns for i in range(20)]).astype(np.uint8)
    for name, array in ("images-idx3", images), ("labels-idx1", np.arange(200) % 10):
        write_idx(folder / f"train-{name}-ubyte.gz", array.astype(np.uint8))
    write_idx(folder / "train-images-idx3-ubyte", images)  # the same file, unpacked
    return folder


@pytest.mark.parametrize("name", ["a", "a.gz"])
def test_an_idx_file_is_read(tmp_path, name):
    data = bytes([0, 0, 8, 2, 0, 0, 0, 2, 0, 0, 0, 3, 10, 11, 12, 13, 14, 255])
    (tmp_path / name).write_bytes(gzip.compress(data) if name == "a.gz" else data)
    assert read_idx(tmp_path / name).tolist() == [[10, 11, 12], [13, 14, 255]]


@pytest.mark.parametrize("data", [b"", b"\0\0\x0d\x01\0\0\0\0", b"\0\0\x08\x01\0\0\0\x02abc"])
def test_another_file_is_refused(tmp_path, data):
    (tmp_path / "x").write_bytes(data)
    with pytest.raises(ValueError, match="x: damaged, or not an idx file"):
        read_idx(tmp_path / "x")


def test_a_file_that_is_there_twice_counts_once(mnist):
    images, labels = read_digits(mnist)
    assert images.shape == (200, 28, 28) and labels.tolist() == [*range(10)] * 20


def test_scikit_learn_has_digits_without_mnist():
    pytest.importorskip("sklearn")
    images, labels = read_digits(None)
    assert images.shape == (1797, 8, 8) and images.max() == 255 and set(labels) == {*range(10)}


def test_one_motion_or_one_axis_of_each_digit_is_held_out():
    seen, held_out = pairs_of("pairs")
    assert [digit for digit, _ in held_out] == [*range(10)] and (9, "right then left") in held_out
    assert sorted(seen + held_out) == sorted(PAIRS)
    seen, held_out = pairs_of("axis")
    sideways = {digit for digit, motion in held_out if "left" in motion}
    assert sideways == {1, 3, 5, 7, 9} == {digit for digit, motion in seen if "up" in motion}


@pytest.mark.parametrize("form", FORMS)
def test_a_digit_moves_as_asked_two_steps_or_more_each_way(mnist, form):
    clips = Digits(Choices(str(mnist), form), "real")
    for i in range(60):
        motion, rng = list(MOTIONS)[i % 4], np.random.default_rng(i)
        path = clips.path(rng, *MOTIONS[motion])
        room = clips.image_size - clips.digit_size
        assert path.min() >= 0 and path.max() <= room
        steps = np.diff(path @ MOTIONS[motion])  # in the first direction
        turn = int((steps > 0).sum())
        assert 2 <= turn <= len(steps) - 2 and (steps[:turn] > 0).all() and (steps[turn:] < 0).all()
        assert path[turn] @ np.abs(MOTIONS[motion]) in (0, room)  # at the wall
        assert np.ptp(path @ np.abs(MOTIONS[motion])[::-1]) == 0


def test_training_reader_and_real_clips_have_different_digits(mnist):
    parts = [{int(image.max()) for image in Digits(Choices(str(mnist)), part).images[4]}
             for part in digits.PARTS]
    assert [len(part) for part in parts] == [12, 6, 2] and len(set.union(*parts)) == 20


def test_the_centre_of_mass_by_hand():
    """Masses of 0.8 at (1.5, 0.5) and 0.4 at (4.5, 3.5); less than 0.2 is no digit."""
    frame = torch.full((1, 6, 6), 0.1)
    frame[0, 0, 1], frame[0, 3, 4] = 1.0, 0.6
    assert torch.allclose(torch.cat(centres_of(frame)), torch.tensor([2.5, 1.5]))


STILL = torch.full((8,), 9.0)
THERE = torch.tensor([8.0, 6, 4, 2, 0, 2, 4, 6])


@pytest.mark.parametrize("x, y, motion", [
    (THERE, STILL, "left then right"), (-THERE, STILL, "right then left"),
    (STILL, THERE, "up then down"), (STILL, -THERE, "down then up"),
    (THERE, STILL + THERE, None),  # diagonal
    (2 * torch.arange(8.0), STILL, None),  # one way
    (THERE * 0.3, STILL, None),  # 1.8 pixels on the way back
    (THERE[[0, 4, 1, 5, 2, 6, 3, 7]], STILL, None),  # to and fro
    (STILL / 0 * 0, STILL / 0 * 0, None),  # black frames
])
def test_a_motion_is_there_and_back_on_one_axis(x, y, motion):
    assert recognise_motion(x, y) == motion


def test_real_clips_are_read_and_clips_of_other_pairs_are_wrong(mnist):
    real, learned = (Digits(Choices(str(mnist)), part) for part in ("real", "reader"))
    images = torch.from_numpy(np.concatenate([*learned.images.values()])) / 255
    reader = train_reader(images, torch.arange(10).repeat_interleave(6), num_steps=60)
    clips = torch.stack([real.clip(i, *pair) for i, pair in enumerate(PAIRS)])
    right = dict.fromkeys(("digit", "frames", "motion", "both"), 100.0)
    assert score(reader, clips, PAIRS, 20) == {"count": 40} | right
    assert score(reader, clips[:, :1], PAIRS, 20) == {"count": 40, "digit": 100, "frames": 100}
    rows = score(reader, clips, [((d + 1) % 10, m) for d, m in PAIRS], 20)
    assert (rows["digit"], rows["motion"], rows["both"]) == (0, 100, 0)


@pytest.fixture
def folder(mnist, tmp_path, monkeypatch):
    monkeypatch.setitem(FORMS, "small", (60, 8, 32, 20))
    call(digits.main, "make", tmp_path / "clips", "--mnist", mnist)
    return tmp_path / "clips"


def test_the_folder_holds_exactly_the_clips_of_seen_pairs(folder, mnist):
    lines = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    seen, made = pairs_of("pairs")[0], Digits(Choices(str(mnist)), "training")
    assert lines[31] == {"file_name": "00031.gif", "text": "the digit 0 is moving up then down ."}
    for i in (0, 59):
        frames, _ = read_clip(folder / f"{i:05d}.gif")
        expected = (made.clip(i, *seen[i % 30]) + 1) * 127.5
        assert np.array_equal(frames, expected.round().movedim(1, -1).numpy())


def test_a_folder_that_is_not_empty_and_a_run_on_other_data_are_refused(folder, trained):
    with pytest.raises(ValueError, match="clips: is not empty"):
        call(digits.main, "make", folder)
    with pytest.raises(ValueError, match="needs a run of train.py on a folder of"):
        call(digits.main, "evaluate", trained)
    with pytest.raises(ValueError, match="needs MNIST's files"):
        call(digits.main, "make", folder / "new", "--mnist", folder)


def test_a_run_is_evaluated(folder, tmp_path):
    train_quickly(tmp_path / "run", "--data", folder, "--vae-steps", 2, "--image-steps", 2,
                  "--video-steps", 2, "--device", "cpu")
    call(digits.main, "evaluate", tmp_path / "run", "--num-prompts", 20, "--device", "cpu")
    rows = json.loads((tmp_path / "run" / "digits.json").read_text())["rows"]
    assert list(rows) == [
        "clips, seen pairs", "clips, held-out pairs", "images", "images before the video stage",
        "real clips", "real, autoencoded", "noise"]
    assert rows["real clips"]["both"] == 100 and rows["noise"]["both"] == 0
    assert rows["clips, seen pairs"]["count"] == 10 and rows["images"]["count"] == 20
