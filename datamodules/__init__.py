"""DataModules: what comes in. Texts become planned token batches."""

from exactivations.datamodules.plan import Plan, PlanOptions, plan
from exactivations.datamodules.text import TextDataModule
from exactivations.datamodules.tokenization import TextOptions

__all__ = ["Plan", "PlanOptions", "TextDataModule", "TextOptions", "plan"]
