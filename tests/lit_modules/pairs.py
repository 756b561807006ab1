"""Pairs of tiny causal language models, and what their amplified completions are by the definition alone."""

import copy
import math

import torch
import transformers as t

from exactivations.lit_modules.amplification.row_sampling import gumbel_noise

from .tiny_models import CONFIGS, in_dtype

FAMILIES = ("gpt2", "gpt_neox", "llama")
EOS = 5


def language_model(family, seed=0, dtype=torch.float64, config=None, **changes):
    """A causal language model whose predictions are as sharp as a trained one's."""
    torch.manual_seed(seed)
    config = copy.deepcopy(config or CONFIGS[family])
    config.tie_word_embeddings = False
    for name, value in changes.items():
        setattr(config, name, value)
    model = t.AutoModelForCausalLM.from_config(config).train(False)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3.0) if parameter.ndim > 1 else parameter.add_(torch.randn_like(parameter) * 0.1)
        ids = torch.randint(6, config.vocab_size, (4, 10))
        model.get_output_embeddings().weight.mul_(2.0 / model(input_ids=ids).logits.std())
    model.generation_config.eos_token_id = EOS
    model.generation_config.pad_token_id = 0
    return in_dtype(model, dtype)


def pair(family, dtype=torch.float64, seed=0):
    """Before and after by name: one model (after), and the same with other weights mixed in, so that they agree in part."""
    after, before = language_model(family, seed, dtype), language_model(family, seed, dtype)
    other = language_model(family, seed + 1, dtype)
    with torch.no_grad():
        for mine, theirs in zip(before.parameters(), other.parameters(), strict=True):
            mine.lerp_(theirs, 0.3)
    return {"before": before, "after": after}


@torch.no_grad()
def by_definition(prompt, alpha, *, before, after, temperature=0.0, top_p=1.0, seed=0, max_new_tokens=12, eos=(EOS,)):
    """One row, both models run on the whole text for every token, in Python: its tokens, and what is said of each.

    Returns:
        The completion, and for each token (after's log-probability, before's, KL(after || before), entropy of what was drawn from).
    """
    text, scores = list(prompt), []
    for step in range(max_new_tokens):
        of_before, of_after = (
            model(input_ids=torch.tensor([text]), use_cache=False).logits[0, -1].double().tolist() for model in (before, after)
        )
        logits = [a + alpha * (a - b) for b, a in zip(of_before, of_after, strict=True)]
        kept = _nucleus(logits, temperature, top_p)
        if temperature == 0:
            token = kept[0]
        else:
            noise = gumbel_noise(torch.tensor([seed]), step, len(logits))[0].tolist()
            token = max(kept, key=lambda i: logits[i] / temperature + noise[i])
        p, q = _softmax(of_after), _softmax(of_before)
        drawn = _softmax([logits[i] / (temperature or 1.0) for i in kept])
        kl = sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
        scores.append((math.log(p[token]), math.log(q[token]), kl, -sum(x * math.log(x) for x in drawn)))
        text.append(token)
        if token in eos:
            break
    return text[len(prompt) :], scores


def _nucleus(logits, temperature, top_p):
    order = sorted(range(len(logits)), key=lambda i: (-logits[i], i))
    if temperature == 0:
        return order[:1]
    kept, mass = [], 0.0
    for i, p in zip(order, _softmax([logits[i] / temperature for i in order]), strict=True):
        kept.append(i)
        mass += p
        if mass >= top_p:
            break
    return kept


def _softmax(logits):
    weights = [math.exp(x - max(logits)) for x in logits]
    return [weight / sum(weights) for weight in weights]
