"""Detect, measure and mitigate memorized training images in text-to-image diffusion models."""

__version__ = "0.2.0"
