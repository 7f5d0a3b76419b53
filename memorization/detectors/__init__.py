"""Detectors, one file a method. Higher values mean memorized; ``base`` says what a detector is given and gives."""
