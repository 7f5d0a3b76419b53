"""The next testbed: models of composed scenes, which draw and have memorized; being trained."""
