"""Attributions made by hand: three tokens, a block with queries, keys and values apart, two outputs; some sets have nothing."""

import torch

from exactivations.store.attributions import OUTPUT, WTE, Attributions, Made, PairAttribution, edge_places

MAPS = {"m.0.q_proj": 3, "m.0.k_proj": 3, "m.0.v_proj": 3, "m.0.o_proj": 4, "m.1.up": 5}
TOKENS = ("a", " b", "\n")
VOCABULARY = 9
DIRECT = [
    (WTE, "m.0.q_proj"),
    (WTE, "m.0.k_proj"),
    (WTE, "m.0.v_proj"),
    ("m.0.o_proj", "m.1.up"),
    ("m.1.up", OUTPUT),
    (WTE, OUTPUT),
]
OVER = [("m.0.k_proj", "m.0.o_proj"), ("m.0.v_proj", "m.0.o_proj")]
EMPTY = "empty"


def attributions_of(names=("seed_0", "seed_1"), *, own=True, tokens=TOKENS, output_tokens=None, share=0.5, scale=1.0):
    """Random attributions, each set's from its own seed; a set that is called "empty" has nothing alive but the embedding."""
    length, alive, by_set, probabilities = len(tokens), {}, {}, []
    generator = torch.Generator().manual_seed(99)
    sizes = {WTE: 1, **MAPS, OUTPUT: VOCABULARY}
    original = {layer: torch.rand(length, size, generator=generator) < 0.8 for layer, size in sizes.items() if layer != WTE}
    original[OUTPUT] = torch.zeros(length, VOCABULARY, dtype=torch.bool)
    original[OUTPUT][-1, 4] = True  # a token that no set predicts
    for number, name in enumerate(names):
        generator = torch.Generator().manual_seed(number)
        of_set = {layer: torch.rand(length, size, generator=generator) < share * (name != EMPTY) for layer, size in MAPS.items()}
        of_output = torch.zeros(length, VOCABULARY, dtype=torch.bool)
        of_output[-1, [1, 7]] = name != EMPTY
        alive[name] = {WTE: torch.ones(length, 1, dtype=torch.bool), **of_set, OUTPUT: of_output}
        of_tokens = torch.full((length, VOCABULARY), 0.1 / (VOCABULARY - 2))
        of_tokens[:, 1], of_tokens[:, 7] = 0.6 - 0.1 * number, 0.3 + 0.1 * number
        probabilities.append(of_tokens)
        by_set[name] = [
            _pair(alive[name], original if own else {}, source, target, generator, scale) for source, target in DIRECT + OVER
        ]
        by_set[name] = [pair for pair in by_set[name] if pair.trimmed_c_in_idxs and pair.trimmed_c_out_idxs]
    return Attributions(
        Made("demo", 1e-6, 0.1, False, None), "".join(tokens), tokens, tuple(range(length)), by_set, torch.stack(probabilities),
        alive, original if own else {OUTPUT: original[OUTPUT]}, output_tokens or {1: " x", 4: "y", 7: "\n"},
    )  # fmt: skip


def _pair(alive, original, source, target, generator, scale):
    over = (source, target) in OVER
    kept = [alive[layer][:, alive[layer].any(0)] for layer in (source, target)]
    values = torch.randn(len(edge_places(*kept, over)), generator=generator) * scale
    values[::7] = 0  # as of a path that is closed: no edge
    return PairAttribution.between(source, target, values, over, alive, original)


def edges_by_hand(attributions, name, threshold=0.0):
    """The edges of a set as {((layer, position, component), (…)): value}, by loops over the document's dense tensors."""
    found = {}
    for pair in attributions.by_set[name]:
        dense = pair.attribution
        for s_in, i, s_out, o in dense.nonzero().tolist():
            value = float(dense[s_in, i, s_out, o])
            if abs(value) >= threshold:
                source, target = (pair.source, s_in, pair.trimmed_c_in_idxs[i]), (pair.target, s_out, pair.trimmed_c_out_idxs[o])
                found[source, target] = value
    return found
