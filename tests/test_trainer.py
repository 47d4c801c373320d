"""The training loop by itself, on a line y = a x + b that takes no time to fit."""

import json
import math
import signal
from types import SimpleNamespace

import pytest
import torch
from helpers import metrics_of
from torch import nn

import processes
import trainer
from memory import Plan
from options import TrainOptions
from trainer import (Average, Stopped, Trainer, drop_repeated, learning_rate_at, move_moments,
                     step_generator, step_in_parts)


def points(generator):
    x = torch.randn(4, generator=generator)
    return x, 3 * x + 2


class Line(Trainer):
    """Fits y = a x + b; b learns at a tenth of the rate."""

    def __init__(self, path, draw=points, num_steps=6, **options):
        path.mkdir(exist_ok=True)
        options = TrainOptions(log_every=2, save_every=2, warmup_steps=0, vae_steps=num_steps,
                               vae_learning_rate=0.1, **options)
        run = SimpleNamespace(path=path, options=options, device=torch.device("cpu"), state=None,
                              plan=lambda stage: Plan(moments_on_cpu=options.offload))
        self.a, self.b = nn.Parameter(torch.tensor(0.5)), nn.Parameter(torch.tensor(0.0))
        self.draw, self.losses = draw, []
        super().__init__(run, "vae", [([self.a], 1.0), ([self.b], 0.1)])

    def run(self, preview=None):
        for _, generator in self.steps(preview):
            x, y = self.draw(generator)
            self.losses.append((self.a * x + self.b - y).square().mean())
            self.backward(self.losses[-1])


def test_a_disk_without_room_for_two_states_is_refused_at_once(tmp_path, monkeypatch):
    for free in (64, 63):  # two numbers of 4 bytes: weights, average and two moments, twice
        def usage(path, free=free):
            assert path == tmp_path  # a folder may be a disk of its own
            return SimpleNamespace(free=free)

        monkeypatch.setattr("shutil.disk_usage", usage)
        if free == 64:
            Line(tmp_path)
    with pytest.raises(ValueError, match="needs 64 bytes of disk, got 63; make room"):
        Line(tmp_path)


def test_the_learning_rate_rises_and_falls_as_worked_out_by_hand():
    rates = [learning_rate_at(step, 100, 2.0, 10) for step in (0, 4, 9, 50, 99)]
    assert rates == pytest.approx([
        0.2, 1.0 * (0.5 + 0.5 * math.cos(0.04 * math.pi)), 1 + math.cos(0.09 * math.pi), 1.0,
        1 + math.cos(0.99 * math.pi),
    ])


def test_without_warm_up_the_first_rate_is_the_peak():
    assert learning_rate_at(0, 100, 2.0, 0) == 2.0


def test_each_group_learns_at_its_part_of_the_rate(tmp_path, monkeypatch):
    monkeypatch.setattr(trainer, "WEIGHT_DECAY", 0.0)
    line = Line(tmp_path, num_steps=1)
    line.run()
    # AdamW's first step is the learning rate, whatever the gradient; the average takes 0.9 of it.
    a, b = (parameter.item() for parameter in line.parameters)
    assert (abs(a - 0.5), abs(b)) == pytest.approx((0.9 * 0.1, 0.9 * 0.01), rel=1e-4)


def test_the_average_equals_a_loop_by_hand():
    parameter, expected = nn.Parameter(torch.tensor([1.0])), 1.0
    average = Average([parameter], decay=0.4)
    for step, value in enumerate([2.0, -1.0, 5.0, 3.0, 0.0, 4.0, 1.0]):
        parameter.data.fill_(value)
        average.update(step)
        decay = [1 / 10, 2 / 11, 3 / 12, 4 / 13, 5 / 14, 0.4, 0.4][step]  # warms up until 0.4
        expected = decay * expected + (1 - decay) * value
    assert average.values[0].item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("on_cpu", [False, True])
def test_an_average_of_every_fourth_step_is_the_closed_form(on_cpu):
    parameter = nn.Parameter(torch.tensor([1.0]))
    average = Average([parameter], decay=0.4, every=4, on_cpu=on_cpu)
    values = [2.0, -1.0, 5.0, 3.0, 0.0, 4.0, 1.0, -2.0, 7.0]
    for step, value in enumerate(values):
        parameter.data.fill_(value)
        average.update(step)
    # Steps 3 and 7 count, with the decays 4 / 13 and 0.4 to the fourth power.
    early, late = (4 / 13) ** 4, 0.4**4
    expected = late * (early * 1.0 + (1 - early) * 3.0) + (1 - late) * -2.0
    assert average.values[0].item() == pytest.approx(expected, rel=1e-6)


def test_an_average_in_cpu_memory_is_the_same():
    parameters = [nn.Parameter(torch.randn(3, 5)), nn.Parameter(torch.randn(7))]
    averages = [Average(parameters, 0.9, 1, on_cpu) for on_cpu in (False, True)]
    for step in range(3):
        for parameter in parameters:
            parameter.data.normal_()
        for average in averages:
            average.update(step)
    for a, b in zip(*(average.values for average in averages), strict=True):
        assert torch.equal(a, b)


def test_a_step_in_parts_is_the_step(monkeypatch):
    monkeypatch.setattr(trainer, "PART", 2)
    weights = [torch.randn(3, 5), torch.randn(7), torch.randn(2, 2), torch.randn(4)]
    copies = [[nn.Parameter(weight.clone()) for weight in weights] for _ in range(2)]
    optimizers = [torch.optim.AdamW([{"params": each[:3]}, {"params": each[3:], "lr": 0.1}],
                                    lr=0.01, fused=True) for each in copies]
    seen = []
    monkeypatch.setattr(trainer, "move_moments",
                        lambda optimizer, part, device: seen.append((len(part), str(device))))
    for step in range(3):
        for a, b in zip(*copies, strict=True):
            a.grad = torch.randn(a.shape)
            b.grad = a.grad.clone()
        optimizers[0].step()
        step_in_parts(optimizers[1])
    for a, b in zip(*copies, strict=True):
        assert torch.equal(a, b)
    assert seen == 3 * [(2, "cpu"), (2, "cpu"), (1, "cpu"), (1, "cpu"), (1, "cpu"), (1, "cpu")]
    assert [len(group["params"]) for group in optimizers[1].param_groups] == [3, 1]


def test_moments_move_and_the_count_of_steps_stays():
    parameter = nn.Parameter(torch.zeros(3))
    parameter.grad = torch.ones(3)
    optimizer = torch.optim.AdamW([parameter])
    move_moments(optimizer, [parameter], "meta")  # before the first step there are none
    optimizer.step()
    move_moments(optimizer, [parameter], "meta")
    state = optimizer.state[parameter]
    assert state["exp_avg"].is_meta and state["exp_avg_sq"].is_meta and not state["step"].is_meta


def test_offloaded_moments_lead_to_the_same_weights(tmp_path):
    lines = [Line(tmp_path / str(offload), offload=offload) for offload in (False, True)]
    for line in lines:
        line.run()
    a, b = ([p.item() for p in line.parameters] for line in lines)
    assert a == b


def test_the_average_can_stand_in_for_the_weights_and_leaves_again():
    parameter = nn.Parameter(torch.tensor([1.0]))
    average = Average([parameter], decay=0.5)
    parameter.data.fill_(7.0)
    with pytest.raises(KeyError), average.swapped():
        assert parameter.item() == 1.0
        raise KeyError
    assert parameter.item() == 7.0


def test_a_stage_ends_with_the_weights_of_the_average(tmp_path):
    line = Line(tmp_path)
    line.run()
    state = torch.load(line.state_path)
    assert [p.item() for p in line.parameters] == [p.item() for p in state["average"]]
    assert state["average"] != state["parameters"]


def test_accumulated_batches_make_the_step_of_one_large_batch(tmp_path):
    halves = Line(tmp_path / "2", accumulate=2)
    steps = iter(range(100))

    def both(_):
        step = next(steps)
        pair = [points(step_generator(0, "vae", step, micro)) for micro in (0, 1)]
        return [torch.cat(parts) for parts in zip(*pair, strict=True)]

    whole = Line(tmp_path / "1", both)
    halves.run(), whole.run()
    a, b = ([value.item() for value in each.average.values] for each in (halves, whole))
    assert a == pytest.approx(b, rel=1e-4)
    assert metrics_of(tmp_path / "2")[-1]["loss"] == pytest.approx(
        metrics_of(tmp_path / "1")[-1]["loss"], rel=1e-5
    )


def test_gradients_are_clipped(tmp_path):
    line = Line(tmp_path, num_steps=1)
    norms, step = [], line.optimizer.step
    line.optimizer.step = lambda: (
        norms.append(torch.stack([p.grad for p in line.parameters]).norm().item()), step()
    )
    line.run()
    assert norms == pytest.approx([1.0], rel=1e-4)


def test_metrics_have_the_mean_loss_of_each_interval(tmp_path):
    line = Line(tmp_path, num_steps=5)
    line.run()
    seen = [loss.item() for loss in line.losses]
    means = [(seen[0] + seen[1]) / 2, (seen[2] + seen[3]) / 2, seen[4]]
    entries = metrics_of(tmp_path)
    assert [entry["step"] for entry in entries] == [2, 4, 5]
    assert [entry["loss"] for entry in entries] == pytest.approx(means)


def test_a_stop_draws_the_preview_of_its_step(tmp_path, monkeypatch):
    # A resume goes on behind the saved step, so the preview would be lost.
    state, seen = tmp_path / "training_state.pt", []
    monkeypatch.setattr(Line, "_stopping", lambda self, _: self.step == 2)
    with pytest.raises(Stopped):
        Line(tmp_path, preview_every=2).run(lambda step: seen.append((step, state.exists())))
    assert seen == [(2, True)]  # saved first: a preview that fails costs no step


def test_a_signal_in_the_last_step_stops_several_processes_too(tmp_path, monkeypatch):
    def draw(generator):
        if line.step == 4:
            signal.raise_signal(signal.SIGTERM)
        return points(generator)

    monkeypatch.setattr(processes, "rank_and_count", lambda: (0, 2))
    monkeypatch.setattr(processes, "mean", lambda value: value.item())
    line = Line(tmp_path, draw, num_steps=5)
    with pytest.raises(Stopped, match="stopped at step 5"):
        line.run()


def test_a_resume_drops_the_lines_of_the_steps_that_it_repeats(tmp_path):
    lines = [
        {"stage": "vae", "step": 9}, {"stage": "image", "step": 2}, {"stage": "image", "step": 4},
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "metrics.jsonl").write_text(text + '{"stage": "image", "st')  # cut by a kill
    drop_repeated(tmp_path / "metrics.jsonl", "image", 2)
    assert metrics_of(tmp_path) == lines[:2]


def test_a_batch_depends_on_seed_stage_step_and_micro_batch_alone():
    def draw(*key):
        return torch.randn(3, generator=step_generator(*key)).tolist()

    keys = [(0, "vae", 1, 0), (1, "vae", 1, 0), (0, "image", 1, 0), (0, "vae", 2, 0),
            (0, "vae", 1, 1)]
    draws = [draw(*key) for key in keys]
    assert draws == [draw(*key) for key in keys]
    assert len({tuple(values) for values in draws}) == len(keys)


def test_processes_draw_different_batches(monkeypatch):
    draws = set()
    for rank in range(3):
        monkeypatch.setattr(processes, "rank_and_count", lambda rank=rank: (rank, 3))
        draws |= {step_generator(0, "vae", step).initial_seed() for step in range(4)}
    assert len(draws) == 12


def test_the_handlers_of_signals_are_those_from_before_again(tmp_path):
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    Line(tmp_path).run()
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_weights_that_are_not_finite_are_not_saved_whatever_the_loss(tmp_path):
    line = Line(tmp_path)
    line.save_state()
    before = line.state_path.read_bytes()
    line.parameters[1].data.fill_(math.inf)
    with pytest.raises(ValueError, match="the model of the vae stage is not finite"):
        line.save_state()
    assert line.state_path.read_bytes() == before


class Half(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([1.5]))

    def forward(self, x):
        return x * self.weight / 2


def test_a_compiled_network_learns_the_same_under_its_own_names(tmp_path, monkeypatch):
    compile_, graphs, learned = nn.Module.compile, [], []

    def backend(graph, inputs):  # dynamo's graphs and guards, no C++ compiler
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(nn.Module, "compile",
                        lambda module, **options: compile_(module, backend=backend, **options))
    for wanted in (False, True):
        line = Line(tmp_path / str(wanted), compile=wanted)
        network = Half()
        forward = line.wrap(network)
        for rows in (4, 3):
            forward(torch.ones(rows, 1)).square().mean().backward()
        learned.append({name: network.get_parameter(name).grad for name in network.state_dict()})
        assert len(graphs) == 2 * wanted  # one for each shape
    assert learned[0] == learned[1] == {"weight": torch.tensor([1.5 / 2 * 2])}


def adamw(value, gradients, rates, decay, betas):
    """Loshchilov & Hutter 2019, algorithm 2, for one number."""
    m = v = 0.0
    for i, (gradient, rate) in enumerate(zip(gradients, rates, strict=True), start=1):
        m = betas[0] * m + (1 - betas[0]) * gradient
        v = betas[1] * v + (1 - betas[1]) * gradient**2
        update = (m / (1 - betas[0] ** i)) / (math.sqrt(v / (1 - betas[1] ** i)) + 1e-8)
        value -= rate * decay * value + rate * update
    return value


def test_the_weights_are_those_of_adamw_by_hand(tmp_path):
    line, gradients = Line(tmp_path, num_steps=5), []
    step = line.optimizer.step
    line.optimizer.step = lambda: (
        gradients.append([p.grad.item() for p in line.parameters]), step())
    line.run()
    rates = [learning_rate_at(i, 5, 0.1, 0) for i in range(5)]
    saved = torch.load(line.state_path)["parameters"]
    for number, (start, part) in enumerate([(0.5, 1.0), (0.0, 0.1)]):
        expected = adamw(start, [both[number] for both in gradients],
                         [part * rate for rate in rates], decay=0.01, betas=(0.9, 0.99))
        assert saved[number].item() == pytest.approx(expected, rel=1e-5)


def test_a_resume_needs_room_for_a_model_beside_its_state(tmp_path, monkeypatch):
    line = Line(tmp_path)
    line.run()
    state = torch.load(line.state_path)

    def resume(free):  # weights, average and two moments of two numbers: 32 bytes, and a quarter
        monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=free))
        run = SimpleNamespace(path=tmp_path, options=line.options, device=line.device, state=state,
                              plan=lambda stage: Plan())
        groups = [([nn.Parameter(torch.zeros(()))], part) for part in (1.0, 0.1)]
        return Trainer(run, "vae", groups)

    assert resume(40).step == 6
    with pytest.raises(ValueError, match="needs 40 bytes of disk, got 39"):
        resume(39)
