"""Public Stable Diffusion files: file formats, parameter names, configurations, tokenizers."""
