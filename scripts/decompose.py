"""`exactivations decompose` and `decompose-toy`: components of a model's maps, found by training."""

from pathlib import Path


def decompose(
    model: str,
    *,
    dataset: str,
    out: str,
    maps: list[str],
    components: int,
    steps: int = 5000,
    minimality: float = 1e-4,
    exponent: float = 2.0,
    faithfulness: float = 0.0,
    learning_rate: float = 1e-3,
    hidden: int = 16,
    max_length: int = 64,
    token_budget: int = 1024,
    held_out: int = 16,
    num_samples: int | None = None,
    split: str | None = None,
    text_column: str = "text",
    tokenizer: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    seed: int = 0,
    save_every: int = 250,
    accelerator: str = "auto",
    overwrite: bool = False,
) -> None:
    """Decomposes linear maps of a causal language model by training (stochastic parameter decomposition, arXiv 2506.20790).

    Started again, it goes on from the last checkpoint, bit for bit. At the end it holds the components against those of a singular
    value decomposition (SVD), on texts that were held out.

    Args:
        model: "demo" (embedded), a Hugging Face hub id, or a local path.
        dataset: "demo" (embedded), a hub id, a .jsonl, .csv, .parquet or .txt file, or a folder saved by `datasets`.
        out: Folder for components.safetensors, ci_function.safetensors and figures.json.
        maps: Patterns over the paths of linear maps, such as "*.mlp.*".
        components: Of each map; there may be more than its rank.
        steps: Training steps.
        minimality: Weight of importance minimality: the larger, the fewer components are alive.
        exponent: Of importances in it (p in the paper).
        faithfulness: Weight of the difference between weights and sums of components; it is masked like a component in any case.
        learning_rate: Of Adam, at first.
        hidden: Hidden units of each component's causal-importance MLP.
        max_length: Texts are cut to so many tokens.
        token_budget: The most tokens in a step.
        held_out: So many steps' batches are for the figures only.
        num_samples: Take the first so many samples.
        split: For example "train[:1000]".
        text_column: The column with the texts.
        tokenizer: If it is not the model's.
        revision: Branch, tag or commit of a hub model.
        trust_remote_code: Whether code from the model's repository may run here.
        seed: Of components, masks, and the order of texts.
        save_every: Steps between checkpoints.
        accelerator: cpu, gpu or auto.
        overwrite: Replace the decomposition that is in the folder.
    """
    from exactivations.datamodules.plan import PlanOptions
    from exactivations.datamodules.text import TextDataModule
    from exactivations.datamodules.tokenization import TextOptions
    from exactivations.lit_modules.decomposition.decomposition import Objective
    from exactivations.lit_modules.models.language_model import ModelOptions
    from exactivations.scripts.decompose_run import Machine, Training, decompose_model

    data = TextDataModule(
        dataset, tokenizer or model, split=split, num_samples=num_samples, keep_columns=[],
        text=TextOptions(text_column=text_column, max_length=max_length), plan_options=PlanOptions(token_budget=token_budget),
        tokenizer_revision=None if tokenizer else revision, trust_remote_code=trust_remote_code,
    )  # fmt: skip
    objective = Objective("kl", minimality, exponent, faithfulness)
    training = Training(objective, components, steps, learning_rate, hidden, seed)
    options, machine = ModelOptions(revision, "float32", None, trust_remote_code), Machine(accelerator, save_every, overwrite)
    decompose_model(model, options, data, maps, held_out, training, machine, Path(out))


def decompose_toy(
    *,
    out: str,
    features: int = 5,
    dimensions: int = 2,
    hidden_identity: bool = False,
    seeds: list[int] | None = None,
    components: int = 20,
    steps: int = 10_000,
    batch_size: int = 1024,
    minimality: float = 3e-3,
    exponent: float = 1.0,
    faithfulness: float = 0.0,
    learning_rate: float = 1e-3,
    hidden: int = 16,
    toy_batch_size: int = 1024,
    toy_steps: int = 10_000,
    save_every: int = 500,
    accelerator: str = "cpu",
    overwrite: bool = False,
) -> None:
    """Trains toy models of superposition and decomposes them: are the components the columns of W, as they must be?

    Both maps (and the identity between them) are decomposed, seed after seed. Started again, it goes on from the last checkpoint.
    The defaults are the published ones for 5 features in 2 dimensions; those for 40 in 10 are in --config toy-40-10.

    Args:
        out: Folder with a folder for each seed.
        features: Features of the toy model.
        dimensions: It has so few for them.
        hidden_identity: Put an identity map in between, to be decomposed as well.
        seeds: Each of a toy model and its decomposition. Default: 0 1 2.
        components: Of each map.
        steps: Training steps of the decomposition.
        batch_size: Samples of each.
        minimality: Weight of importance minimality: the larger, the fewer components are alive.
        exponent: Of importances in it (p in the paper).
        faithfulness: Weight of the difference between weights and sums of components; it is masked like a component in any case.
        learning_rate: Of Adam, at first.
        hidden: Hidden units of each component's causal-importance MLP.
        toy_batch_size: Samples of each step in which the toy model itself is trained.
        toy_steps: So many of these.
        save_every: Steps between checkpoints.
        accelerator: cpu, gpu or auto.
        overwrite: Replace the decompositions that are in the folder.
    """
    from exactivations.lit_modules.decomposition.decomposition import Objective
    from exactivations.scripts.decompose_run import Machine, Toy, Training, decompose_toys

    objective = Objective("mse", minimality, exponent, faithfulness)
    trainings = [Training(objective, components, steps, learning_rate, hidden, seed) for seed in (seeds or [0, 1, 2])]
    toy = Toy(features, dimensions, hidden_identity, toy_batch_size, toy_steps, batch_size)
    decompose_toys(toy, trainings, Machine(accelerator, save_every, overwrite), Path(out))
