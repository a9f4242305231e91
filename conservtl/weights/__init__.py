"""Weights without training: interpolation, soups, paths, recomputed batch-norm statistics."""
