"""Converters from official checkpoints."""
