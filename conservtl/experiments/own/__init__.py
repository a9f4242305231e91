"""Studies of a model and data that a program holds: the studies of specs, on objects instead of names."""
