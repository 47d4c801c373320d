"""Clips from files and into files."""
