"""DataModules: what comes in. Texts become planned token batches, stores become rows with labels."""

from exactivations.datamodules.activations import ActivationDataModule
from exactivations.datamodules.plan import Plan, PlanOptions, plan
from exactivations.datamodules.text import TextDataModule
from exactivations.datamodules.token_rows import TokenRows
from exactivations.datamodules.token_stream import TokenStream
from exactivations.datamodules.tokenization import TextOptions

__all__ = ["ActivationDataModule", "Plan", "PlanOptions", "TextDataModule", "TextOptions", "TokenRows", "TokenStream", "plan"]
