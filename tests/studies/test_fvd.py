"""A distance is checked where its value is known: by hand, a slow reference, another library."""

import json
import math

import numpy as np
import pytest
import torch
from helpers import call

from evaluate import real_clips
from shapes import COMBINATIONS
from studies import fvd
from studies.fvd import (FeatureNet, features_of, frechet_distance, measure_features,
                         train_feature_net)


def test_frechet_distance_by_hand():
    """One feature: means 1 and 5, variances 2 and 12: 16 + 2 + 12 - 2 sqrt(24)."""
    assert frechet_distance([[0], [2]], [[3], [3], [9]]) == pytest.approx(30 - 2 * math.sqrt(24))


def test_frechet_distance_is_scipys():
    """|mu|^2 + tr(C_a + C_b - 2 scipy.linalg.sqrtm(C_a @ C_b)) with scipy and np.cov."""
    a, b = (np.sin(np.arange(n * 4).reshape(n, 4) ** 1.5 + phase) for n, phase in ((20, 0), (9, 1)))
    assert frechet_distance(a, 2 * b + 1) == pytest.approx(6.997675905993054, rel=1e-12)


def test_a_set_of_low_rank_is_at_no_distance_from_itself():
    rng = np.random.default_rng(0)
    a = rng.standard_normal((40, 3)) @ rng.standard_normal((3, 8))
    assert 0 <= frechet_distance(a, a) < 1e-9


@pytest.fixture(scope="module")
def net():
    """Trained for a moment, on clips of three frames."""
    return train_feature_net(3, 16, num_steps=30)


def test_a_text_is_the_sum_of_its_words(net):
    ids = [fvd.WORDS.index(word) for word in ("blue", "square", "left")]
    assert torch.equal(net.text_features(["a blue square moving left"])[0], net.words[ids].sum(0))


def test_thirty_steps_of_training_recognise_a_third_of_the_captions(net):
    """By chance 1 of 72; after 800 steps, at 8 frames of 32 x 32, all."""
    best = net.similarity(real_clips(72, 3, 16, 10_000)).argmax(1)
    assert (best == torch.arange(72)).float().mean() > 0.3


def test_features_have_variance_one(net):
    assert features_of(net, real_clips(720, 3, 16, 0)).std().item() == pytest.approx(1, abs=1e-3)


def test_frozen_clips_are_farther_from_real_ones_than_real_ones_are(net):
    real, prompts = real_clips(72, 3, 16, 1), COMBINATIONS
    frozen = real[:, :1].expand_as(real)
    found = measure_features(net, {"real": real, "frozen": frozen}, prompts, seed=1)
    assert found["frozen"]["FVD-shapes"] > 5 * found["real"]["FVD-shapes"] > 0
    assert found["frozen"]["CLIPSIM-shapes"] < found["real"]["CLIPSIM-shapes"]


def test_the_seed_alone_decides_the_net():
    torch.manual_seed(1)
    state = torch.get_rng_state()
    a = train_feature_net(3, 16, seed=4, num_steps=2)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    b, c = (train_feature_net(3, 16, seed=seed, num_steps=2) for seed in (4, 5))
    assert torch.equal(a.words, b.words) and not torch.equal(a.words, c.words)


def test_a_net_sees_the_direction_of_time():
    torch.manual_seed(0)
    untrained, clips = FeatureNet(), real_clips(2, 4, 16, 0)
    assert not torch.allclose(untrained(clips), untrained(clips.flip(1)), atol=1e-4)


def test_the_command_measures_clips_real_ones_and_noise(run, net, monkeypatch, capsys):
    monkeypatch.setattr(fvd, "train_feature_net", lambda *args: net)
    call(fvd.main, run, "--num-prompts", 33)
    rows = json.loads((run / "fvd.json").read_text())["features"]
    assert list(rows) == ["clips", "real clips", "real, autoencoded", "noise"]
    assert rows["real clips"]["FVD-shapes"] < rows["noise"]["FVD-shapes"]
    assert "FVD-shapes  CLIPSIM-shapes" in capsys.readouterr().out
