"""Two processes, as torchrun starts them: their step is that of one process with both batches."""

import multiprocessing
import os
import socket

import torch
from torch import nn

import processes


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))


def gradient(batches, net, wrapped):
    """The gradient of the mean loss of batches, of which the last one exchanges."""
    for i, x in enumerate(batches):
        processes.average_gradients([wrapped], i == len(batches) - 1)
        (wrapped(x).square().mean() / len(batches)).backward()
    return [parameter.grad for parameter in net.parameters()]


def work(rank, port, batches, queue):
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2",
                   "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    device = processes.start("cpu")
    assert processes.start("cpu") == device  # a second call joins nothing
    net = network()
    own = gradient(batches[2 * rank : 2 * rank + 2], net, processes.wrap(net))
    queue.put((rank, processes.rank_and_count(), [g.tolist() for g in own]))
    processes.barrier()


def test_two_processes_have_the_gradient_of_one_with_both_batches():
    batches = list(torch.randn(4, 6, 5, generator=torch.Generator().manual_seed(1)))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    spawn = multiprocessing.get_context("spawn")
    queue = spawn.Queue()
    started = [spawn.Process(target=work, args=(rank, port, batches, queue)) for rank in (0, 1)]
    for process in started:
        process.start()
    results = sorted(queue.get(timeout=300) for _ in started)
    for process in started:
        process.join()
    net = network()
    expected = gradient(batches, net, net)
    for rank, place, found in results:
        assert place == (rank, 2)
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(torch.tensor(a), b)


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
    assert joined == [(("nccl",), {"device_id": torch.device("cuda", 3)})]
