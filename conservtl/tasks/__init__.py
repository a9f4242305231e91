"""The tasks: sections of a spec, data, models, metrics and answers, a folder each. ``base`` holds the protocol."""
