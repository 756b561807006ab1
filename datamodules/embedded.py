"""The embedded demo model and tokenizer: where they lie."""

from pathlib import Path

DEMO_MODEL = Path(__file__).parent / "demo_model"


def resolve_model(name: str) -> str:
    """Returns the path of the embedded model and tokenizer for "demo", and any other name as it is."""
    return str(DEMO_MODEL) if name == "demo" else name
