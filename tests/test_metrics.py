"""A metric is checked where its value is known: by hand, a slow reference, another library."""

import math

import numpy as np
import pytest
import torch

import metrics
from metrics import (
    CAPTIONS,
    FeatureNet,
    accuracy,
    consistency,
    features_of,
    frechet_distance,
    load_feature_net,
    psnr,
    real_clips,
    ssim,
    text_similarity,
    train_feature_net,
)
from media.write import write_clip
from shapes import COMBINATIONS


def wave(n, d, phase):
    """Features (n, d) without a pattern, the same with every library."""
    return np.sin(np.arange(n * d).reshape(n, d) ** 1.5 + phase)


def gaussian(n, d, seed, rank=None):
    """Correlated features (n, d) of some rank."""
    rng = np.random.default_rng(seed)
    return rng.standard_normal((n, rank or d)) @ rng.standard_normal((rank or d, d))


def images(seed, shape=(2, 3, 14, 17)):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# Images


def test_psnr_of_a_tenth_of_the_range_is_twenty_decibel():
    a = torch.zeros(2, 3, 4, 5)
    b = torch.stack([torch.full((3, 4, 5), 0.2), torch.full((3, 4, 5), -0.02)])
    assert psnr(a, b).tolist() == pytest.approx([20, 40])


def test_psnr_of_equal_images_is_infinite():
    assert psnr(images(0), images(0)).tolist() == [math.inf] * 2


def slow_ssim(a, b):
    """Window by window, with loops."""
    weights = np.array([
        [math.exp(-(y**2 + x**2) / (2 * 1.5**2)) for x in range(-5, 6)] for y in range(-5, 6)
    ])
    weights /= weights.sum()
    values = []
    for c in range(a.shape[0]):
        for y in range(a.shape[1] - 10):
            for x in range(a.shape[2] - 10):
                p, q = a[c, y : y + 11, x : x + 11], b[c, y : y + 11, x : x + 11]
                mp, mq = (weights * p).sum(), (weights * q).sum()
                vp, vq = (weights * (p - mp) ** 2).sum(), (weights * (q - mq) ** 2).sum()
                cov = (weights * (p - mp) * (q - mq)).sum()
                values.append(
                    (2 * mp * mq + 0.0004) * (2 * cov + 0.0036)
                    / ((mp**2 + mq**2 + 0.0004) * (vp + vq + 0.0036))
                )
    return np.mean(values)


def test_ssim_is_that_of_loops():
    a, b = 2 * images(0) - 1, (images(0) + images(1)) - 1
    expected = [slow_ssim(x.numpy(), y.numpy()) for x, y in zip(a, b, strict=True)]
    assert ssim(a, b).tolist() == pytest.approx(expected, rel=1e-9)


def test_ssim_is_that_of_scikit_image():
    """0.26.0: gaussian_weights, sigma=1.5, use_sample_covariance=False, data_range=2."""
    a = wave(3 * 13, 16, 0).reshape(1, 3, 13, 16)
    b = 0.7 * a + 0.3 * wave(3 * 13, 16, 2).reshape(1, 3, 13, 16)
    value = ssim(torch.from_numpy(a), torch.from_numpy(b)).item()
    assert value == pytest.approx(0.7411430232307666, abs=1e-12)


def test_ssim_of_two_grays_compares_their_luminance():
    a, b = torch.full((1, 3, 12, 12), 0.5), torch.full((1, 3, 12, 12), 0.25)
    expected = (2 * 0.5 * 0.25 + 0.0004) / (0.5**2 + 0.25**2 + 0.0004)
    assert ssim(a, b).item() == pytest.approx(expected)
    assert ssim(a, a).item() == pytest.approx(1)


def test_an_image_smaller_than_the_window_is_refused():
    with pytest.raises(ValueError, match=">= 11 x 11 pixels, got .*10, 12"):
        ssim(torch.zeros(1, 3, 10, 12), torch.zeros(1, 3, 10, 12))


# Consistency


def test_a_frozen_clip_has_consistency_one():
    assert consistency(images(0)[:, None].expand(-1, 4, -1, -1, -1)).tolist() == [1, 1]


def test_frames_that_turn_to_their_negative_are_minus_one():
    frame = 2 * images(0) - 1
    frame = frame - frame.mean((2, 3), keepdim=True)
    assert consistency(torch.stack([frame, -frame, frame], 1)).tolist() == pytest.approx([-1, -1])


def test_independent_frames_have_nothing_in_common():
    clips = images(0, (2, 6, 3, 40, 40))
    clips = clips + torch.tensor([1.0, 0.0, -1.0])[:, None, None]  # a common colour is nothing
    assert consistency(clips).tolist() == pytest.approx([0, 0], abs=0.03)


def test_a_value_by_hand():
    """Two frames of two pixels: 0, 4 and 2, 4. Change 2, variance 2.75 around 2.5."""
    clip = torch.tensor([[0.0, 4.0], [2.0, 4.0]]).reshape(1, 2, 1, 1, 2)
    assert consistency(clip).item() == pytest.approx(1 - 2 / (2 * 2.75))


def test_a_blank_clip_is_consistent():
    assert consistency(torch.full((1, 3, 3, 4, 4), 0.3)).item() == 1


def test_real_clips_are_consistent_until_their_frames_are_shuffled():
    clips = real_clips(8, 8, 32, seed=0)
    real, shuffled = consistency(clips), consistency(clips[:, [3, 0, 5, 2, 7, 1, 6, 4]])
    assert (real > 0.8).all() and (shuffled < 0.7).all()


def test_an_image_has_no_consistency():
    with pytest.raises(ValueError, match="clips of >= 2 frames"):
        consistency(torch.zeros(2, 1, 3, 4, 4))


# Frechet distance


def test_frechet_distance_by_hand():
    """One feature: means 1 and 5, variances 2 and 12: 16 + 2 + 12 - 2 sqrt(24)."""
    assert frechet_distance([[0], [2]], [[3], [3], [9]]) == pytest.approx(30 - 2 * math.sqrt(24))


def test_frechet_distance_is_that_of_scipy():
    """|mu|^2 + tr(C_a + C_b - 2 scipy.linalg.sqrtm(C_a @ C_b)) with scipy and np.cov."""
    value = frechet_distance(wave(20, 4, 0), 2 * wave(9, 4, 1) + 1)
    assert value == pytest.approx(6.997675905993054, rel=1e-12)


@pytest.mark.parametrize("d", [2, 7, 32, 64])
def test_frechet_distance_is_that_of_eigenvalues(d):
    a, b = gaussian(d + 1, d, 0), gaussian(3 * d, d, 1) + 0.3
    ca, cb = np.cov(a.T), np.cov(b.T)
    root = np.sqrt(np.linalg.eigvals(ca @ cb).astype(complex)).sum().real
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(ca + cb) - 2 * root
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-6)


def test_features_that_span_few_directions_have_the_distance_of_those():
    rotation = np.linalg.qr(gaussian(16, 16, 2))[0][:5]  # five directions of sixteen
    a, b = gaussian(60, 5, 0), gaussian(50, 5, 1) + 1
    assert frechet_distance(a @ rotation, b @ rotation) == pytest.approx(
        frechet_distance(a, b), rel=1e-9
    )


def test_a_set_is_at_no_distance_from_itself():
    a = gaussian(40, 8, 0, rank=3)
    assert 0 <= frechet_distance(a, a) < 1e-9


def test_features_in_float32_far_from_zero_lose_nothing():
    a, b = (torch.from_numpy(gaussian(20, 4, seed)).float() + 4096 for seed in (0, 1))
    near = frechet_distance(a.double() - 4096, b.double() - 4096)
    assert frechet_distance(a, b) == pytest.approx(near, rel=1e-9)


@pytest.mark.parametrize("n, m", [(8, 30), (30, 8)])
def test_too_few_samples_are_refused_with_the_number_needed(n, m):
    with pytest.raises(ValueError, match=">= 9 samples of 8 features"):
        frechet_distance(gaussian(n, 8, 0), gaussian(m, 8, 1))


def test_features_of_two_nets_are_refused():
    with pytest.raises(ValueError, match="features in both sets"):
        frechet_distance(gaussian(20, 4, 0), gaussian(20, 5, 1))


# Features


def test_text_similarity_is_the_mean_cosine():
    clips, texts = torch.tensor([[3.0, 4.0], [0.0, -2.0]]), torch.tensor([[6.0, 8.0], [1.0, 1.0]])
    expected = (1 - math.sqrt(0.5)) / 2
    assert text_similarity(clips, texts) == pytest.approx(expected)


def test_any_callable_is_a_net():
    clips = list(images(0, (5, 4, 3, 6, 7)))
    features = features_of(lambda batch: batch.mean((1, 3, 4)), clips, batch_size=2)
    assert torch.equal(features, torch.stack(clips).mean((1, 3, 4)))


@pytest.fixture(scope="module")
def net():
    """Trained for a moment, on clips of three frames."""
    return train_feature_net(3, 16, num_steps=30)


def test_a_text_is_the_sum_of_its_words(net):
    ids = [metrics.WORDS.index(word) for word in ("blue", "square", "left")]
    feature = net.text_features(["a red dog", "a blue square moving left"])[1]
    assert torch.equal(feature, net.words[ids].sum(0))


def test_a_text_without_a_known_word_is_refused(net):
    with pytest.raises(ValueError, match="needs one of the words red, .*; got 'a dog'"):
        net.text_features(["a red dog", "a dog"])


def test_thirty_steps_of_training_recognise_colours_and_directions(net):
    """By chance 17 and 25 %; after 800 steps, at 8 frames of 32 x 32, all are 100 %."""
    right = accuracy(net, 144)
    assert right["colour"] > 80 and right["direction"] > 80
    assert right["all"] <= min(right["colour"], right["shape"], right["direction"])


def test_similarity_prefers_the_right_text(net):
    features, texts = features_of(net, real_clips(72, 3, 16, 9)), net.text_features(CAPTIONS)
    assert text_similarity(features, texts) > 0.3 + text_similarity(features, texts.roll(5, 0))


def test_features_have_variance_one(net):
    assert features_of(net, real_clips(720, 3, 16, 0)).std().item() == pytest.approx(1, abs=1e-3)


def test_frozen_clips_are_farther_from_real_ones_than_real_ones_are(net):
    real, other = real_clips(144, 3, 16, 1), real_clips(144, 3, 16, 2)
    a, b, frozen = (features_of(net, x) for x in (real, other, other[:, :1].expand_as(other)))
    assert frechet_distance(a, frozen) > 5 * frechet_distance(a, b)


def test_the_seed_decides_the_net_and_nothing_else_does():
    torch.manual_seed(1)
    state = torch.get_rng_state()
    a = train_feature_net(3, 16, seed=4, num_steps=4)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    b, c = (train_feature_net(3, 16, seed=seed, num_steps=4) for seed in (4, 5))
    assert torch.equal(a.words, b.words) and not torch.equal(a.words, c.words)


def test_a_net_is_trained_once_and_kept(tmp_path, net, monkeypatch):
    calls = []
    monkeypatch.setattr(metrics, "train_feature_net", lambda *a, **k: calls.append(a) or net)
    nets = [load_feature_net(tmp_path / "net.safetensors", 3, 16) for _ in range(2)]
    clips = real_clips(4, 3, 16, 0)
    assert calls == [(3, 16)] and torch.equal(nets[0](clips), nets[1](clips))
    assert not any(parameter.requires_grad for parameter in nets[1].parameters())


def test_a_net_for_other_clips_is_refused(tmp_path, net):
    metrics.save_safetensors(tmp_path / "net.safetensors", net.state_dict())
    with pytest.raises(ValueError, match="8 frames of 16 pixels, got 3 of 16"):
        load_feature_net(tmp_path / "net.safetensors", 8, 16)


def test_another_file_is_no_net(tmp_path):
    metrics.save_safetensors(tmp_path / "other.safetensors", {"weight": torch.ones(2)})
    write_clip(tmp_path / "clip.png", torch.zeros(1, 3, 4, 4))
    with pytest.raises(ValueError, match="other.safetensors: not a feature net"):
        load_feature_net(tmp_path / "other.safetensors", 3, 16)
    with pytest.raises(ValueError, match="clip.png: not a whole safetensors file"):
        load_feature_net(tmp_path / "clip.png", 3, 16)


def test_a_net_sees_the_direction_of_time():
    torch.manual_seed(0)
    clips = real_clips(2, 4, 16, 0)
    untrained = FeatureNet(4, 16)
    assert not torch.allclose(untrained(clips), untrained(clips.flip(1)), atol=1e-4)


def test_a_mean_over_clips_is_that_of_all_at_once():
    a, b = images(0, (4, 3, 3, 12, 13)), images(1, (4, 3, 3, 12, 13))
    assert metrics.mean_over_clips(psnr, a, b) == pytest.approx(
        psnr(a.flatten(0, 1), b.flatten(0, 1)).mean().item()
    )


def test_quality_compares_each_source_with_other_real_clips():
    prompts = COMBINATIONS[:40]
    real = real_clips(40, 2, 16, 0, prompts)
    others = real_clips(40, 2, 16, 1, prompts)
    sources = {"real clips": real, "real, autoencoded": 0.9 * real, "others": others}

    def net(clips):
        return 100 * clips.mean((3, 4)).flatten(1)  # b t c h w -> b (t c)

    net.name = "means"
    net.text_features = lambda texts: torch.tensor([[1.0, 0, 0, 0, 0, 0]]).expand(len(texts), 6)
    result = metrics.evaluate_quality(sources, prompts, 0, net)
    assert result["others"]["FVD-means"] == 0 < result["real clips"]["FVD-means"]
    assert result["others"]["CLIPSIM-means"] == pytest.approx(
        text_similarity(net(others), net.text_features(prompts)), abs=1e-4
    )
    assert result["others"]["consistency"] == pytest.approx(
        consistency(others).mean().item(), abs=1e-4
    )
    assert result["real, autoencoded"]["PSNR"] == pytest.approx(
        np.mean([psnr(clip, 0.9 * clip).mean().item() for clip in real]), abs=0.01
    )
