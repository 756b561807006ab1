"""Attributions of eight sets against eight runs, of one set against a loop over single gradients, and how the cost grows.

    python benchmarks/attribution.py [--threads 1] [--growth]

The demo model, decomposed by SVD (160 components a map, 16 maps), on a prompt of 16 tokens, with random sets of causal importances.
In a set 40 components are alive, over all maps and positions together (as in sets that are optimised for one token), or 320, or
2560 (10 at each position of each map). The loop is that of the design document: one gradient of one component at one position at a
time, written one number at a time. All in one process, in turns; medians count. What is timed begins with sets in memory and ends
with attributions in memory; paths were found before. Exits with status 1 unless eight sets of 40 are 4 times as fast as eight runs,
and a set of 2560 is 20 times as fast as the loop.
"""

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

LENGTH, SETS, TURNS, MAPS = 16, 8, 9, 16
SPARSE, ALIVE, DENSE = 40, (40, 320, 2560), 2560
WANTED_SETS, WANTED_LOOP = 4.0, 20.0
GROWTH = {"sets": (1, 2, 4, 8, 16, 32), "length": (4, 8, 16, 32, 64), "alive": (20, 80, 320, 1280, 5120)}


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--growth", action="store_true", help="how cost grows with sets, length and alive components, instead")
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(arguments.threads)

    import torch

    from exactivations.lit_modules.attribution.local_attributor import AttributionOptions, LocalAttributor
    from exactivations.lit_modules.models.language_model import ModelOptions
    from exactivations.scripts.component_loading import load_components

    torch.set_num_threads(arguments.threads)
    patterns = ["*.query_key_value", "*.dense", "*.dense_h_to_4h", "*.dense_4h_to_h"]
    components = load_components("demo", ModelOptions(dtype="float32"), None, patterns, None)
    attributors = {
        name: LocalAttributor(components, "demo", AttributionOptions(unmasked=name == "unmasked"))
        for name in ("masked", "unmasked")
    }
    for attributor in attributors.values():
        assert attributor.paths  # found now, once
    if arguments.growth:
        tell_growth(attributors)
    else:
        print("| | edges | eight sets | eight runs | | one set | loop | | largest difference |\n|" + "---|" * 9)
        fast = [tell_ratios(name, attributor, alive) for name, attributor in attributors.items() for alive in ALIVE]
        sys.exit(0 if all(fast) else "too slow")


def tell_ratios(name: str, attributor: Any, alive: int) -> bool:
    """Prints both ratios as a line of a table, and returns whether they are as wanted of sets with so much alive."""
    from exactivations.datamodules.ci_prompts import CiPrompt

    many = random_prompt(attributor.components, SETS, LENGTH, alive)
    singles = [CiPrompt(many.token_ids, many.sets.one(of)) for of in many.sets.names]
    (together,), (alone,) = attributor([many]), attributor(singles[:1])
    loop = naive(attributor, singles[0])
    n_edges, apart, largest = 0, 0.0, 0.0
    for mine, single in zip(together.by_set["set 0"], alone.by_set["set 0"], strict=True):
        expected = loop[single.source, single.target]
        apart = max(apart, *(float((of.attribution - expected).abs().max()) for of in (single, mine)))
        n_edges, largest = n_edges + len(mine.values), max(largest, float(expected.abs().max()))
    work = {
        "eight": lambda: attributor([many]),
        "runs": lambda: [attributor([single]) for single in singles],
        "one": lambda: attributor(singles[:1]),
    }
    seconds = in_turns(work, TURNS) | in_turns({"loop": lambda: naive(attributor, singles[0])}, 3)
    by_sets, by_loop = seconds["runs"] / seconds["eight"], seconds["loop"] / seconds["one"]
    cells = [f"{name}, {alive} alive", f"{n_edges:,}", f"{seconds['eight']:.3f} s", f"{seconds['runs']:.3f} s", f"{by_sets:.1f}"]
    cells += [f"{seconds['one']:.3f} s", f"{seconds['loop']:.3f} s", f"{by_loop:.1f}", f"{apart / largest:.0e}"]
    print("|", " | ".join(cells), "|", flush=True)
    return (alive > SPARSE or by_sets >= WANTED_SETS) and (alive < DENSE or by_loop >= WANTED_LOOP)


def tell_growth(attributors: Mapping[str, Any], alive: int = 320) -> None:
    """Prints seconds while one of sets, length and alive components grows; with the length, what is alive grows too."""
    print("| | " + " | ".join(attributors) + " |\n|---|" + "---|" * len(attributors))
    for what, sizes in GROWTH.items():
        for size in sizes:
            n_sets, length = size if what == "sets" else SETS, size if what == "length" else LENGTH
            n_alive = size if what == "alive" else alive * length // LENGTH
            seconds = []
            for attributor in attributors.values():
                prompt = random_prompt(attributor.components, n_sets, length, n_alive)
                seconds.append(in_turns({"": lambda a=attributor, p=prompt: a([p])}, 3)[""])  # type: ignore[misc]
            cells = " | ".join(f"{s:.3f} s" for s in seconds)
            print(f"| {n_sets} sets, {length} tokens, {n_alive} alive | {cells} |", flush=True)


def random_prompt(components: Any, n_sets: int, length: int, alive: int) -> Any:
    """Makes a prompt of random tokens with random sets, in which half of what is alive is alive in all of them."""
    import torch

    from exactivations.datamodules.ci_prompts import CiPrompt
    from exactivations.store.ci_sets import CiSets

    generator = torch.Generator().manual_seed(0)
    values = {}
    for path, linear in components.maps.items():
        shape = (n_sets, length, linear.n_components)
        share = alive / MAPS / length / linear.n_components / 2
        shared, own = (torch.rand((n, *shape[1:]), generator=generator) < share for n in (1, n_sets))
        values[path] = torch.rand(shape, generator=generator).clamp(min=1e-3) * (shared | own)
    ids = torch.randint(4, 4096, (length,), generator=generator)
    return CiPrompt(ids, CiSets("random", tuple(f"set {n}" for n in range(n_sets)), values))


def in_turns(work: Mapping[str, Callable[[], Any]], turns: int) -> dict[str, float]:
    """Returns the median seconds of each, after one run that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in work}
    for turn in range(turns + 1):
        for name, do in work.items():
            began = time.perf_counter()
            do()
            if turn:
                seconds[name].append(time.perf_counter() - began)
    return {name: statistics.median(of) for name, of in seconds.items()}


def naive(attributor: Any, prompt: Any) -> dict[tuple[str, str], Any]:
    """The design document's loops over one set."""
    import torch

    components, options = attributor.components, attributor.options
    masks = {path: values for path, values in prompt.sets.values.items()}
    pre, post = {}, {}

    def cut(path: str, with_masks: bool) -> Callable[[Any], Any]:
        linear = components.maps[path]

        def run(x: Any) -> Any:
            pre[path] = x @ linear.V
            post[path] = pre[path].detach().requires_grad_()
            if with_masks:
                return linear.outward(post[path] * masks[path])
            return linear.outward(post[path]) + (x @ linear.delta()).detach()

        return run

    def embedding(module: Any, args: Any, out: Any) -> Any:
        post["wte"] = out.detach().requires_grad_()
        return post["wte"]

    def logits(with_masks: bool) -> Any:
        handle = components.model.get_input_embeddings().register_forward_hook(embedding)
        with components.running({path: cut(path, with_masks) for path in components.maps}):
            out = components.model(prompt.token_ids[None], use_cache=False).logits
        handle.remove()
        return out

    pre["output"] = logits(with_masks=True)
    alive = {path: mask[0] >= options.ci_threshold for path, mask in masks.items()}
    length = len(prompt.token_ids)
    alive["wte"] = torch.ones(length, 1, dtype=torch.bool)
    alive["output"] = pre["output"][0].softmax(-1) >= options.output_threshold
    if options.unmasked:
        pre["output"] = logits(with_masks=False)
    trimmed = {layer: of.any(0).nonzero()[:, 0].tolist() for layer, of in alive.items()}
    found = {}
    for paths in attributor.paths:
        target, sources = paths.target, paths.sources
        for source in sources:
            found[source, target] = torch.zeros(length, len(trimmed[source]), length, len(trimmed[target]))
        for s_out in range(length):
            for place_out, c_out in enumerate(trimmed[target]):
                if not alive[target][s_out, c_out]:
                    continue
                gradients = torch.autograd.grad(
                    pre[target][0, s_out, c_out], [post[source] for source in sources], retain_graph=True
                )
                for (source, over), gradient in zip(sources.items(), gradients, strict=True):
                    values = (gradient * post[source].detach())[0]
                    values = values.sum(-1, keepdim=True) if source == "wte" else values
                    for s_in in range(s_out + 1) if over else (s_out,):
                        for place_in, c_in in enumerate(trimmed[source]):
                            if alive[source][s_in, c_in]:
                                found[source, target][s_in, place_in, s_out, place_out] = values[s_in, c_in]
    return found


if __name__ == "__main__":
    main()
