"""The end of the road: a model saved from Python, its card, and its upload to the Hub."""
