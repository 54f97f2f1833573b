"""Measurements: what the study and the speed tests need."""
