"""Numbers to meaning: CLIP's text transformer, whose hidden states the U-Net attends to.

    ids (b, n) from tokenizer.py -> embeddings -> causal transformer -> context (b, n, d)

The hidden states of all tokens after the final layer norm are the context, padding included. There
is no mask, because Stable Diffusion was trained without one. CLIP, Radford et al. 2021, sections
2.4 and 2.5. Parameters are named as in transformers' CLIPTextModel; the tiny model and Stable
Diffusion use the same class.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn


@dataclass(frozen=True)
class TextConfig:
    """Shape of the text encoder; the field names are those of transformers' CLIPTextConfig."""

    vocab_size: int
    hidden_size: int  # d, the width of a token
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    max_position_embeddings: int
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5

    def __post_init__(self):
        for name, value in vars(self).items():
            if name != "hidden_act" and not value > 0:  # written as not >, so that NaN fails
                raise ValueError(f"{name} needs to be positive, got {value}")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError("num_attention_heads needs to divide hidden_size, got "
                             f"{self.num_attention_heads} and {self.hidden_size}")
        if self.hidden_act not in ACTIVATIONS:
            raise ValueError(f"hidden_act needs one of {[*ACTIVATIONS]}, got {self.hidden_act!r}")


def quick_gelu(x):
    """CLIP's GELU: x sigmoid(1.702 x); 1.702 brings the sigmoid closest to the normal's CDF."""
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS = {"quick_gelu": quick_gelu, "gelu": F.gelu}

# The vocabulary of "tiny" and "small" is that of the tokenizer they are trained with.
PRESETS = {
    "tiny": TextConfig(
        vocab_size=1024, hidden_size=64, intermediate_size=256, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=24),
    "small": TextConfig(
        vocab_size=1024, hidden_size=256, intermediate_size=1024, num_hidden_layers=4,
        num_attention_heads=4, max_position_embeddings=48),
    "sd1": TextConfig(  # CLIP ViT-L/14
        vocab_size=49408, hidden_size=768, intermediate_size=3072, num_hidden_layers=12,
        num_attention_heads=12, max_position_embeddings=77),
    "sd2": TextConfig(  # OpenCLIP ViT-H/14 without its 24th and last layer, which SD 2 skips
        vocab_size=49408, hidden_size=1024, intermediate_size=4096, num_hidden_layers=23,
        num_attention_heads=16, max_position_embeddings=77, hidden_act="gelu"),
}


class TextEmbeddings(nn.Module):
    """Ids (b, n) to tokens (b, n, d): a learned vector per id plus one per position."""

    def __init__(self, config):
        super().__init__()
        self.token_embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embedding = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        # Small beside what attention adds to them, so that the last token depends on all others.
        nn.init.normal_(self.token_embedding.weight, std=0.1)
        nn.init.normal_(self.position_embedding.weight, std=0.03)

    def forward(self, ids):
        return self.token_embedding(ids) + self.position_embedding.weight[: ids.shape[1]]


class TextAttention(nn.Module):
    """Causal self-attention: a token sees itself and those before it. (b, n, d) -> (b, n, d)."""

    def __init__(self, config):
        super().__init__()
        width = config.hidden_size
        self.num_heads = config.num_attention_heads
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x):
        q, k, v = (
            projection(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # b heads n d/heads
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        # CLIP was trained with a causal mask, so only the last token has seen the whole text.
        x = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out_proj(x.transpose(1, 2).flatten(2))  # b heads n d/heads -> b n d


class TextMLP(nn.Module):
    """Two layers at each token."""

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
        return x + self.mlp(self.layer_norm2(x))  # each token by itself


class TextTransformer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.embeddings = TextEmbeddings(config)
        # The checkpoint's names are encoder.layers.0, encoder.layers.1, ...
        layers = nn.ModuleList(TextLayer(config) for _ in range(config.num_hidden_layers))
        self.encoder = nn.ModuleDict({"layers": layers})
        self.final_layer_norm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)

    def forward(self, ids):
        x = self.embeddings(ids)  # b n -> b n d
        for layer in self.encoder["layers"]:
            x = layer(x)
        return self.final_layer_norm(x)


class CLIPTextModel(nn.Module):
    """Ids (b, n), int64, to hidden states (b, n, d) of all tokens, after the final layer norm."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.text_model = TextTransformer(config)

    def forward(self, ids):
        """Raises ValueError for ids outside the vocabulary or more tokens than positions."""
        vocab_size, positions = self.config.vocab_size, self.config.max_position_embeddings
        if ids.ndim != 2 or not 0 < ids.shape[1] <= positions:
            raise ValueError(f"ids needs shape (b, n), 0 < n <= {positions}, got {[*ids.shape]}")
        # Not on CUDA, where looking at values would make every training step wait.
        if ids.device.type == "cpu" and ids.numel() and (ids.min() < 0 or ids.max() >= vocab_size):
            raise ValueError(f"ids need to be in 0..{vocab_size - 1}, got {ids.min()}..{ids.max()}")
        return self.text_model(ids)


@torch.no_grad()
def standardise(encoder, ids):
    """Give the last tokens of texts ids (b, n) mean 0 and variance 1 in every channel, b > 1.

    For a text encoder before its training: data-dependent initial weights of the final layer norm,
    as in Salimans & Kingma 2016, section 3. Without it the last tokens of any two captions are
    nearly equal, and a U-Net that gets the last token as its embedding learns only the colours.
    """
    last, norm = encoder(ids)[:, -1], encoder.text_model.final_layer_norm  # b d
    scale = 1 / last.std(dim=0).clamp(min=1e-3)
    # (y - mean) scale of y = weight x + bias is again a layer norm with other parameters.
    norm.weight *= scale
    norm.bias.copy_((norm.bias - last.mean(dim=0)) * scale)
