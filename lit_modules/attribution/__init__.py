"""Local attributions: which components feed which."""

from exactivations.lit_modules.attribution.local_attributor import AttributionOptions, LocalAttributor

__all__ = ["AttributionOptions", "LocalAttributor"]
