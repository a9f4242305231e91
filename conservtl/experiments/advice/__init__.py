"""Recommend a strategy: evidence, rules and a learning-rate range test."""
