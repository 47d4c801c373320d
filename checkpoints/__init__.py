"""Public Stable Diffusion files: containers, the names in single files, the shapes of networks."""
