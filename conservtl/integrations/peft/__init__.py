"""Adapters of PEFT: the source is the model without its adapter, and L2-SP acts on the change that an adapter makes."""

from conservtl.integrations.peft.merged_l2_sp import MergedL2Penalty, MergedL2SP
from conservtl.integrations.peft.prepare import AdapterAdaptation, adapt

__all__ = ["AdapterAdaptation", "MergedL2Penalty", "MergedL2SP", "adapt"]
