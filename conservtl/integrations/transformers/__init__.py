"""Hugging Face's Trainer: a mixin that carries out a plan, and a callback for plans that need no more."""

from conservtl.integrations.transformers.callback import ConservingCallback
from conservtl.integrations.transformers.trainer import ConservingTrainer

__all__ = ["ConservingCallback", "ConservingTrainer"]
