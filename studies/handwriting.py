"""Handwritten digits: the files of MNIST, and which digit moves how in a clip (digits.py).

`train_reader` learns digits from real ones and never sees a drawn clip. The motion is the path of
the digit's centre of mass, without a network.
"""

import gzip
import struct
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from training.run import progress

MOTIONS = {"left then right": (-1, 0), "right then left": (1, 0),  # first direction; y points down
           "up then down": (0, -1), "down then up": (0, 1)}
HAZE = 0.2  # brightness of [0, 1] that does not count, because an autoencoder's black is not exact
MIN_TRAVEL = 2.5  # pixels there, and back; in real clips two steps of two pixels or more
LEARNING_RATE = 4e-3


def read_idx(path):
    """The array in one of MNIST's files: bytes 0, 0, 8 and the number of axes, lengths, values."""
    with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
        data = file.read()
    shape = struct.unpack_from(f">{data[3]}i", data, 4) if data[:3] == b"\0\0\x08" else ()
    start = 4 + 4 * len(shape)
    if not shape or len(data) != start + np.prod(shape):
        raise ValueError(f"{path}: damaged, or not an idx file of bytes; download it again")
    return np.frombuffer(data, np.uint8, offset=start).reshape(shape)


def read_digits(mnist):
    """Images (n, h, w) uint8 and labels (n,)."""
    if mnist is None:
        try:
            from sklearn.datasets import load_digits
        except ImportError:
            raise ValueError("without --mnist, needs scikit-learn; install it with "
                             "`pip install -r studies/requirements.txt`") from None
        images, labels = load_digits(return_X_y=True)  # values from 0 to 16
        return (images.reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8), labels
    # By name without .gz, because torchvision leaves each file there twice.
    found = {path.name.removesuffix(".gz"): path for path in Path(mnist).rglob("*images*idx3*")}
    if not found:
        raise ValueError(f"{mnist}: needs MNIST's files train-images-idx3-ubyte and "
                         "train-labels-idx1-ubyte, also with .gz")
    parts = []
    for path in (found[name] for name in sorted(found)):
        name = path.name.replace("images", "labels").replace("idx3", "idx1")
        parts.append((read_idx(path), read_idx(path.with_name(name))))
    return tuple(np.concatenate(arrays) for arrays in zip(*parts, strict=True))


def centres_of(gray):
    """Centre of mass x, y (n,) of frames (n, h, w) in [0, 1], in pixels; NaN for black ones."""
    gray, axis = (gray - HAZE).clamp(min=0), torch.arange(gray.shape[-1]) + 0.5
    mass = gray.sum((1, 2))
    return (gray.sum(1) * axis).sum(1) / mass, (gray.sum(2) * axis).sum(1) / mass


def windows_of(gray, size):
    """Windows (n, 1, size, size) around the centres of mass of frames (n, h, w) in [0, 1]."""
    corners = torch.stack(centres_of(gray), dim=1).nan_to_num(gray.shape[-1] / 2).round().int()
    padded = F.pad(gray, [size // 2] * 4)
    return torch.stack([frame[None, y : y + size, x : x + size]
                        for frame, (x, y) in zip(padded, corners.tolist(), strict=True)])


def train_reader(images, labels, num_steps=600, batch_size=64):
    """A classifier of windows (n, 1, s, s) in [0, 1], from real digits (n, s, s) in [0, 1].

    It takes seconds on a CPU, and always learns the same.
    """
    windows = windows_of(images, images.shape[-1])  # n 1 s s, centred
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers = []
        for a, b in (1, 16), (16, 32), (32, 64):
            layers += [nn.Conv2d(a, b, 3, padding=1), nn.BatchNorm2d(b), nn.ReLU(), nn.MaxPool2d(2)]
        net = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(256, 10))
        optimizer = torch.optim.AdamW(net.parameters(), LEARNING_RATE)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, num_steps)
        for _ in progress(range(num_steps), "reader"):
            chosen = torch.randint(len(labels), (batch_size,))
            # Shift, turn and scale each digit by about a tenth, because there are few of them.
            change = torch.eye(2, 3) + 0.1 * torch.randn(batch_size, 2, 3)
            grid = F.affine_grid(change, (batch_size, 1, *images.shape[1:]), align_corners=False)
            x = F.grid_sample(windows[chosen], grid, align_corners=False)
            loss = F.cross_entropy(net(x), labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return net.eval().requires_grad_(False)


def recognise_motion(x, y):
    """The motion of centres x, y (t,), in pixels: there and back on one axis, otherwise None."""
    for name, (dx, dy) in MOTIONS.items():
        along, across = dx * x + dy * y, dy * x + dx * y
        turn = int(along.argmax())
        steps = along.diff()
        forward = torch.cat([steps[:turn], -steps[turn:]]) > 0  # t - 1, as it should be
        shorter = along[turn] - torch.maximum(along[0], along[-1])
        straight = across.max() - across.min() < (along.max() - along.min()) / 2
        if shorter > MIN_TRAVEL and straight and forward.float().mean() > 0.7:
            return name
    return None


def score(reader, clips, pairs, size):
    """{measure: percent} of clips (n, t, 3, h, w) in [-1, 1] that show the (digit, motion) asked.

    "digit" reads all frames of a clip together, "frames" each one by itself.
    """
    gray = (clips.mean(2) + 1) / 2  # n t h w
    scores = reader(windows_of(gray.flatten(0, 1), size)).log_softmax(1)
    scores = scores.unflatten(0, gray.shape[:2])  # n t 10
    asked = torch.tensor([digit for digit, _ in pairs])
    right = {"digit": scores.mean(1).argmax(1) == asked,  # n
             "frames": scores.argmax(2) == asked[:, None]}  # n t
    if clips.shape[1] > 1:  # an image has no motion
        right["motion"] = torch.tensor([recognise_motion(*centres_of(clip)) == name
                                        for clip, (_, name) in zip(gray, pairs, strict=True)])
        right["both"] = right["digit"] & right["motion"]
    return {"count": len(clips)} | {
        name: round(100 * values.float().mean().item(), 1) for name, values in right.items()}
