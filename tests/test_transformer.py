"""The transformers: attention by loops, the text once a clip, the feed-forward in chunks."""

import pytest
import torch
from recorded.rule import fill, normal
from helpers import TOLERANCE, build_unet, unet_inputs

import transformer
from transformer import FeedForward, Transformer2D, TransformerBlock


def calls_of(unet, ending, rows):
    """Add to rows the number of rows (b * n) that each call of the layers with a name is given."""
    for name, module in unet.named_modules():
        if name.endswith(ending):
            module.register_forward_pre_hook(lambda _, x: rows.append(x[0].shape[:-1].numel()))


# Texts


@torch.no_grad()
def test_a_text_becomes_keys_once_for_each_clip_not_for_each_frame():
    unet, rows = build_unet(), []
    calls_of(unet, "attn2.to_k", rows)
    unet(*unet_inputs(b=2, t=3))
    assert rows == [2 * 5] * 7  # clips times tokens, in each of the transformers


@torch.no_grad()
def test_a_block_equals_its_three_parts_frame_by_frame():
    block = fill(TransformerBlock(6, num_heads=2, context_channels=5))
    x, context = normal(2, 3, 4, 6), normal(2, 7, 5, seed=2)  # b t (h w) c, b n d
    for i in range(3):
        y = x[:, i] + block.attn1(block.norm1(x[:, i]))
        y = y + block.attn2(block.norm2(y), context)
        y = y + block.ff(block.norm3(y))
        torch.testing.assert_close(block(x, context)[:, i], y, atol=1e-6, rtol=0)


@pytest.mark.parametrize("linear", [True, False])
@torch.no_grad()
def test_a_transformer_adds_to_images_what_its_block_makes_of_their_tokens(linear):
    layer = fill(Transformer2D(6, num_heads=2, context_channels=5, groups=3, linear=linear))
    x, context = normal(2, 3, 6, 4, 7), normal(2, 7, 5, seed=2)

    def project(projection, tokens):
        return tokens @ projection.weight.view(6, 6).T + projection.bias

    tokens = torch.stack([layer.norm(frame) for frame in x.unbind(1)], 1).flatten(3).mT
    tokens = layer.transformer_blocks[0](project(layer.proj_in, tokens), context)
    expected = x + project(layer.proj_out, tokens).mT.unflatten(3, (4, 7))
    torch.testing.assert_close(layer(x, context), expected, atol=1e-6, rtol=0)


# The feed-forward layers


@pytest.fixture
def feed_forward():
    """A FeedForward, and the tokens that went through its inner layers at each call."""
    layer, tokens = fill(FeedForward(6)), []
    layer.net["0"].register_forward_pre_hook(lambda _, x: tokens.append(x[0].shape[:-1].numel()))
    return layer, tokens


@torch.no_grad()
def test_the_feed_forward_layers_by_hand(feed_forward):
    layer, x = feed_forward[0], normal(2, 3, 5, 6)
    first, gate = (x @ layer.net["0"].proj.weight.T + layer.net["0"].proj.bias).split(24, dim=-1)
    inner = first * gate * 0.5 * (1 + torch.erf(gate / 2**0.5))
    torch.testing.assert_close(layer(x), inner @ layer.net["2"].weight.T + layer.net["2"].bias)


@pytest.mark.parametrize("chunk, sizes", [(30, [30]), (8, [8, 8, 8, 6]), (2048, [30])])
@torch.no_grad()
def test_chunks_of_tokens_change_no_value(monkeypatch, feed_forward, chunk, sizes):
    monkeypatch.setattr(transformer, "CHUNK_TOKENS", chunk)
    (layer, tokens), x = feed_forward, normal(2, 3, 5, 6)
    chunked = layer(x)
    assert tokens == sizes
    torch.testing.assert_close(chunked, layer.net["2"](layer.net["0"](x)), atol=1e-6, rtol=0)


@torch.no_grad()
def test_chunks_of_tokens_change_no_prediction(monkeypatch):
    unet, given = build_unet(), unet_inputs()
    whole = unet(*given)
    monkeypatch.setattr(transformer, "CHUNK_TOKENS", 7)
    torch.testing.assert_close(unet(*given), whole, atol=TOLERANCE, rtol=0)


def test_with_gradients_there_are_no_chunks(monkeypatch, feed_forward):
    monkeypatch.setattr(transformer, "CHUNK_TOKENS", 8)
    layer, tokens = feed_forward
    layer(normal(2, 3, 5, 6))
    assert tokens == [30]
