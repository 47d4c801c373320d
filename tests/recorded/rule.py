"""Weights and inputs made by a rule, so that a recording needs to hold outputs only."""

import hashlib
import json
import re

import numpy as np
import torch

SMALL = ("conv_in", "conv1", "conv2", "_out")  # matrices with these in their names are made small


def fill(module):
    """Give a network, here or in another library, weights that depend on its names and shapes only.

    NumPy promises never to change RandomState's numbers. Matrices have standard deviation
    1 / sqrt(fan in). Biases and matrices that write into the residual stream are 30 times smaller,
    so the variance of a GroupNorm's input is near its eps, and a wrong eps changes the output.
    """
    random = np.random.RandomState(0)
    state = module.state_dict()
    for name in sorted(state):
        shape = tuple(state[name].shape)
        values = torch.from_numpy(random.standard_normal(shape))
        if len(shape) == 1:
            state[name].copy_(0.03 * values + ("norm" in name and name.endswith("weight")))
        else:
            gain = 0.03 if any(part in name for part in SMALL) else 1.0
            state[name].copy_(gain * values / np.prod(shape[1:]) ** 0.5)
    return module


def checkpoint(shapes):
    """{name: tensor} of a single file, by the same rule, from {prefix: {name: shape}}."""
    shapes = {prefix + name: part[name] for prefix, part in shapes.items() for name in part}
    random, tensors = np.random.RandomState(0), {}
    norm = re.compile(r"norm|\.ln_|in_layers\.0|out_layers\.0|\.out\.0\.")
    small = re.compile(r"_layers\.[23]|blocks\.0\.0\.|conv_in|conv1|conv2|to_out|proj_out")
    for name in sorted(shapes):
        shape = tuple(shapes[name])
        values = torch.from_numpy(random.standard_normal(shape)).float()
        if norm.search(name) or len(shape) < 2:
            values = 0.03 * values + bool(norm.search(name) and name.endswith("weight"))
        else:
            values = values * ((0.03 if small.search(name) else 1.0) / np.prod(shape[1:]) ** 0.5)
        tensors[name] = values.float()
    return tensors


def normal(*shape, seed=1):
    """Gaussian numbers of a seed."""
    return torch.from_numpy(np.random.RandomState(seed).standard_normal(shape)).float()


def probe(x):
    """Mean and deviation of a tensor, then 16 of its values, evenly spread."""
    x = x.detach().double().flatten()
    return torch.stack([x.mean(), x.std(), *x[:: len(x) // 16][:16]])


def signature(module):
    """Number of parameters, and a hash of their names and shapes."""
    state = sorted((name, list(value.shape)) for name, value in module.state_dict().items())
    digest = hashlib.sha256(json.dumps(state).encode()).hexdigest()
    return {"parameters": sum(p.numel() for p in module.parameters()), "names": digest}
