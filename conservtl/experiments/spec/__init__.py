"""A spec: read, overridden, validated; recipes and search spaces in it."""
