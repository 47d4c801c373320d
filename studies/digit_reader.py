"""Read the digit and the motion of clips in which a handwritten digit moves (digits.py).

`train_reader` learns digits from real ones and never sees a drawn clip. The motion is the path of
the digit's centre of mass, without a network.
"""

import torch
import torch.nn.functional as F
from torch import nn

from training.run import progress

MOTIONS = {"left then right": (-1, 0), "right then left": (1, 0),  # first direction; y points down
           "up then down": (0, -1), "down then up": (0, 1)}
HAZE = 0.2  # brightness of [0, 1] that does not count, because an autoencoder's black is not exact
MIN_TRAVEL = 2.5  # pixels there, and back; in real clips two steps of two pixels or more
LEARNING_RATE = 4e-3


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
