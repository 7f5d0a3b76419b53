"""What scores are worth: metrics, calibration, learned scores, text baselines, plots."""
