"""What runs at each step: the pull on weights, and keeping frozen layers frozen."""
