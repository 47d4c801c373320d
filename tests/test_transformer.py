"""What need not be done again: texts read once, guidance's two halves one until the first text."""

from dataclasses import replace

import pytest
import torch
from recorded.rule import fill, normal
from test_model import CASES, SMALL, TOLERANCE, build, inputs
from test_weights import fresh_pipeline

import layers
import transformer
from pipeline import Sampling
from transformer import FeedForward

# By whether the first level has transformers, and the time embedding knows the text.
GUIDED = CASES | {
    "late": replace(SMALL, attention_levels=(False, True, True), attention_head_dim=(1, 2, 4)),
    "none": replace(SMALL, temporal="none"),
}


def calls_of(unet, ending, rows):
    """Add to rows the number of rows (b * n) that each call of the layers with a name is given."""
    for name, module in unet.named_modules():
        if name.endswith(ending):
            module.register_forward_pre_hook(lambda _, x: rows.append(x[0].shape[:-1].numel()))


# Texts


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_a_text_read_before_is_as_good_as_its_hidden_states(name):
    unet, (latents, timesteps, context) = build(CASES[name]), inputs()
    text = unet.read(context)
    expected = unet(latents, timesteps, context)
    assert all(torch.equal(unet(latents, timesteps, text), expected) for _ in range(2))


@torch.no_grad()
def test_a_text_becomes_keys_once_for_each_clip_not_for_each_frame():
    unet, rows = build(), []
    calls_of(unet, "attn2.to_k", rows)
    unet(*inputs(b=2, t=3))
    assert rows == [2 * 5] * 7  # clips times tokens, in each of the transformers


@pytest.mark.parametrize("guidance_scale, num_texts", [(1.0, 1), (2.0, 2)])
@pytest.mark.parametrize("layer", ["attn2.to_k", "attn2.to_v"])
def test_a_text_becomes_keys_and_values_once_for_all_steps(layer, guidance_scale, num_texts):
    pipeline, rows = fresh_pipeline(), []
    calls_of(pipeline.unet, layer, rows)
    sampling = Sampling(3, 16, num_steps=4, guidance_scale=guidance_scale)
    steps = list(pipeline.sample(["a red circle"], [0], sampling))
    assert len(steps) == 4 and rows == [num_texts * 9] * 4  # nine tokens, four transformers


@torch.no_grad()
def test_keys_and_values_by_hand():
    attention, context = layers.Attention(6, 2, 5), normal(2, 3, 5)
    keys, values = attention.read(context)
    for x, matrix in ((keys, attention.to_k.weight), (values, attention.to_v.weight)):
        for b, n, head in ((0, 0, 0), (1, 2, 0), (0, 1, 1)):
            rows = matrix[3 * head : 3 * head + 3]  # the head's
            torch.testing.assert_close(x[b, head, n], rows @ context[b, n])


# Guidance


def texts(count):
    return normal(count, 5, 20, seed=3)


@pytest.mark.parametrize("num_texts", [2, 3])
@pytest.mark.parametrize("name", GUIDED)
@torch.no_grad()
def test_several_texts_a_clip_equal_the_clip_several_times(name, num_texts):
    unet, (latents, timesteps, _) = build(GUIDED[name]), inputs(b=2, t=3)
    context = texts(num_texts * 2)
    together = unet(latents, timesteps, context)
    repeated = torch.cat([latents] * num_texts), torch.cat([timesteps] * num_texts)
    torch.testing.assert_close(together, unet(*repeated, context), atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("name", GUIDED)
@torch.no_grad()
def test_the_first_text_of_every_clip_stands_before_the_second_of_any(name):
    unet, (latents, timesteps, _) = build(GUIDED[name]), inputs(b=2, t=3)
    context = texts(4)
    together = unet(latents, timesteps, context)
    for row, clip in enumerate((0, 1, 0, 1)):
        alone = unet(latents[[clip]], timesteps[[clip]], context[[row]])
        torch.testing.assert_close(together[[row]], alone, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("name, shared", [("sd1", 1), ("sd2", 1), ("late", 2), ("small", 0)])
@torch.no_grad()
def test_what_comes_before_the_first_text_is_computed_once_a_clip(name, shared):
    """Before the first transformer, that is; nothing is where the time embedding has the text."""
    unet, clips = build(GUIDED[name]), []
    for module in unet.modules():
        if isinstance(module, layers.ResnetBlock):
            module.register_forward_pre_hook(lambda _, args: clips.append(len(args[0])))
    latents, timesteps, _ = inputs(b=2)
    unet(latents, timesteps, texts(4))
    assert clips == [2] * shared + [4] * (11 - shared)


def test_gradients_of_several_texts_equal_those_of_the_clip_several_times():
    def gradient(several):
        latents, timesteps, _ = inputs(b=2)
        latents.requires_grad_()
        again = 1 if several else 2
        out = unet(torch.cat([latents] * again), torch.cat([timesteps] * again), texts(4))
        return torch.autograd.grad(out.square().sum(), latents)[0]

    unet = build()
    torch.testing.assert_close(gradient(True), gradient(False))


@pytest.mark.parametrize("num_texts", [1, 3])
def test_texts_that_are_no_multiple_of_the_clips_are_refused_when_read_before_too(num_texts):
    unet, (latents, timesteps, _) = build(), inputs(b=2)
    text = unet.read(texts(num_texts))
    with pytest.raises(ValueError, match=f"context needs a multiple of 2 texts, got {num_texts}"):
        unet(latents, timesteps, text)


# The feed-forward layers


@pytest.fixture
def feed_forward():
    """A FeedForward, and the tokens that went through its inner layers at each call."""
    layer, tokens = fill(FeedForward(6)), []
    layer.net.register_forward_pre_hook(lambda _, args: tokens.append(args[0].shape[:-1].numel()))
    return layer, tokens


@torch.no_grad()
def test_the_feed_forward_layers_by_hand(feed_forward):
    layer, x = feed_forward[0], normal(2, 3, 5, 6)
    first, gate = (x @ layer.net[0].proj.weight.T + layer.net[0].proj.bias).split(24, dim=-1)
    inner = first * gate * 0.5 * (1 + torch.erf(gate / 2**0.5))
    torch.testing.assert_close(layer(x), inner @ layer.net[2].weight.T + layer.net[2].bias)


@pytest.mark.parametrize("chunk, sizes", [(30, [30]), (8, [8, 8, 8, 6]), (2048, [30])])
@torch.no_grad()
def test_chunks_of_tokens_change_no_value(monkeypatch, feed_forward, chunk, sizes):
    monkeypatch.setattr(transformer, "CHUNK_TOKENS", chunk)
    (layer, tokens), x = feed_forward, normal(2, 3, 5, 6)
    chunked = layer(x)
    assert tokens == sizes
    torch.testing.assert_close(chunked, layer.net(x), atol=1e-6, rtol=0)


@torch.no_grad()
def test_chunks_of_tokens_change_no_prediction(monkeypatch):
    unet, given = build(), inputs()
    whole = unet(*given)
    monkeypatch.setattr(transformer, "CHUNK_TOKENS", 7)
    torch.testing.assert_close(unet(*given), whole, atol=TOLERANCE, rtol=0)


def test_with_gradients_there_are_no_chunks(monkeypatch, feed_forward):
    monkeypatch.setattr(transformer, "CHUNK_TOKENS", 8)
    layer, tokens = feed_forward
    layer(normal(2, 3, 5, 6))
    assert tokens == [30]
