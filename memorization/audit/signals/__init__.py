"""Prediction signals of an audit: what tells copying without generating. One file each."""
