"""Layouts of model files other than our own, one module each."""
