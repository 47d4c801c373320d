"""Ids to meaning: CLIP's text transformer, whose hidden states the U-Net attends to.

    ids (b, n) from tokenizer.py -> embeddings -> causal transformer -> context (b, n, d)

The context is the hidden states of all tokens; names are from transformers' CLIPTextModel. CLIP,
Radford et al. 2021, sections 2.4 and 2.5.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn


@dataclass(frozen=True)
class TextConfig:
    """Shape of the text encoder; field names as in transformers' CLIPTextConfig."""

    vocab_size: int
    hidden_size: int  # d, the width of a token
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    max_position_embeddings: int
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5

    def __post_init__(self):
        if self.hidden_size % self.num_attention_heads or self.hidden_act not in ACTIVATIONS:
            raise ValueError(f"hidden_size {self.hidden_size} needs to be a multiple of "
                             f"num_attention_heads {self.num_attention_heads}, and hidden_act one "
                             f"of {[*ACTIVATIONS]}, got {self.hidden_act!r}")


def quick_gelu(x):
    """CLIP's GELU. 1.702 brings the sigmoid closest to the normal CDF: within 0.01 everywhere."""
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS = {"quick_gelu": quick_gelu, "gelu": F.gelu}

PRESETS = {  # train.py sets vocab_size and max_position_embeddings to fit its own tokenizer
    "tiny": TextConfig(vocab_size=1024, hidden_size=64, intermediate_size=256,
                       num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=24),
    "small": TextConfig(vocab_size=1024, hidden_size=256, intermediate_size=1024,
                        num_hidden_layers=4, num_attention_heads=4, max_position_embeddings=48),
    "sd1": TextConfig(vocab_size=49408, hidden_size=768, intermediate_size=3072,  # CLIP ViT-L/14
                      num_hidden_layers=12, num_attention_heads=12, max_position_embeddings=77),
    "sd2": TextConfig(  # OpenCLIP ViT-H/14 without its 24th and last layer, which SD 2 skips
        vocab_size=49408, hidden_size=1024, intermediate_size=4096, num_hidden_layers=23,
        num_attention_heads=16, max_position_embeddings=77, hidden_act="gelu"),
}


class TextAttention(nn.Module):
    """Causal self-attention: a token sees itself and earlier ones. (b, n, d) -> (b, n, d)."""

    def __init__(self, config):
        super().__init__()
        width = config.hidden_size
        self.num_heads = config.num_attention_heads
        self.q_proj, self.k_proj = nn.Linear(width, width), nn.Linear(width, width)
        self.v_proj, self.out_proj = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x):
        q, k, v = (projection(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
                   for projection in (self.q_proj, self.k_proj, self.v_proj))  # b heads n d/heads
        # The mask is CLIP's, which was trained with it so that a language model's loss remains
        # possible. Padding is not masked: it comes last, so no word sees it, and Stable Diffusion
        # was trained with its hidden states, which have seen the whole text.
        x = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out_proj(x.transpose(1, 2).flatten(2))  # b heads n d/heads -> b n d


class TextMLP(nn.Module):
    """Two linear layers, applied to each token. (b, n, d) -> (b, n, d)."""

    def __init__(self, config):
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)
        self.activation = ACTIVATIONS[config.hidden_act]

    def forward(self, x):
        return self.fc2(self.activation(self.fc1(x)))


class TextLayer(nn.Module):
    """One pre-norm transformer layer, (b, n, d) -> (b, n, d)."""

    def __init__(self, config):
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.self_attn = TextAttention(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.mlp = TextMLP(config)

    def forward(self, x):
        x = x + self.self_attn(self.layer_norm1(x))  # between tokens
        return x + self.mlp(self.layer_norm2(x))  # within each token


class CLIPTextModel(nn.Module):
    """Ids (b, n), int64, to hidden states (b, n, d) of all tokens, after the final layer norm."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        # A learned vector per id plus one per position.
        embeddings = nn.ModuleDict({
            "token_embedding": nn.Embedding(config.vocab_size, config.hidden_size),
            "position_embedding": nn.Embedding(config.max_position_embeddings, config.hidden_size),
        })
        # PyTorch's default std, 1, is much larger than what attention adds. With it the last token,
        # an end or padding in every text, would hardly depend on the words before it.
        nn.init.normal_(embeddings.token_embedding.weight, std=0.1)
        nn.init.normal_(embeddings.position_embedding.weight, std=0.03)
        layers = nn.ModuleList(TextLayer(config) for _ in range(config.num_hidden_layers))
        # Every word should reach the last token with the same strength. PyTorch's default matrices
        # can map "left" and "right" to nearly the same vector; orthogonal ones keep all words
        # apart. An early word would also reach the last token through later words, so at first only
        # the last layer mixes tokens.
        for layer in layers:
            nn.init.orthogonal_(layer.self_attn.v_proj.weight)
            nn.init.orthogonal_(layer.self_attn.out_proj.weight)
        for layer in layers[:-1]:
            nn.init.zeros_(layer.self_attn.out_proj.weight)
        # The dicts give the parameters their names in a checkpoint: text_model.encoder.layers.0...
        self.text_model = nn.ModuleDict({
            "embeddings": embeddings,
            "encoder": nn.ModuleDict({"layers": layers}),
            "final_layer_norm": nn.LayerNorm(config.hidden_size, config.layer_norm_eps),
        })

    def forward(self, ids):
        """Hidden states (b, n, d) of ids (b, n), n at most config.max_position_embeddings."""
        embeddings = self.text_model.embeddings
        x = embeddings.token_embedding(ids)  # b n -> b n d
        x = x + embeddings.position_embedding.weight[: ids.shape[1]]
        for layer in self.text_model.encoder.layers:
            x = layer(x)
        return self.text_model.final_layer_norm(x)


@torch.no_grad()
def standardise(encoder, ids):
    """Give the last tokens of ids (b, n), b > 1, mean 0 and variance 1 in every channel.

    Data-dependent initial weights of the final layer norm, Salimans & Kingma 2016, section 3.
    """
    # New encoders need this. Without it the last tokens of any two captions are nearly equal, and a
    # U-Net that adds the last token to its time embedding learns only the colours.
    last, norm = encoder(ids)[:, -1], encoder.text_model.final_layer_norm  # b d
    scale = 1 / last.std(dim=0).clamp(min=1e-3)
    # With y = weight x + bias, (y - mean) scale is a layer norm with other parameters.
    norm.weight *= scale
    norm.bias.copy_((norm.bias - last.mean(dim=0)) * scale)
