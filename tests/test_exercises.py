"""The grader of exercises/ accepts the project's own functions and refuses typical mistakes."""

import subprocess
import sys
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
from helpers import ROOT

from diffusion import Diffusion, classifier_free_guidance
from exercises.test_stubs import CASES, grade
from layers import ResnetBlock
from shift import temporal_shift
from temporal import AttentionOverTime, JointAttention
from tokenizer import CLIPTokenizer
from vae import DiagonalGaussian

# The grader's ALPHA_BAR, 0.64, 0.36 and 0; eps cannot be predicted at 0
V = Diffusion(3, prediction_type="v_prediction", trained_betas=(0.36, 0.4375, 1.0))
EPS = Diffusion(2, trained_betas=(0.36, 0.4375), set_alpha_to_one=True)


def frames_seen(frame, num_frames, num_blocks):
    blocks = [ResnetBlock(6, 6, 2, 1e-5, shifts=1) for _ in range(num_blocks)]
    x = torch.randn(1, num_frames, 6, 2, 2, requires_grad=True)
    torch.nn.Sequential(*blocks)(x)[:, frame].sum().backward()
    return x.grad.flatten(2).any(2).sum().item()  # the frames with a gradient


def ddim_step(x0, eps, _, t, t_prev, eta, noise):
    inputs = eps, EPS.add_noise(x0, eps, t), t, t_prev
    with patch("diffusion.randn", lambda *_: noise):
        return EPS.ddpm_step(*inputs) if eta == 1 else EPS.ddim_step(*inputs, eta)


OWN = SimpleNamespace(
    temporal_shift=temporal_shift, frames_seen=frames_seen, ddim_step=ddim_step,
    noise_and_target=lambda x0, eps, a, t: (V.add_noise(x0, eps, t), V.target(x0, eps, t)),
    predict_x0=lambda y, x_t, a, t, kind: (EPS if kind == "epsilon" else V).predict(y, x_t, t)[0],
    guided_prediction=lambda model, x, t, text, empty, scale: classifier_free_guidance(
        model(x, t, empty), model(x, t, text), scale),
    kl_divergence=lambda mean, logvar: DiagonalGaussian(mean, logvar).kl(),
    AttentionOverTime=lambda channels: AttentionOverTime(channels, 1),
    merge_word=lambda word, merges: [CLIPTokenizer(merges).tokens[i]
                                     for i in CLIPTokenizer(merges).encode(word)])
MISTAKES = [  # (function, a typical mistake, words of the grader's sentence)
    ("temporal_shift", lambda x: x.copy_(temporal_shift(x)), "in place"),
    ("temporal_shift", lambda x: temporal_shift(x.flip(2)).flip(2), "swap past and future"),
    ("frames_seen", lambda frame, t, n: 2 * n + 1, "before frame 0"),
    ("frames_seen", lambda frame, t, n: n + 1, "each side"),
    ("noise_and_target", lambda x0, eps, a, t: OWN.noise_and_target(eps, x0, a, t), "its root"),
    ("noise_and_target", lambda *x: OWN.noise_and_target(*x)[:1] * 2, "v should be"),
    ("predict_x0", lambda *x: OWN.predict_x0(*x[:4], "v_prediction"), "without noise"),
    ("predict_x0", lambda *x: OWN.predict_x0(*x[:4], "epsilon"), "from v"),
    ("ddim_step", lambda *x: ddim_step(*x[:4], x[4] % 2, *x[5:]), "the noisiest"),
    ("ddim_step", lambda *x: ddim_step(*x[:5], 0.0, x[6]), "should be DDPM"),
    ("guided_prediction", lambda *x: OWN.guided_prediction(*x[:5], x[5] + 1), "got 5"),
    ("guided_prediction", lambda *x: OWN.guided_prediction(*x[:3], x[4], x[3], x[5]), "got 1"),
    ("kl_divergence", lambda *x: OWN.kl_divergence(*x) / 42, "sum a half"),
    ("kl_divergence", lambda mean, logvar: OWN.kl_divergence(mean, 2 * logvar), "already"),
    ("AttentionOverTime", lambda channels: JointAttention(channels, 1), "not see each other"),
    ("AttentionOverTime", lambda channels: torch.nn.Linear(channels, channels), "should add 0"),
    ("merge_word", lambda *x: [y.removesuffix("</w>") for y in OWN.merge_word(*x)], "suffix"),
    ("merge_word", lambda word, merges: OWN.merge_word(word, merges[:1]), "has made"),
]


@pytest.mark.parametrize("exercise", CASES)
def test_the_projects_own_function_is_right(exercise):
    grade(OWN, exercise)


@pytest.mark.parametrize(("name", "mistake", "words"), MISTAKES)
def test_a_typical_mistake_gets_a_sentence_that_names_it(name, mistake, words):
    with pytest.raises(pytest.fail.Exception, match=words):
        grade(SimpleNamespace(**{name: mistake}), next(n for n in CASES if name in CASES[n]))


def test_each_stub_gets_the_line_not_written_yet():
    todo = (ROOT / "exercises/stubs.py").read_text().count("raise NotImplementedError")
    command = [sys.executable, "-m", "pytest", "-q", "exercises"]
    output = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout
    assert output.count("not written yet (exercises/stubs.py:") == todo  # 9, before you solve some
    assert todo < 9 or len(output.splitlines()) == 12  # and the count, and pytest's own two
