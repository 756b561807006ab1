"""Stored activations held against samples computed again, alone."""

from exactivations.lit_modules.verification.store_check import verify_store

__all__ = ["verify_store"]
