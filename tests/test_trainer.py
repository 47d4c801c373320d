"""The training loop by itself, on a line y = a x + b that takes no time to fit."""

import json
import math
import signal

import pytest
import torch
from conftest import metrics_of
from torch import nn

import trainer
from options import TrainOptions
from trainer import Average, Metrics, Plan, Trainer, learning_rate_at, step_generator


class Line(nn.Module):
    """Fits y = a x + b; b learns at a tenth of the rate."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Parameter(torch.tensor(0.5)), nn.Parameter(torch.tensor(0.0))

    def parameter_groups(self):
        return [([self.a], 1.0), ([self.b], 0.1)]

    def forward(self, x, y):
        return (self.a * x + self.b - y).square().mean()


def points(step, micro=0):
    x = torch.randn(4, generator=step_generator(0, "line", step, micro))
    return x, 3 * x + 2


def line_trainer(path, make_batch=points, num_steps=6, **options):
    path.mkdir(exist_ok=True)
    plan = Plan("vae", num_steps, 0.1, Line(), make_batch, lambda step: None)
    options = TrainOptions(log_every=2, save_every=2, warmup_steps=0, **options)
    return Trainer(path, plan, options, torch.device("cpu"))


def test_the_learning_rate_rises_and_falls_as_worked_out_by_hand():
    rates = [learning_rate_at(step, 100, 2.0, 10) for step in (0, 4, 9, 50, 99)]
    assert rates == pytest.approx([
        0.2, 1.0 * (0.5 + 0.5 * math.cos(0.04 * math.pi)), 1 + math.cos(0.09 * math.pi), 1.0,
        1 + math.cos(0.99 * math.pi),
    ])


def test_without_warm_up_the_first_rate_is_the_peak():
    assert learning_rate_at(0, 100, 2.0, 0) == 2.0


def test_each_group_learns_at_its_part_of_the_rate(tmp_path):
    trainer = line_trainer(tmp_path, num_steps=1, weight_decay=0.0)
    trainer.run()
    # AdamW's first step is the learning rate, whatever the gradient; the average takes 0.9 of it.
    a, b = (parameter.item() for parameter in trainer.parameters)
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


def test_the_average_can_stand_in_for_the_weights_and_leaves_again():
    parameter = nn.Parameter(torch.tensor([1.0]))
    average = Average([parameter], decay=0.5)
    parameter.data.fill_(7.0)
    with pytest.raises(KeyError), average.swapped():
        assert parameter.item() == 1.0
        raise KeyError
    assert parameter.item() == 7.0


def test_a_stage_ends_with_the_weights_of_the_average(tmp_path):
    trainer = line_trainer(tmp_path)
    trainer.run()
    state = torch.load(trainer.state_path)
    assert [p.item() for p in trainer.parameters] == [p.item() for p in state["average"]]
    assert state["average"] != state["parameters"]


def test_accumulated_batches_make_the_step_of_one_large_batch(tmp_path):
    def both(step, micro):
        return [torch.cat(pair) for pair in zip(points(step, 0), points(step, 1), strict=True)]

    halves = line_trainer(tmp_path / "2", points, accumulate=2)
    whole = line_trainer(tmp_path / "1", both)
    halves.run(), whole.run()
    a, b = ([value.item() for value in each.average.values] for each in (halves, whole))
    assert a == pytest.approx(b, rel=1e-4)
    assert metrics_of(tmp_path / "2")[-1]["loss"] == pytest.approx(
        metrics_of(tmp_path / "1")[-1]["loss"], rel=1e-5
    )


def test_gradients_are_clipped(tmp_path):
    trainer = line_trainer(tmp_path, num_steps=1, gradient_clip=0.5)
    norms, step = [], trainer.optimizer.step
    trainer.optimizer.step = lambda: (
        norms.append(torch.stack([p.grad for p in trainer.parameters]).norm().item()), step()
    )
    trainer.run()
    assert norms == pytest.approx([0.5], rel=1e-4)


def test_metrics_have_the_mean_loss_of_each_interval(tmp_path, monkeypatch):
    seen, forward = [], Line.forward
    monkeypatch.setattr(Line, "forward", lambda *a: seen.append(forward(*a)) or seen[-1])
    line_trainer(tmp_path, num_steps=5).run()
    means = [(seen[0] + seen[1]) / 2, (seen[2] + seen[3]) / 2, seen[4]]
    entries = metrics_of(tmp_path)
    assert [entry["step"] for entry in entries] == [2, 4, 5]
    assert [entry["loss"] for entry in entries] == pytest.approx([m.item() for m in means])


def test_a_resume_drops_the_lines_of_the_steps_that_it_repeats(tmp_path):
    lines = [
        {"stage": "vae", "step": 9}, {"stage": "image", "step": 2}, {"stage": "image", "step": 4},
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "metrics.jsonl").write_text(text + '{"stage": "image", "st')  # cut by a kill
    Metrics(tmp_path / "metrics.jsonl", "image", 2)
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
        monkeypatch.setattr(trainer, "processes", lambda rank=rank: (rank, 3))
        draws |= {step_generator(0, "vae", step).initial_seed() for step in range(4)}
    assert len(draws) == 12


def test_the_handlers_of_signals_are_those_from_before_again(tmp_path):
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    line_trainer(tmp_path).run()
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_weights_that_are_not_finite_are_not_saved_whatever_the_loss(tmp_path):
    trainer = line_trainer(tmp_path)
    trainer.save_state()
    before = trainer.state_path.read_bytes()
    trainer.parameters[1].data.fill_(math.inf)
    with pytest.raises(ValueError, match="the model of the vae stage is not finite"):
        trainer.save_state()
    assert trainer.state_path.read_bytes() == before
