"""Sentences about wrong fields: field, rule, value received, fix. ``sentences`` makes them of Pydantic's errors."""

from conservtl.wrong_fields.faults import sentences

__all__ = ["sentences"]
