"""Metrics of clips: distances between features, fidelity of images, consistency over time.

    Frechet distance   of two sets of clips: |mu_a - mu_b|^2 + tr(C_a + C_b - 2 sqrt(C_a C_b)) of
                       Gaussians fitted to their features (FID, Heusel et al. 2017, eq. 6; on clips
                       FVD, Unterthiner et al. 2018)
    text similarity    the cosine of features of clips and texts (CLIPSIM, Wu et al. 2021)
    PSNR, SSIM         of an image and its reconstruction (SSIM: Wang et al. 2004)
    consistency        of a clip: how little successive frames differ

Values of different feature networks do not compare, so the network's name is part of the metric's
name: `FeatureNet`, a small CLIP for MovingShapes, gives FVD-shapes and CLIPSIM-shapes.
"""

import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from files import load_safetensors, save_safetensors
from shapes import COLOURS, COMBINATIONS, DIRECTIONS, SHAPES, MovingShapes, caption_of

WORDS = [*COLOURS, *SHAPES, *DIRECTIONS]
CAPTIONS = [caption_of(*combination) for combination in COMBINATIONS]
NUM_FEATURES = 32  # of a FeatureNet; a Frechet distance needs more clips than features
SHARPNESS = 20.0  # logits per cosine: cosines lie in [-1, 1], too close together for a softmax
HELD_OUT_SEED = 10_000  # of the clips that measure a FeatureNet's accuracy; not a seed of training


def psnr(a, b):
    """Peak signal-to-noise ratio in dB of images (n, c, h, w) in [-1, 1]: (n,), float64."""
    error = (a.double() - b.double()).square().mean((1, 2, 3))
    return 10 * torch.log10(2**2 / error)  # 2: the largest possible difference


def ssim(a, b):
    """Structural similarity of images (n, c, h, w) in [-1, 1], at most 1: (n,), float64.

    Means, variances and covariance under a Gaussian window of 11 x 11 pixels, deviation 1.5, at all
    positions inside the image; averaged over positions and channels. Wang et al. 2004, eq. 13 and
    section III.C.
    """
    if min(a.shape[-2:]) < 11:
        raise ValueError(f"ssim needs images of >= 11 x 11 pixels, got {tuple(a.shape)}")
    bell = torch.exp(-((torch.arange(11, device=a.device, dtype=torch.float64) - 5) ** 2) / 4.5)
    window = (torch.outer(bell, bell) / bell.sum() ** 2)[None, None]

    def blur(x):
        return F.conv2d(x.flatten(0, 1)[:, None], window).unflatten(0, x.shape[:2])[:, :, 0]

    a, b = a.double(), b.double()
    mean_a, mean_b = blur(a), blur(b)
    variances = blur(a * a) - mean_a**2 + blur(b * b) - mean_b**2
    covariance = blur(a * b) - mean_a * mean_b
    c1, c2 = (0.01 * 2) ** 2, (0.03 * 2) ** 2  # (K L)^2, where L = 2 is the range of values
    luminance = (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1)
    structure = (2 * covariance + c2) / (variances + c2)
    return (luminance * structure).mean((1, 2, 3))


def consistency(clips):
    """How little successive frames of clips (b, t, c, h, w) differ: (b,), float64.

    1 - mean |f_{i+1} - f_i|^2 / (2 variance), with the variance of all pixels around the clip's
    mean colour: 1 if nothing changes, 0 if frames are independent. The value of real clips is the
    target: less is flicker, and a frozen clip has 1.
    """
    if clips.shape[1] < 2:
        raise ValueError(f"consistency needs clips of >= 2 frames, got {tuple(clips.shape)}")
    clips = clips.double()
    changes = clips.diff(dim=1).square().mean((1, 2, 3, 4))
    variance = (clips - clips.mean((1, 3, 4), keepdim=True)).square().mean((1, 2, 3, 4))
    return 1 - changes / (2 * variance).clamp(min=1e-12)  # a blank clip: 0 / 0


def frechet_distance(a, b):
    """Squared Frechet distance of the Gaussians fitted to features a (n, d) and b (m, d).

    With C_a = A'A and C_b = B'B, where A and B are d x d (from the QR of the centred features), the
    eigenvalues of C_a C_b are the squared singular values of A B', whose sum is the trace of the
    root: no matrix root, no negative eigenvalue, exact for any rank. With few samples the distance
    is too large, by about that of two halves of one set; <= d samples have a singular covariance.
    """
    a, b = (np.asarray(x, dtype=np.float64) for x in (a, b))
    d = a.shape[1]
    if b.shape[1] != d or min(len(a), len(b)) <= d:
        raise ValueError(f"frechet_distance needs >= {d + 1} samples of {d} features in both sets, "
                         f"got {a.shape} and {b.shape}")

    root_a, root_b = (np.linalg.qr((x - x.mean(0)) / math.sqrt(len(x) - 1), mode="r")
                      for x in (a, b))
    trace = np.linalg.svd(root_a @ root_b.T, compute_uv=False).sum()
    means = ((a.mean(0) - b.mean(0)) ** 2).sum()
    distance = means + (root_a**2).sum() + (root_b**2).sum() - 2 * trace
    return max(0.0, float(distance))  # rounding can make it slightly negative


def text_similarity(clip_features, text_features):
    """Mean cosine of the features of clips and of their texts, both (n, d): in [-1, 1]."""
    return F.cosine_similarity(clip_features.double(), text_features.double()).mean().item()


class FeatureNet(nn.Module):
    """A small CLIP for MovingShapes: features of clips, and of texts in the same space.

    A clip's feature is the mean of a 3-D convolutional network over time and space. A text's is the
    sum of one vector per word that names a colour, a shape or a direction. So their similarity says
    whether these three words fit, and nothing about image quality.
    """

    name = "shapes"

    def __init__(self, num_frames, image_size):
        super().__init__()
        self.register_buffer("trained_for", torch.tensor([num_frames, image_size]))
        layers = []
        for a, b, stride in (3, 16, 1), (16, 32, 2), (32, 64, 2):  # 1: to see each step of a motion
            conv = nn.Conv3d(a, b, 3, (stride, 2, 2), padding=1)
            layers += [conv, nn.GroupNorm(8, b), nn.SiLU()]
        self.layers = nn.Sequential(*layers)
        self.project = nn.Linear(64, NUM_FEATURES)
        words = torch.randn(len(WORDS), NUM_FEATURES)
        self.words = nn.Parameter(words / math.sqrt(NUM_FEATURES))

    def forward(self, clips):
        """Features (b, d) of clips (b, t, 3, h, w) in [-1, 1] on any device."""
        x = self.layers(clips.to(self.words).transpose(1, 2))  # b t c h w -> b c t h w
        return self.project(x.mean((2, 3, 4)))

    def text_features(self, texts):
        """Features (n, d) of n texts, each with at least one of the known words."""
        known = [[WORDS.index(word) for word in text.split() if word in WORDS] for text in texts]
        if [] in known:
            text = texts[known.index([])]
            raise ValueError(f"text needs one of the words {', '.join(WORDS)}; got {text!r}")
        return torch.stack([self.words[ids].sum(0) for ids in known])

    def similarity(self, clips):
        """Cosines (b, 72) of clips with all 72 captions."""
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
    """Train a FeatureNet to classify clips by caption, all 72 of them, with CLIP's loss.

    `progress` wraps the steps, as tqdm does.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = FeatureNet(num_frames, image_size).to(device)
    batch_size, learning_rate = 36, 3e-3  # 36: half of the captions
    optimizer = torch.optim.AdamW(net.parameters(), lr=learning_rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, num_steps)
    data = MovingShapes(num_steps * batch_size, num_frames, image_size, seed, COMBINATIONS)
    for step in progress(range(num_steps)):
        batch = range(step * batch_size, (step + 1) * batch_size)  # each clip is used once
        clips = torch.stack([data[i][0] for i in batch]).to(device) / 127.5 - 1
        answers = torch.tensor(batch, device=device) % len(CAPTIONS)
        loss = F.cross_entropy(SHARPNESS * net.similarity(clips), answers)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    net.eval().requires_grad_(False)
    # The loss ignores the length of features. Variance 1 makes distances of two nets comparable.
    deviation = features_of(net, real_clips(720, num_frames, image_size, seed)).std()
    net.project.weight /= deviation
    net.project.bias /= deviation
    return net


@torch.no_grad()
def accuracy(net, num_clips=720):
    """Percentage of held-out clips whose colour, shape, direction or all three a net recognises."""
    num_frames, image_size = net.trained_for.tolist()
    clips = real_clips(num_clips, num_frames, image_size, HELD_OUT_SEED)
    best = torch.cat([net.similarity(part).argmax(1).cpu() for part in clips.split(64)])
    words = np.array(COMBINATIONS)  # 72 x (colour, shape, direction)
    right = words[best] == words[np.arange(num_clips) % len(words)]
    parts = [*right.mean(0), right.all(1).mean()]
    names = ("colour", "shape", "direction", "all")
    return {name: round(100 * float(part), 1) for name, part in zip(names, parts, strict=True)}


def load_feature_net(path, num_frames, image_size, device="cpu", progress=iter):
    """The FeatureNet of a safetensors file; trains and writes it if the file does not exist."""
    if not Path(path).exists():
        net = train_feature_net(num_frames, image_size, device=device, progress=progress)
        save_safetensors(path, net.state_dict())
        return net
    net, tensors = FeatureNet(num_frames, image_size), load_safetensors(path)
    try:
        net.load_state_dict(tensors)
    except RuntimeError:  # other names or shapes
        raise ValueError(f"{path}: not a feature net; remove it or name another file") from None
    size = net.trained_for.tolist()
    if size != [num_frames, image_size]:
        raise ValueError(f"{path}: needs a net for {num_frames} frames of {image_size} pixels, got "
                         f"{size[0]} of {size[1]}; name another file")
    return net.to(device).eval().requires_grad_(False)


def mean_over_clips(measure, *clips):
    """The mean of a measure, one clip at a time, because float64 copies of all need much memory."""
    return np.mean([measure(*parts).mean().item() for parts in zip(*clips, strict=True)])


def evaluate_quality(sources, prompts, seed, net=None):
    """{source: {measure: value}} of sources {name: clips (n, t, 3, h, w)}.

    `prompts` are their n combinations. Sources include "real clips" and "real, autoencoded". With a
    net, adds the distance to other real clips of the same combinations and the text similarity.
    """
    result = {name: {} for name in sources}
    real, coded = sources["real clips"], sources["real, autoencoded"]
    num_clips, num_frames, _, image_size, _ = real.shape
    if num_frames > 1:
        for name, clips in sources.items():
            steady = mean_over_clips(consistency, clips[:, None])  # [:, None]: batches of one clip
            result[name]["consistency"] = round(steady, 4)
    result["real, autoencoded"] |= {"PSNR": round(mean_over_clips(psnr, real, coded), 2),
                                    "SSIM": round(mean_over_clips(ssim, real, coded), 4)}
    if net is not None:
        others = features_of(net, real_clips(num_clips, num_frames, image_size, seed + 1, prompts))
        texts = net.text_features([caption_of(*prompt) for prompt in prompts]).cpu()
        for name, clips in sources.items():
            features = features_of(net, clips)
            result[name][f"FVD-{net.name}"] = round(frechet_distance(features, others), 3)
            result[name][f"CLIPSIM-{net.name}"] = round(text_similarity(features, texts), 4)
    return result
