"""Other libraries' trainers and adapters; each module needs an extra of its own and is imported by name.

Nothing else in conservtl imports them.
"""
