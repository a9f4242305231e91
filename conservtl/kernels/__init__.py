"""Computations over many weights at once: pulls, deviations from the source, sharded tensors."""
