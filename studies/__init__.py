"""Measurements: what variants learn, what they cost, and how they compare with diffusers."""
