"""Many runs: comparisons, sweeps and searches, with their statistics."""
