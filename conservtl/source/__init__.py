"""Source weights: read safely, checked against the model's structure, copied as the plan says."""

from conservtl.source.read import Source, SourceLike, read_source
from conservtl.source.structure import check_structure
from conservtl.source.transfer import TransferReport

__all__ = ["Source", "SourceLike", "TransferReport", "check_structure", "read_source"]
