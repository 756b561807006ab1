"""`exactivations optimise-ci`: sets of causal importances for one prompt, one of each seed, all in one batch."""

from typing import Literal


def optimise_ci(
    model: str,
    *,
    prompt: str,
    out: str,
    seeds: list[int] | None = None,
    components: str | None = None,
    svd: list[str] | None = None,
    n_components: int | None = None,
    ci_function: str | None = None,
    target: str | None = None,
    masks: Literal["stochastic", "ci"] = "stochastic",
    steps: int = 2000,
    learning_rate: float = 0.01,
    coefficient: float = 0.1,
    p: float = 0.3,
    add_special_tokens: bool = True,
    revision: str | None = None,
    trust_remote_code: bool = False,
    accelerator: str = "auto",
    overwrite: bool = False,
) -> None:
    """Looks for the fewest components with which a model still predicts one token after a prompt.

    Values before a sigmoid are optimised by AdamW, for each component at each position: cross-entropy of the target at the last
    position, and importance minimality. A seed gives the same set whatever other seeds there are.

    Args:
        model: "demo" (embedded), a Hugging Face hub id, or a local path.
        prompt: The text.
        out: The .json file to write, for `exactivations attribute --ci-sets`.
        seeds: A set for each. Default: 0 1 2. With --ci-function and --masks ci nothing is random: give one.
        components: Folder or file of the model's components (`exactivations decompose`).
        svd: Or patterns over paths of maps, whose singular components are taken.
        n_components: With svd: the largest so many of each map. Default: all.
        ci_function: Folder or file of the components' causal-importance function: only components that are alive by it take part,
            and start from it. It is written as a set of its own, "own".
        target: The token to predict. Default: what the original model holds likeliest.
        masks: stochastic: components are masked at random between their importance and 1; ci: by their importance.
        steps: Of AdamW.
        learning_rate: Its rate.
        coefficient: Weight of importance minimality: the larger, the fewer components are alive.
        p: Its power.
        add_special_tokens: Whether the tokenizer adds its own special tokens (BOS, ...).
        revision: Branch, tag or commit of a hub model.
        trust_remote_code: Whether code from the model's repository may run here.
        accelerator: cpu, gpu or auto.
        overwrite: Replace the file if it is there.
    """
    from exactivations.lit_modules.decomposition.optimised_sets import CiOptions
    from exactivations.lit_modules.models.language_model import ModelOptions
    from exactivations.scripts.component_loading import load_components
    from exactivations.scripts.optimise_ci_run import Prompt, optimise, refuse_out

    refuse_out(out, overwrite=overwrite)
    options = CiOptions(steps, learning_rate, coefficient, p, masks)
    of_model = ModelOptions(revision, "float32", None, trust_remote_code)
    asked = Prompt.of(prompt, target, model, of_model, add_special_tokens)
    parts = load_components(model, of_model, components, svd, n_components)
    optimise(parts, asked, seeds if seeds is not None else [0, 1, 2], options, ci_function, accelerator, out)
