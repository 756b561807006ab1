"""The demo model steered towards docstrings and away from them. Prints docs/steering.md's table and draws its figure.

    python benchmarks/steering.py [--plot docs/steering.png]

The vector is the mean state at the last token of the first lines (`def f(x):`) of functions with a docstring less that of those
without, of 4,000 demo functions that are not held out. The prompts are such lines of held-out functions, continued greedily. Two
minutes on one core.
"""

import argparse
import tempfile
from pathlib import Path

import lightning.pytorch as pl
import torch
from matplotlib.figure import Figure
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from exactivations.callbacks import GroundTruthCheck, RunningMean
from exactivations.datamodules import TextDataModule, TextOptions
from exactivations.datamodules.demo import demo_functions
from exactivations.datamodules.embedded import resolve_model
from exactivations.lit_modules import ActivationExtractor, ModelOptions
from exactivations.lit_modules.models.language_model import load_causal_model
from exactivations.lit_modules.steering import Add, steering
from exactivations.store import MeanActivations, MeanOptions
from exactivations.store.vectors import vectors_of

POINTS = [f"resid_post.{layer}" for layer in range(4)]
SHOWN = "resid_post.2"
COEFFICIENTS = [-3.0, -2.0, -1.0, 0.0, 1.0, 2.0, 3.0]
PROMPTS, NEW_TOKENS, SEEDS = 500, 8, 3
QUOTES = ('"""', "'''", 'r"""', "r'''")


def main() -> None:
    """Measures, prints and draws."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--plot", type=Path, help="where the figure goes")
    arguments = parser.parse_args()
    functions = demo_functions().map(lambda row: {"text": row["text"].partition("\n")[0]})
    functions = functions.filter(lambda row: row["text"].startswith("def ") and row["text"].endswith(":"))
    with tempfile.TemporaryDirectory(prefix="steering-") as folder:
        vectors = differences(functions.filter(lambda row: not row["held_out"]), Path(folder) / "means")
    prompts = list(dict.fromkeys(functions.filter(lambda row: row["held_out"])["text"]))[:PROMPTS]
    model = load_causal_model("demo", ModelOptions())
    tokenizer = AutoTokenizer.from_pretrained(resolve_model("demo"), padding_side="left")
    rows = {
        f"{point} (length {vector.norm():.0f})": shares(model, tokenizer, prompts, point, vector)
        for point, vector in vectors.items()
    }
    for seed in range(SEEDS):
        dice = torch.randn(len(vectors[SHOWN]), generator=torch.Generator().manual_seed(seed))
        other = dice / dice.norm() * vectors[SHOWN].norm()
        rows[f"{SHOWN}, random direction {seed}"] = shares(model, tokenizer, prompts, SHOWN, other)
    print(f"{len(prompts)} prompts\n| coefficient | {' | '.join(f'{c:g}' for c in COEFFICIENTS)} |")
    print("|---" * (len(COEFFICIENTS) + 1) + "|")
    for name, values in rows.items():
        print(f"| {name} | {' | '.join(f'{100 * value:.0f} %' for value in values)} |")
    if arguments.plot:
        draw(rows, arguments.plot)


def differences(functions: object, folder: Path) -> dict[str, Tensor]:
    """Returns the difference of the means [D] at each hook point."""
    data = TextDataModule(
        functions, "demo", keep_columns=["has_docstring"], num_samples=4000, sample_seed=0, text=TextOptions(max_length=1024)
    )  # type: ignore[arg-type]
    options = MeanOptions(vectors_of(POINTS, ["last"]), "has_docstring")
    callbacks = [GroundTruthCheck(), RunningMean(folder, options)]
    trainer = pl.Trainer(accelerator="cpu", callbacks=callbacks, use_distributed_sampler=False, logger=False)
    trainer.predict(ActivationExtractor("demo", POINTS, ["last"]), datamodule=data, return_predictions=False)
    means = MeanActivations.load(folder)
    return {point: means.difference(f"{point}/last", "True", "False") for point in POINTS}


def shares(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[str], point: str, vector: Tensor
) -> list[float]:
    """Returns for each coefficient the share of continuations that begin with a docstring."""
    batch, found = tokenizer(prompts, return_tensors="pt", padding=True), []
    for coefficient in COEFFICIENTS:
        with steering(model, [Add(point, vector, coefficient)]):
            out = model.generate(**batch, max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=tokenizer.pad_token_id)
        texts = tokenizer.batch_decode(out[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
        found.append(sum(text.lstrip().startswith(QUOTES) for text in texts) / len(texts))
    return found


def draw(rows: dict[str, list[float]], path: Path) -> None:
    """Draws one hook point and its random directions."""
    figure = Figure(figsize=(7.0, 3.6), layout="constrained")
    ax = figure.subplots()
    for name, values in rows.items():
        if not name.startswith(SHOWN):
            continue
        drawn = {"color": "#0072B2", "marker": "o"} if "random" not in name else {"color": "0.6", "marker": "x", "linewidth": 0.8}
        label = name if "random" not in name else "random directions of that length" if name.endswith(" 0") else None
        ax.plot(COEFFICIENTS, [100 * value for value in values], label=label, **drawn)
    ax.set(xlabel="coefficient of the vector added at every token", ylabel="begin with a docstring, %", ylim=(0, None))
    ax.grid(axis="y", color="0.92", linewidth=0.6)
    ax.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=130, metadata={"Software": None})


if __name__ == "__main__":
    main()
