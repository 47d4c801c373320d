"""Do clips look like real ones, and do they show what the text says? Two measures of features.

    python -m studies.fvd runs/demo --num-prompts 512

    Frechet distance   of two sets of clips: |mu_a - mu_b|^2 + tr(C_a + C_b - 2 sqrt(C_a C_b)) of
                       Gaussians fitted to their features (FID, Heusel et al. 2017, eq. 6; of clips
                       FVD, Unterthiner et al. 2018)
    text similarity    the cosine of features of clips and texts (CLIPSIM, Wu et al. 2021)

Values of different feature networks are not comparable, so the measures here are named FVD-shapes
and CLIPSIM-shapes after `FeatureNet`, a small CLIP for MovingShapes. Each call trains it first, in
half a minute on two cores, always from the same seed.
"""

import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from checkpoints.weights import load_pipeline
from evaluate import choose_prompts, draw, print_table, real_clips, references
from shapes import COLOURS, COMBINATIONS, DIRECTIONS, SHAPES, MovingShapes, caption_of
from support.cli import Parser, number, run_main
from support.devices import choose_device
from support.files import write_json
from training.options import read_record

WORDS = [*COLOURS, *SHAPES, *DIRECTIONS]
CAPTIONS = [caption_of(*combination) for combination in COMBINATIONS]
NUM_FEATURES = 32  # features of a clip; a Frechet distance needs more clips than features
SEED = 1000  # seed of the first clip drawn, as in evaluate.py
SHARPNESS = 20.0  # logits per cosine, because cosines in [-1, 1] are too close for a softmax


def frechet_distance(a, b):
    """Squared Frechet distance of the Gaussians fitted to features a (n, d) and b (m, d); n, m > d.

    With C_a = A'A and C_b = B'B, where A and B are d x d (from the QR of the centred features), the
    eigenvalues of C_a C_b are the squared singular values of A B', whose sum is the trace of the
    root. So there is no matrix root and no negative eigenvalue. Few samples make the distance too
    large, by about the distance of two halves of one set.
    """
    a, b = (np.asarray(x, dtype=np.float64) for x in (a, b))
    root_a, root_b = (np.linalg.qr((x - x.mean(0)) / math.sqrt(len(x) - 1), mode="r")
                      for x in (a, b))
    trace = np.linalg.svd(root_a @ root_b.T, compute_uv=False).sum()
    means = ((a.mean(0) - b.mean(0)) ** 2).sum()
    distance = means + (root_a**2).sum() + (root_b**2).sum() - 2 * trace
    return max(0.0, float(distance))  # rounding can make it slightly negative


class FeatureNet(nn.Module):
    """A small CLIP for MovingShapes: features of clips, and of texts in the same space.

    A clip's feature is the mean of a 3-D convolutional network's output over time and space. A
    text's feature is the sum of one vector for each colour, shape or direction it names. So their
    similarity says whether these words fit the clip, and nothing about the quality of its frames.
    """

    def __init__(self):
        super().__init__()
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
        """Features (n, d) of n captions of MovingShapes."""
        known = [[WORDS.index(word) for word in text.split() if word in WORDS] for text in texts]
        return torch.stack([self.words[ids].sum(0) for ids in known])

    def similarity(self, clips):
        """Cosines (b, 72) of clips with all 72 captions."""
        texts = F.normalize(self.text_features(CAPTIONS), dim=1)
        return F.normalize(self(clips), dim=1) @ texts.T


@torch.no_grad()
def features_of(net, clips, batch_size=64):
    """Features (n, d), on the CPU, of clips (n, t, 3, h, w) in [-1, 1]."""
    return torch.cat([net(part).cpu() for part in clips.split(batch_size)])


def train_feature_net(num_frames, image_size, device="cpu", seed=0, num_steps=800):
    """Train a FeatureNet to classify clips by caption, all 72 of them, with CLIP's loss."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = FeatureNet().to(device)
    batch_size, learning_rate = 36, 3e-3  # 36: half of the captions
    optimizer = torch.optim.AdamW(net.parameters(), lr=learning_rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, num_steps)
    data = MovingShapes(num_steps * batch_size, num_frames, image_size, seed, COMBINATIONS)
    for step in tqdm(range(num_steps), "feature net", leave=False):
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


def measure_features(net, sources, prompts, seed):
    """{source: {measure: value}} of sources {name: clips (n, t, 3, h, w)} of n combinations.

    FVD-shapes is the distance to other real clips of the same combinations.
    """
    _, num_frames, _, image_size, _ = next(iter(sources.values())).shape
    others = features_of(net, real_clips(len(prompts), num_frames, image_size, seed + 1, prompts))
    texts = net.text_features([caption_of(*prompt) for prompt in prompts]).cpu()
    result = {}
    for name, clips in sources.items():
        features = features_of(net, clips)
        cosine = F.cosine_similarity(features, texts).mean().item()
        result[name] = {"FVD-shapes": round(frechet_distance(features, others), 3),
                        "CLIPSIM-shapes": round(cosine, 4)}
    return result


def main():
    parser = Parser(description="Distances of a run's clips from real ones and from their texts.")
    parser.add_argument("run", type=Path, metavar="RUN", help="finished run on MovingShapes")
    parser.add_argument("--num-prompts", type=number(int, NUM_FEATURES + 1), default=128,
                        help="clips to draw (default: 128)")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, ... (default: auto)")
    args = parser.parse_args()
    options, finished = read_record(args.run)
    if options.data != "shapes" or "video" not in finished:
        raise ValueError(f"{args.run}: needs a finished run on MovingShapes (--data shapes)")
    torch.set_flush_denormal(True)
    device = choose_device(args.device)
    pipeline = load_pipeline(args.run).to(device)
    size = pipeline.sampling.num_frames, pipeline.sampling.image_size
    net = train_feature_net(*size, device)
    prompts = choose_prompts(args.num_prompts)
    clips = draw(pipeline, prompts, size[0], SEED, batch_size=16)
    sources = {"clips": clips, **references(pipeline, prompts, SEED)}
    result = measure_features(net, sources, prompts, SEED)
    print_table("features", result)
    write_json(args.run / "fvd.json", {"num_prompts": args.num_prompts, "features": result})


if __name__ == "__main__":
    run_main(main)
