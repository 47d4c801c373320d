"""In what a device computes: one rule for training, previews, encoding and sampling.

On a GPU with bfloat16 in hardware, networks compute in it. There are two ways to get there:

    precision(device)         weights stay float32, each call casts them: for networks that learn
    freeze(network, device)   weights become bfloat16 once: for networks that do not

What surrounds the networks (noise, guidance, the sampler's steps, losses, optimizer) is float32.
"""

from contextlib import contextmanager

import torch

# That decoding takes for each pixel: 1,300 were counted in bfloat16; float32 and workspaces add.
PIXEL_BYTES = 4096


def uses_bf16(device, choice="auto"):
    """Whether networks compute in bfloat16 on a device; choice: "auto", "bf16" or "fp32"."""
    if torch.device(device).type != "cuda" or choice == "fp32":
        return False
    # GPUs before Ampere only emulate it, which is slower than float32.
    return choice == "bf16" or torch.cuda.is_bf16_supported(including_emulation=False)


def precision(device, choice="auto"):
    """A context in which networks with float32 weights compute in what `uses_bf16` says."""
    kind = torch.device(device).type
    return torch.autocast(kind, torch.bfloat16, enabled=uses_bf16(device, choice))


def freeze(network, device, choice="auto"):
    """Move a network to a device, for use without gradients; returns it."""
    network.to(device, torch.bfloat16 if uses_bf16(device, choice) else None)
    if torch.device(device).type != "cpu":  # a GPU convolves faster with channels innermost
        network.to(memory_format=torch.channels_last)
    return network.eval().requires_grad_(False)


def free_bytes(device):
    """Bytes that new tensors may take of a GPU's memory, those that PyTorch keeps for them too."""
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def frames_at_once(x, pixels, most):
    """How many of the frames of x, of so many pixels each, go through an autoencoder at once.

    On a CPU those of `most` pixels, on a GPU those that half of its free memory has room for.
    """
    if not x.is_cuda:
        return max(1, most // pixels)
    if torch.is_grad_enabled():  # the activations of all are stored anyway
        return len(x)
    room = max(1, free_bytes(x.device) // 2 // (PIXEL_BYTES * pixels))
    return 2 ** (room.bit_length() - 1)  # few sizes: cuDNN looks for the best kernels of each


@contextmanager
def visit(networks, device):
    """Inside, networks are on the device, otherwise in CPU memory."""
    for network in networks:
        network.to(device)
    try:
        yield
    finally:
        for network in networks:
            network.to("cpu")


def compile_for_sampling(network, device):
    """Compile a frozen network in place, each shape by itself: minutes at the first call."""
    if torch.device(device).type == "cuda":  # CUDA graphs: a step is launched as a whole
        network.compile(mode="reduce-overhead", dynamic=False)
    else:  # freezing lays the weights out once for a CPU's kernels
        network.compile(options={"freezing": True}, dynamic=False)
