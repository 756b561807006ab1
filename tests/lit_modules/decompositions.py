"""Tiny decomposed models with sets of causal importances, and what their attributions are by the definition alone."""

import torch
import transformers

from exactivations.datamodules.ci_prompts import CiPrompt
from exactivations.lit_modules.decomposition.component_model import ComponentModel
from exactivations.store.ci_sets import CiSets

from .pairs import language_model

MAPS = {
    "gpt_neox": ["*.query_key_value", "*.dense", "*.dense_h_to_4h", "*.dense_4h_to_h"],
    "llama": ["*_proj"],
    "gpt2": ["*.c_attn", "*.c_proj", "*.c_fc"],
}
OVER_POSITIONS = {
    ("query_key_value", "dense"),
    ("k_proj", "o_proj"),
    ("v_proj", "o_proj"),
    ("c_attn", "c_proj"),
}
THRESHOLD, OUTPUT_THRESHOLD = 1e-6, 0.1


def decomposed(family, n_components=6, seed=0, **changes):
    return ComponentModel.from_random(language_model(family, seed, **changes), MAPS[family], n_components, seed)


def random_prompt(components, n_sets, length=5, seed=0, share=0.4, own=None):
    """A prompt whose sets have each other components alive, at the threshold some, just below it some."""
    generator = torch.Generator().manual_seed(seed)
    values = {}
    for path, linear in components.maps.items():
        shape = (n_sets, length, linear.n_components)
        importance = torch.rand(shape, generator=generator)
        values[path] = importance * (torch.rand(shape, generator=generator) < share)
        values[path][:, 0, 0] = 0.99 * THRESHOLD  # runs, a little, but is not alive
        values[path][:, 0, 1] = THRESHOLD
    ids = torch.randint(6, 99, (length,), generator=generator)
    return CiPrompt(ids, CiSets(f"prompt {seed}", tuple(f"set {n}" for n in range(n_sets)), values), own)


def naive(components, prompt, name, unmasked=False):
    """One set, one gradient of one target component at one position at a time, one number written at a time.

    The forward pass is written out with hooks of its own, so that it shares nothing with what it is compared with.

    Returns:
        (source, target) -> [s_in, c_in, s_out, c_out] over all components, and the probabilities [L, V].
    """
    n = prompt.sets.names.index(name)
    model = components.model
    dtype = next(model.parameters()).dtype
    masks = {path: values[n].to(dtype) for path, values in prompt.sets.values.items()}
    ids, length = prompt.token_ids[None], len(prompt.token_ids)
    pre, post, handles = {}, {}, []

    def cut(path, linear, with_masks):
        def hook(module, args, out):
            pre[path] = args[0] @ linear.V
            post[path] = pre[path].detach().requires_grad_()
            if with_masks:
                written = (post[path] * masks[path]) @ linear.U
            else:
                written = post[path] @ linear.U + (args[0] @ (linear.weight - linear.V @ linear.U)).detach()
            return written if linear.bias is None else written + linear.bias

        return hook

    def embedding(module, args, out):
        post["wte"] = out.detach().requires_grad_()
        return post["wte"]

    def run(with_masks):
        handles[:] = [linear.register_forward_hook(cut(path, linear, with_masks)) for path, linear in components.maps.items()]
        handles.append(model.get_input_embeddings().register_forward_hook(embedding))
        try:
            return model(input_ids=ids, use_cache=False).logits
        finally:
            for handle in handles:
                handle.remove()

    probabilities = run(True)[0].softmax(-1).detach()
    pre["output"] = run(not unmasked)
    alive = {path: values[n] >= THRESHOLD for path, values in prompt.sets.values.items()}
    alive |= {"wte": torch.ones(length, 1, dtype=torch.bool), "output": probabilities >= OUTPUT_THRESHOLD}
    found = {}
    for target in (*components.maps, "output"):
        for s_out, c_out in alive[target].nonzero().tolist():
            gradients = torch.autograd.grad(pre[target][0, s_out, c_out], list(post.values()), retain_graph=True, allow_unused=True)
            for source, gradient in zip(post, gradients, strict=True):
                if gradient is None:
                    continue
                if (source, target) not in found:
                    shape = (length, alive[source].shape[1], length, alive[target].shape[1])
                    found[source, target] = torch.zeros(shape, dtype=dtype)
                values = (gradient * post[source])[0]
                if source == "wte":
                    values = values.sum(-1, keepdim=True)
                same_block = source.rsplit(".", 1)[0] == target.rsplit(".", 1)[0]
                over = same_block and (source.rsplit(".", 1)[-1], target.rsplit(".", 1)[-1]) in OVER_POSITIONS
                for s_in in range(s_out + 1) if over else (s_out,):
                    for c_in in range(values.shape[1]):
                        if alive[source][s_in, c_in]:
                            found[source, target][s_in, c_in, s_out, c_out] = values[s_in, c_in].item()
    return found, probabilities


class ToyLanguageModel(transformers.PreTrainedModel):
    """What transformers asks of a causal language model, for one that has an `embed` and a `head`."""

    config_class = transformers.PreTrainedConfig

    def get_input_embeddings(self):
        return self.embed

    def get_output_embeddings(self):
        return self.head
