"""Detect, measure and mitigate memorized training images in text-to-image diffusion models."""
