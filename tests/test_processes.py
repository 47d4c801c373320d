"""Two processes, as torchrun starts them: their step is that of one with both batches."""

import multiprocessing
import os
import socket

import pytest
import torch
from helpers import build_unet, unet_inputs
from torch import nn

import processes

BATCHES = list(torch.randn(4, 6, 5, generator=torch.Generator().manual_seed(1)))
FRAMES = 1, 3, 1  # a step on images, one on clips, one on images


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))


def gradient(batches, net, wrapped):
    """The gradient of the mean loss of batches, of which the last one exchanges."""
    for i, x in enumerate(batches):
        processes.average_gradients([wrapped], i == len(batches) - 1)
        (wrapped(x).square().mean() / len(batches)).backward()
    return [parameter.grad for parameter in net.parameters()]


def unet_gradients(place):
    """{name: gradient} of a U-Net's steps on images and clips, of one of two or on both."""
    unet = build_unet(block_out_channels=(8,), attention_levels=(False,), temporal="conv")
    wrapped, found = processes.wrap(unet), []
    for t in FRAMES:
        wrapped(*(x[place] for x in unet_inputs(b=2, t=t, h=4, w=4))).square().mean().backward()
        found.append({name: p.grad.tolist() for name, p in unet.named_parameters()
                      if p.grad is not None})
        unet.zero_grad()
    return found


def work(rank, port, queue):
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2",
                   "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    device = processes.start("cpu")
    assert processes.start("cpu") == device  # a second call joins nothing
    net = network()
    own = gradient(BATCHES[2 * rank : 2 * rank + 2], net, processes.wrap(net))
    value = torch.tensor(3.0 + 4 * rank)
    queue.put((rank, processes.rank_and_count(), [g.tolist() for g in own],
               (processes.mean(value), value.item()), unet_gradients(slice(rank, rank + 1))))
    processes.barrier()


@pytest.fixture(scope="module")
def results():
    """What two processes found: (rank, place, gradient, (mean, value), gradients of a U-Net)."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    spawn = multiprocessing.get_context("spawn")
    queue = spawn.Queue()
    started = [spawn.Process(target=work, args=(rank, port, queue)) for rank in (0, 1)]
    for process in started:
        process.start()
    results = sorted(queue.get(timeout=300) for _ in started)
    for process in started:
        process.join()
    return results


def test_two_processes_have_the_gradient_of_one_with_both_batches(results):
    net = network()
    expected = gradient(BATCHES, net, net)
    for rank, place, found, *_ in results:
        assert place == (rank, 2)
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(torch.tensor(a), b)


def test_the_mean_is_that_of_all_processes_and_changes_no_value(results):
    assert [means for *_, means, _ in results] == [(5.0, 3.0), (5.0, 7.0)]


def test_a_step_on_images_skips_the_temporal_layers_in_all_processes(results):
    expected = unet_gradients(slice(None))
    for *_, found in results:
        for t, gradients, whole in zip(FRAMES, found, expected, strict=True):
            assert gradients.keys() == whole.keys()
            assert any("temporal" in name for name in whole) == (t > 1)
            for name, values in whole.items():
                torch.testing.assert_close(torch.tensor(gradients[name]), torch.tensor(values))


def test_of_several_gpus_each_process_touches_its_own(monkeypatch):
    touched = []
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", lambda name: touched.append(name))
    monkeypatch.setattr(processes, "choose_device",
                        lambda name: touched.append(name) or torch.device(name))
    joined = []
    monkeypatch.setattr(processes.distributed, "init_process_group",
                        lambda *args, **options: joined.append((args, options)))
    assert processes.start("auto") == torch.device("cuda", 3)
    assert touched == ["cuda:3", "cuda:3"]
    (((backend,), options),) = joined
    assert (backend, options["device_id"]) == ("nccl", torch.device("cuda", 3))
    assert options["timeout"].total_seconds() >= 3600  # previews of a large model take minutes
