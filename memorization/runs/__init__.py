"""Runs: folders that a killed process goes on with."""
