"""Source weights: read safely, checked against the model's structure, copied by the plan."""

from conservtl.source.read import Source, SourceLike, TransferReport, read_source
from conservtl.source.structure import check_structure

__all__ = ["Source", "SourceLike", "TransferReport", "check_structure", "read_source"]
