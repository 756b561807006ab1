"""`exactivations attribute`: which components feed which others on a prompt, for sets of causal importances."""


def attribute(
    model: str,
    *,
    ci_sets: list[str],
    out: str,
    components: str | None = None,
    svd: list[str] | None = None,
    n_components: int | None = None,
    own_ci: str | None = None,
    ci_threshold: float = 1e-6,
    output_threshold: float = 0.1,
    unmasked: bool = False,
    separate: bool = False,
    memory_mib: float = 64.0,
    max_rows: int = 64,
    add_special_tokens: bool = True,
    show: int = 3,
    revision: str | None = None,
    trust_remote_code: bool = False,
    accelerator: str = "auto",
    overwrite: bool = False,
) -> None:
    """Attributes between the components of a decomposed model, for many sets of causal importances in one pass, in float32.

    Args:
        model: The model that was decomposed: "demo" (embedded), a Hugging Face hub id, or a local path.
        ci_sets: Files of sets, one prompt each: JSON with prompt and ci_sets: {set: {layer: [positions][components]}}.
        out: The folder to write; with several files of sets, a folder in it for each.
        components: Its components: the folder or file that `decompose` wrote.
        svd: Or take the singular components of the maps whose paths match these patterns: '*.dense' '*_proj' ...
        n_components: With svd, so many of each map, the largest. Default: all.
        own_ci: Name of the set that is the model's own: what it has alive and others have not, graphs show as ghosts.
        ci_threshold: Components of at least this causal importance are alive.
        output_threshold: Output tokens of at least this probability are alive.
        unmasked: Take gradients in the untouched model instead of in that with components times causal importances.
        separate: Write a folder for each set instead of all sets into one.
        memory_mib: About what gradients computed at a time may take, in MiB.
        max_rows: Prompts of one length go together, up to so many sets.
        add_special_tokens: Whether the tokenizer adds its own special tokens (BOS, ...).
        show: Print so many of the strongest edges of each set.
        revision: Branch, tag or commit of a hub model.
        trust_remote_code: Whether code from the model's repository may run.
        accelerator: auto, gpu or cpu.
        overwrite: Replace results that are there.
    """
    from exactivations.callbacks.attribution_writer import AttributionWriter
    from exactivations.datamodules.ci_prompts import CiPromptDataModule
    from exactivations.datamodules.named_tokenizer import load_tokenizer
    from exactivations.lit_modules.attribution.local_attributor import AttributionOptions, LocalAttributor
    from exactivations.lit_modules.models.language_model import ModelOptions
    from exactivations.scripts.attribution_results import folders_of, tell_attributions
    from exactivations.scripts.component_loading import load_components
    from exactivations.scripts.trainers import trainer_on

    options = AttributionOptions(ci_threshold, output_threshold, unmasked, memory_mib)
    folders = folders_of(out, ci_sets, overwrite=overwrite)
    tokenizer = load_tokenizer(model, revision=revision, trust_remote_code=trust_remote_code)
    data = CiPromptDataModule(ci_sets, tokenizer, add_special_tokens=add_special_tokens, own=own_ci, max_rows=max_rows)
    loaded = load_components(model, ModelOptions(revision, "float32", "eager", trust_remote_code), components, svd, n_components)
    attributor = LocalAttributor(loaded, model, options, decode=lambda token: str(tokenizer.decode([token])))
    writer = AttributionWriter(folders, separate=separate, tell=lambda found, paths: tell_attributions(found, paths, show))
    trainer = trainer_on(accelerator, 1, logger=False, enable_progress_bar=False, callbacks=[writer])
    trainer.predict(attributor, datamodule=data, return_predictions=False)
    print("read them with\n    from exactivations.store.attributions import read_attributions")
