"""Frames of one gray value each, and programs that stand in for ffmpeg."""

import shutil
import sys

import numpy as np
import pytest

# Gray value of each frame, in no simple order and far enough apart to survive H.264
GRAYS = (0, 160, 40, 240, 80, 200)
WIDTH, HEIGHT = 24, 16

needs_ffmpeg = pytest.mark.skipif(
    not (shutil.which("ffmpeg") and shutil.which("ffprobe")), reason="needs ffmpeg and ffprobe")


def gray_frames(grays=GRAYS):
    return np.stack([np.full((HEIGHT, WIDTH, 3), gray, np.uint8) for gray in grays])


def fake(monkeypatch, folder, **scripts):
    """Make these programs the only ones on PATH; each is a script in Python."""
    for name, script in scripts.items():
        (folder / name).write_text(f"#!{sys.executable}\nimport sys\n{script}")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(folder))
