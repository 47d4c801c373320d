"""How good are clips? Distances between features, fidelity of images, steadiness over time.

    Frechet distance   of two sets of clips: |mu_a - mu_b|^2 + tr(C_a + C_b - 2 sqrt(C_a C_b)), the
                       distance of two Gaussians fitted to their features (FID, Heusel et al. 2017,
                       eq. 6; on clips FVD, Unterthiner et al. 2018)
    text similarity    of clips and their texts: the cosine of their features (CLIPSIM, Wu et al.
                       2021, there with OpenAI's CLIP)
    PSNR, SSIM         of an image and its reconstruction (SSIM: Wang et al. 2004)
    consistency        of a clip: how much successive frames have in common

The first two are as good as the net that makes the features, and numbers of different nets do not
compare. So a net has a name, which is a part of the metric's: `FeatureNet`, a small CLIP of
MovingShapes, gives FVD-shapes and CLIPSIM-shapes. Another net is any callable with a `name` that
takes clips (b, t, 3, h, w) in [-1, 1] to features (b, d).
"""

import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from files import load_safetensors, save_safetensors
from shapes import COLOURS, COMBINATIONS, DIRECTIONS, SHAPES, MovingShapes, caption_of

# 97.5 % quantiles of Student's t with 2, 3, ... 20 degrees of freedom: NIST/SEMATECH e-Handbook of
# Statistical Methods, table 1.3.6.7.2.
T_QUANTILES = (
    4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201,
    2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086,
)
WORDS = [*COLOURS, *SHAPES, *DIRECTIONS]
CAPTIONS = [caption_of(*combination) for combination in COMBINATIONS]
NUM_FEATURES = 32  # of a FeatureNet; a distance needs more clips than that
SHARPNESS = 20.0  # cosines become logits; they lie within 1 of each other, logits should not
HELD_OUT_SEED = 10_000  # added to the training's: the clips that a net's accuracy is counted on


def interval(values):
    """(mean, low, high) of one value per seed: Student's 95 % interval of the mean.

    It says how far another set of seeds may land, given that seeds scatter like a Gaussian; values
    that are all alike (three times 100 %) give no width, which is not certainty. Beyond 21 values
    it stays a little too wide.

    Raises:
        ValueError: if there are fewer than 3 values.
    """
    if len(values) < 3:
        raise ValueError(f"interval needs values of >= 3 seeds, got {len(values)}")
    mean, deviation = float(np.mean(values)), float(np.std(values, ddof=1))
    quantile = T_QUANTILES[min(len(values) - 3, len(T_QUANTILES) - 1)]
    half = quantile * deviation / math.sqrt(len(values))
    return mean, mean - half, mean + half


# Images and clips


def psnr(a, b):
    """Peak signal-to-noise ratio in dB of images (n, c, h, w) in [-1, 1]: (n,), float64."""
    error = (a.double() - b.double()).square().mean((1, 2, 3))
    return 10 * torch.log10(2**2 / error)  # 2: the largest difference there is


def ssim(a, b):
    """Structural similarity of images (n, c, h, w) in [-1, 1], at most 1: (n,), float64.

    Means, variances and covariance under a Gaussian window of 11 x 11 pixels, deviation 1.5, where
    it fits in whole; averaged over places and channels. Wang et al. 2004, eq. 13 and section III.C.

    Raises:
        ValueError: if images are smaller than the window.
    """
    if min(a.shape[-2:]) < 11:
        raise ValueError(f"ssim needs images of at least 11 x 11 pixels, got {tuple(a.shape)}")
    bell = torch.exp(-((torch.arange(11, device=a.device, dtype=torch.float64) - 5) ** 2) / 4.5)
    window = (torch.outer(bell, bell) / bell.sum() ** 2)[None, None]

    def blur(x):
        return F.conv2d(x.flatten(0, 1)[:, None], window).unflatten(0, x.shape[:2])[:, :, 0]

    a, b = a.double(), b.double()
    mean_a, mean_b = blur(a), blur(b)
    variances = blur(a * a) - mean_a**2 + blur(b * b) - mean_b**2
    covariance = blur(a * b) - mean_a * mean_b
    c1, c2 = (0.01 * 2) ** 2, (0.03 * 2) ** 2  # K1 and K2 times the range of values
    light = (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1)
    structure = (2 * covariance + c2) / (variances + c2)
    return (light * structure).mean((1, 2, 3))


def consistency(clips):
    """How much successive frames of clips (b, t, c, h, w) have in common: (b,), float64.

    1 - mean |f_{i+1} - f_i|^2 / (2 variance), the variance that of all pixels around the clip's
    mean colour: 1 if nothing changes, 0 if frames are independent. More is not better: a frozen
    clip has 1. Real clips say what to aim at; less than theirs is flicker.

    Raises:
        ValueError: if clips have one frame.
    """
    if clips.shape[1] < 2:
        raise ValueError(f"consistency needs clips of >= 2 frames, got {tuple(clips.shape)}")
    clips = clips.double()
    changes = clips.diff(dim=1).square().mean((1, 2, 3, 4))
    variance = (clips - clips.mean((1, 3, 4), keepdim=True)).square().mean((1, 2, 3, 4))
    return 1 - changes / (2 * variance).clamp(min=1e-12)  # a blank clip has neither


# Features


def frechet_distance(a, b):
    """Squared Frechet distance of the Gaussians fitted to features a (n, d) and b (m, d).

    With C_a = A'A and C_b = B'B, where A and B are d x d (from the QR of the centred features), the
    eigenvalues of C_a C_b are the squared singular values of A B', so the trace of its root is
    their sum: no root of a matrix, no tiny eigenvalue below zero, exact for any rank.
    Few samples make it too large, by about as much as two halves of one set are apart.

    Raises:
        ValueError: if a set has no more than d samples, with which its covariance is singular.
    """
    a, b = (np.asarray(x, dtype=np.float64) for x in (a, b))
    d = a.shape[1]
    if b.shape[1] != d or min(len(a), len(b)) <= d:
        raise ValueError(f"frechet_distance needs at least {d + 1} samples of {d} features on both "
                         f"sides, got {a.shape} and {b.shape}")

    def root(x):
        return np.linalg.qr((x - x.mean(0)) / math.sqrt(len(x) - 1), mode="r")

    root_a, root_b = root(a), root(b)
    shared = np.linalg.svd(root_a @ root_b.T, compute_uv=False).sum()
    means = ((a.mean(0) - b.mean(0)) ** 2).sum()
    distance = means + (root_a**2).sum() + (root_b**2).sum() - 2 * shared
    return max(0.0, float(distance))  # rounding may bring a set a hair too close to itself


def text_similarity(clip_features, text_features):
    """Mean cosine of clips' and their texts' features, both (n, d): in [-1, 1]."""
    clip_features, text_features = clip_features.double(), text_features.double()
    return F.cosine_similarity(clip_features, text_features, dim=1).mean().item()


class FeatureNet(nn.Module):
    """A small CLIP of MovingShapes, whose clips it classifies by colour, shape and direction.

    A clip's feature is the mean of a 3-D convolution network over time and space; a text's is the
    sum of a vector for each word that names a colour, a shape or a direction. It only knows what
    was trained: its similarity says whether the three words fit, and nothing about beauty.
    """

    name = "shapes"

    def __init__(self, num_frames, image_size, width=NUM_FEATURES):
        super().__init__()
        self.register_buffer("trained_for", torch.tensor([num_frames, image_size]))
        widths, layers = (3, 16, 32, 64), []
        for i, (a, b) in enumerate(zip(widths, widths[1:], strict=False)):
            stride = (1 if i == 0 else 2, 2, 2)  # the first sees each step of the motion
            convolution = nn.Conv3d(a, b, 3, stride, padding=1)
            layers += [convolution, nn.GroupNorm(8, b), nn.SiLU()]
        self.layers = nn.Sequential(*layers)
        self.project = nn.Linear(widths[-1], width)
        self.words = nn.Parameter(torch.randn(len(WORDS), width) / math.sqrt(width))

    def forward(self, clips):
        """Features (b, width) of clips (b, t, 3, h, w) in [-1, 1], moved to the net's device."""
        x = self.layers(clips.to(self.words).transpose(1, 2))  # b t c h w -> b c t h w
        return self.project(x.mean((2, 3, 4)))

    def text_features(self, texts):
        """Features (n, width) of n texts. Raises ValueError if one has none of the known words."""
        known = [[WORDS.index(word) for word in text.split() if word in WORDS] for text in texts]
        if [] in known:
            raise ValueError(
                f"text needs a word of {', '.join(WORDS)}; got {texts[known.index([])]!r}"
            )
        return torch.stack([self.words[ids].sum(0) for ids in known])

    def similarity(self, clips):
        """Cosines (b, 72) of clips with all captions that there are."""
        texts = F.normalize(self.text_features(CAPTIONS), dim=1)
        return F.normalize(self(clips), dim=1) @ texts.T


@torch.no_grad()
def features_of(net, clips, batch_size=64):
    """Features (n, d), on the CPU, of a sequence of n clips (t, 3, h, w) in [-1, 1]."""
    starts = range(0, len(clips), batch_size)
    return torch.cat([net(torch.stack(list(clips[i : i + batch_size]))).cpu() for i in starts])


def real_clips(num_clips, num_frames, image_size, seed, combinations=COMBINATIONS):
    """MovingShapes as clips (n, t, 3, h, w) in [-1, 1]."""
    data = MovingShapes(num_clips, num_frames, image_size, seed, combinations)
    return torch.stack([data[i][0] for i in range(num_clips)]) / 127.5 - 1


def train_feature_net(num_frames, image_size, seed=0, num_steps=800, device="cpu", progress=iter):
    """Train a FeatureNet: which of the 72 captions, held-out ones too, is a clip's (CLIP's loss).

    Half a minute on two cores at 8 frames of 32 x 32. progress wraps the steps, such as tqdm.
    """
    if num_frames < 2:
        raise ValueError(f"train_feature_net needs num_frames >= 2, got {num_frames}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = FeatureNet(num_frames, image_size).to(device)
    batch_size, learning_rate = 36, 3e-3  # half of the captions at a time
    optimizer = torch.optim.AdamW(net.parameters(), lr=learning_rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, num_steps)
    data = MovingShapes(num_steps * batch_size, num_frames, image_size, seed, COMBINATIONS)
    for step in progress(range(num_steps)):
        batch = range(step * batch_size, (step + 1) * batch_size)  # no clip is seen twice
        clips = torch.stack([data[i][0] for i in batch]).to(device) / 127.5 - 1
        answers = torch.tensor(batch, device=device) % len(CAPTIONS)
        loss = F.cross_entropy(SHARPNESS * net.similarity(clips), answers)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    net.eval().requires_grad_(False)
    # The loss does not see how long features are. With variance 1, distances of nets are alike.
    features = features_of(net, real_clips(720, num_frames, image_size, seed))
    net.project.weight /= features.std()
    net.project.bias /= features.std()
    return net


@torch.no_grad()
def accuracy(net, num_clips=720):
    """Percentages of held-out clips whose colour, shape, direction and all three a net sees."""
    num_frames, image_size = net.trained_for.tolist()
    clips = real_clips(num_clips, num_frames, image_size, HELD_OUT_SEED)
    best = torch.cat([net.similarity(part).argmax(1).cpu() for part in clips.split(64)]).tolist()
    right = np.array([
        [a == b for a, b in zip(COMBINATIONS[i], COMBINATIONS[n % len(COMBINATIONS)], strict=True)]
        for n, i in enumerate(best)
    ])
    parts = [*right.mean(0), right.all(1).mean()]
    names = ("colour", "shape", "direction", "all")
    return {name: round(100 * float(part), 1) for name, part in zip(names, parts, strict=True)}


def load_feature_net(path, num_frames, image_size, device="cpu", progress=iter):
    """The FeatureNet of a safetensors file; if there is none, it is trained and written first.

    Raises:
        ValueError: if the file holds something else, or a net for other clips.
    """
    if not Path(path).exists():
        net = train_feature_net(num_frames, image_size, device=device, progress=progress)
        save_safetensors(path, net.state_dict())
        return net
    net, tensors = FeatureNet(num_frames, image_size), load_safetensors(path)
    shapes = {name: tensor.shape for name, tensor in net.state_dict().items()}
    if {name: tensor.shape for name, tensor in tensors.items()} != shapes:
        raise ValueError(f"{path}: no feature net; remove it or name another file")
    if tensors["trained_for"].tolist() != [num_frames, image_size]:
        raise ValueError(f"{path}: for {tensors['trained_for'].tolist()} frames and pixels, needs "
                         f"{[num_frames, image_size]}; name another file")
    net.load_state_dict(tensors)
    return net.to(device).eval().requires_grad_(False)


# Tables of clips from several sources


def mean_over_clips(measure, *clips):
    """The mean of a measure, clip by clip: float64 copies of all at once would fill the memory."""
    return np.mean([measure(*parts).mean().item() for parts in zip(*clips, strict=True)])


def evaluate_quality(sources, prompts, seed, net=None):
    """{source: {measure: value}} of sources {name: clips (n, t, 3, h, w)} of combinations.

    "real clips" and "real, autoencoded" are among the sources. With a net, its distance is the one
    to other real clips of the same combinations.

    Raises:
        ValueError: if there are too few clips for a distance.
    """
    result = {name: {} for name in sources}
    real, coded = sources["real clips"], sources["real, autoencoded"]
    num_clips, num_frames, _, image_size, _ = real.shape
    for name, clips in sources.items():
        if num_frames > 1:
            steady = mean_over_clips(consistency, clips[:, None])  # [:, None]: batches of one clip
            result[name]["consistency"] = round(steady, 4)
    result["real, autoencoded"] |= {
        "PSNR": round(mean_over_clips(psnr, real, coded), 2),
        "SSIM": round(mean_over_clips(ssim, real, coded), 4),
    }
    if net is not None:
        others = features_of(net, real_clips(num_clips, num_frames, image_size, seed + 1, prompts))
        texts = net.text_features([caption_of(*prompt) for prompt in prompts]).cpu()
        for name, clips in sources.items():
            features = features_of(net, clips)
            result[name][f"FVD-{net.name}"] = round(frechet_distance(features, others), 3)
            result[name][f"CLIPSIM-{net.name}"] = round(text_similarity(features, texts), 4)
    return result
