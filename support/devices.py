"""Devices: where networks compute, in which precision, and with how many processes.

On a GPU with bfloat16 in hardware, networks compute in it. There are two ways to get there:

    precision(device)         weights stay float32 and each call casts them, for networks that learn
    freeze(network, device)   weights become bfloat16 once, for networks that do not

Everything around the networks (noise, guidance, sampler steps, losses, optimizer) is float32.

`torchrun --nproc-per-node N train.py ...` starts the same script N times. Each process trains on
its own batches, PyTorch averages the gradients, and only the first process prints and writes.
Without torchrun, the functions of the last part have no effect.
"""

import os
from contextlib import contextmanager
from datetime import timedelta

import torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

PART = 8  # parameters whose moments are on the GPU at the same time with --offload


def choose_device(name):
    """The torch.device of a --device flag. Raises ValueError if it is not usable."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:  # the latter from a PyTorch built without CUDA
        raise ValueError(f"--device {name}: not usable ({str(error).splitlines()[0]})") from None
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True  # shapes repeat, so cuDNN may try all its kernels
        torch.set_float32_matmul_precision("high")  # TF32 for products that stay float32
    return device


def uses_bf16(device, choice="auto"):
    """Whether networks compute in bfloat16 on a device; choice: "auto", "bf16" or "fp32"."""
    if torch.device(device).type != "cuda" or choice == "fp32":
        return False
    if choice == "bf16":
        return True
    with torch.cuda.device(device):  # GPUs before Ampere only emulate it, more slowly than float32
        return torch.cuda.is_bf16_supported(including_emulation=False)


def precision(device, choice="auto"):
    """A context in which networks with float32 weights compute in bfloat16 if `uses_bf16`."""
    kind = torch.device(device).type
    return torch.autocast(kind, torch.bfloat16, enabled=uses_bf16(device, choice))


def freeze(network, device, choice="auto"):
    """Move a network to a device, in bfloat16 if `uses_bf16`, without gradients; returns it."""
    network.to(device, torch.bfloat16 if uses_bf16(device, choice) else None)
    if torch.device(device).type != "cpu":  # a GPU convolves faster with channels innermost
        network.to(memory_format=torch.channels_last)
    return network.eval().requires_grad_(False)


@contextmanager
def visit(networks, device):
    """A context in which networks are on the device; afterwards they are in CPU memory again."""
    for network in networks:
        network.to(device)
    try:
        yield
    finally:
        for network in networks:
            network.to("cpu")


def compile_for_sampling(network, device):
    """Compile a frozen network in place, for each shape separately; takes minutes per shape."""
    if torch.device(device).type == "cuda":  # CUDA graphs launch a whole step at once
        network.compile(mode="reduce-overhead", dynamic=False)
    else:  # freezing lays the weights out once for a CPU's kernels
        network.compile(options={"freezing": True}, dynamic=False)


# AdamW's moments in CPU memory (--offload)


def step_in_parts(optimizer):
    """optimizer.step() with moments in CPU memory, which visit the GPU a few parameters at a time.

    The results are the same. The copies are queued on the GPU, so the CPU does not wait for them.
    """
    groups = optimizer.param_groups
    for group in groups:
        for i in range(0, len(group["params"]), PART):
            part = group["params"][i : i + PART]  # a few parameters
            move_moments(optimizer, part, part[0].device)
            optimizer.param_groups = [group | {"params": part}]
            optimizer.step()
            move_moments(optimizer, part, "cpu")
    optimizer.param_groups = groups  # all parameters again


def move_moments(optimizer, parameters, device):
    """Move AdamW's moments of some parameters, if they exist yet."""
    for parameter in parameters:
        state = optimizer.state[parameter]
        for name in ("exp_avg", "exp_avg_sq"):
            if name in state:
                state[name] = state[name].to(device, non_blocking=True)


# Several processes


def start(name):
    """Join the processes that torchrun started, if any. Returns this one's torch.device."""
    if "RANK" not in os.environ:
        return choose_device(name)
    if "LOCAL_RANK" not in os.environ:
        raise ValueError("RANK is set without LOCAL_RANK; start with torchrun, or unset RANK")
    if name in ("auto", "cuda") and torch.cuda.is_available():
        name = f"cuda:{os.environ['LOCAL_RANK']}"  # each process has its own GPU
        torch.cuda.set_device(name)
    device = choose_device(name)
    if not distributed.is_initialized():
        # The others wait while the first process encodes a cache or draws previews, which may take
        # longer than NCCL's usual limit of ten minutes.
        distributed.init_process_group("nccl" if device.type == "cuda" else "gloo",
                                       timeout=timedelta(hours=24))
    return device


def rank_and_count():
    """(index of this process, number of processes)."""
    if distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1


def is_main():
    """Whether this process is the one that prints and writes."""
    return rank_and_count()[0] == 0


def barrier():
    """Wait until all processes are here."""
    if distributed.is_initialized():
        distributed.barrier()


def mean(value):
    """The mean over all processes of a tensor of one number, as a float."""
    value = value.clone()
    if distributed.is_initialized():
        distributed.all_reduce(value)
    return value.item() / rank_and_count()[1]


def wrap(network):
    """The network as a training step calls it, so that all processes average its gradients."""
    if not distributed.is_initialized():
        return network
    # A step on images skips the temporal layers (temporal.py), which then get no gradient.
    skipped = any("temporal" in name for name, _ in network.named_parameters())
    return DistributedDataParallel(network, find_unused_parameters=skipped,
                                   gradient_as_bucket_view=True)
