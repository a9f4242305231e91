"""``LoRA``."""

from conservtl.methods.lora.strategy import LoRA

__all__ = ["LoRA"]
