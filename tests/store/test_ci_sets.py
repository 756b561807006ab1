"""Sets of causal importances come back as they were written; what is none of them is refused by set, layer and position."""

import json
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from exactivations.store.ci_sets import CiSets, read_ci_sets, write_ci_sets
from exactivations.store.errors import ExactivationsError, InvalidInputError, StoreError

GOOD = {
    "prompt": "They walked hand in",
    "ci_sets": {
        "seed_0": {"h.0": [[0, 0.5], [1, 0.25]], "h.1": [[1e-7, 0, 1], [0, 0, 0]]},
        "seed_1": {"h.1": [[0, 0, 1], [1, 1, 1]], "h.0": [[0.125, 1.0], [0, 0]]},
    },
}


def refuses(message):
    return pytest.raises(InvalidInputError, match=message)


def read(content, tmp_path):
    file = tmp_path / "ci.json"
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    return read_ci_sets(file)


def changed(where, value):
    content = json.loads(json.dumps(GOOD))
    at = content
    for key in where[:-1]:
        at = at[key]
    at[where[-1]] = value
    return content


def test_the_documents_format_is_read_layer_by_layer_whatever_the_order_in_a_set(tmp_path):
    sets = read(GOOD, tmp_path)
    assert (sets.prompt, sets.names, list(sets.values)) == ("They walked hand in", ("seed_0", "seed_1"), ["h.0", "h.1"])
    assert sets.values["h.0"].dtype == torch.float32 and sets.n_positions == 2
    assert sets.values["h.0"].tolist() == [[[0, 0.5], [1, 0.25]], [[0.125, 1], [0, 0]]]
    assert sets.alive(1e-6)["h.1"].tolist() == [[[False, False, True], [False] * 3], [[False, False, True], [True] * 3]]
    assert sets.alive(0.5)["h.0"].tolist() == [[[False, True], [True, False]], [[False, True], [False, False]]]
    one = sets.one("seed_1")
    assert one.names == ("seed_1",) and torch.equal(one.values["h.1"][0], sets.values["h.1"][1])


FILE_NAMES = st.text(st.characters(exclude_categories=["Cc", "Cs"], exclude_characters="/\\"), min_size=1, max_size=5).filter(
    lambda name: name not in (".", "..")
)


@given(
    st.text(max_size=20),
    st.lists(FILE_NAMES, min_size=1, max_size=3, unique=True),
    st.dictionaries(st.text(max_size=5), st.integers(1, 4), min_size=1, max_size=3),
    st.integers(1, 3),
    st.randoms(use_true_random=False),
)
def test_what_is_written_is_read_back_to_the_bit(tmp_path_factory, prompt, names, widths, length, random):
    def number():
        return random.choice([0.0, 1.0, 1e-6, 1e-45, 1 - 2**-24, random.random()])

    values = {
        layer: torch.tensor([[[number() for _ in range(width)] for _ in range(length)] for _ in names])
        for layer, width in widths.items()
    }
    file = tmp_path_factory.mktemp("ci") / "sets.json"
    write_ci_sets(file, CiSets(prompt, tuple(names), values))
    found = read_ci_sets(file)
    assert (found.prompt, found.names, list(found.values)) == (prompt, tuple(names), list(values))
    assert all(torch.equal(found.values[layer], of) for layer, of in values.items())


JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["prompt", "ci_sets", "seed_0", "h.0"]), inner),
    max_leaves=12,
)
PLACES = [
    (), ("prompt",), ("ci_sets",), ("ci_sets", "seed_0"), ("ci_sets", "seed_1", "h.0"), ("ci_sets", "seed_1", "h.0", 1),
    ("ci_sets", "seed_0", "h.1", 0, 2),
]  # fmt: skip


@given(st.sampled_from(PLACES), JSON)
def test_whatever_stands_somewhere_in_it_is_either_valid_or_refused_with_the_files_name(tmp_path_factory, where, value):
    file = tmp_path_factory.getbasetemp() / "any.json"
    file.write_text(json.dumps(changed(where, value) if where else value))
    try:
        sets = read_ci_sets(file)
    except ExactivationsError as error:
        assert str(error).startswith(str(file))
    else:
        assert all(((of >= 0) & (of <= 1)).all() and of.shape[1] == sets.n_positions for of in sets.values.values())


@pytest.mark.parametrize(
    ("where", "value", "message"),
    [
        (("ci_sets",), {}, "ci_sets is empty"),
        (("ci_sets", "seed_1"), {}, "set 'seed_0' has layer 'h.0', set 'seed_1' has not"),
        (("ci_sets",), {"seed_0": {}}, "set 'seed_0' has no layers"),
        (("ci_sets", "seed_1", "h.2"), [[0], [0]], "set 'seed_1' has layer 'h.2', set 'seed_0' has not"),
        (("ci_sets", "seed_1", "h.0"), [[0, 1]], "set 'seed_1', layer 'h.0': 1 positions of 2 components, in set 'seed_0' 2 of 2"),
        (("ci_sets", "seed_1", "h.0"), [[0], [1]], "set 'seed_1', layer 'h.0': 2 positions of 1 components"),
        (("ci_sets", "seed_1", "h.0"), [[0, 1], [1]], "set 'seed_1', layer 'h.0', position 1: 1 components, position 0 has 2"),
        (("ci_sets", "seed_1", "h.0"), [], "set 'seed_1', layer 'h.0': expected a list of positions, got \\[\\]"),
        (("ci_sets", "seed_1", "h.0", 1), [], "set 'seed_1', layer 'h.0', position 1: expected a list of components, got \\[\\]"),
        (("ci_sets", "seed_0", "h.1", 1, 2), 1.5, "set 'seed_0', layer 'h.1', position 1: component 2 .* 1.5, expected a number"),
        (("ci_sets", "seed_0", "h.1", 1, 2), -1e-9, "set 'seed_0', layer 'h.1', position 1: component 2 .* -1e-09"),
        (("ci_sets", "seed_0", "h.1", 0, 0), float("nan"), "set 'seed_0', layer 'h.1', position 0: component 0 .* nan"),
        (("ci_sets", "seed_0", "h.1", 0, 0), "0.5", "set 'seed_0', layer 'h.1', position 0: component 0 .* '0.5'"),
        (("ci_sets", "seed_0", "h.1", 0, 0), True, "set 'seed_0', layer 'h.1', position 0: component 0 .* True"),
        (("prompt",), None, 'expected {"prompt": text'),
    ],
)
def test_each_refusal_names_set_layer_and_position(where, value, message, tmp_path):
    with refuses(f"ci.json: {message}"):
        read(changed(where, value), tmp_path)


def test_files_that_are_none_of_these_are_refused(tmp_path):
    with refuses("cannot be read as JSON"):
        read("{", tmp_path)
    with refuses("cannot be read as JSON"):
        read_ci_sets(tmp_path / "missing.json")
    with refuses("'seed_0' is there twice"):
        read('{"prompt": "", "ci_sets": {"seed_0": {"h": [[0]]}, "seed_0": {"h": [[1]]}}}', tmp_path)
    with refuses(r"ci\.json cannot be read as JSON: Exceeds the limit"):
        read(json.dumps(GOOD).replace("0.125", "1" * 5000), tmp_path)
    one = read(GOOD, tmp_path)
    with pytest.raises(StoreError, match="cannot write"):
        write_ci_sets(tmp_path / "nowhere" / "ci.json", one)
    with refuses("there is no set 'seed_7', only 'seed_0', 'seed_1'"):
        one.one("seed_7")
    with refuses("set 's': layer 'b' has 3 positions, layer 'a' 2"):
        CiSets("", ("s",), {"a": torch.ones(1, 2, 2), "b": torch.ones(1, 3, 2)})
    with refuses(r"layer 'a' has causal importances of shape \[2, 2, 2\], expected \[1 sets"):
        CiSets("", ("s",), {"a": torch.ones(2, 2, 2)})
    with refuses("set 's', layer 'a', position 1: component 0 has the causal importance inf"):
        CiSets("", ("s",), {"a": torch.tensor([[[0.0], [torch.inf]]])})
    with refuses("sets need names, each another one"):
        CiSets("", ("s", "s"), {"a": torch.ones(2, 2, 2)})


@pytest.mark.parametrize("name", ["", ".", "..", "../../evil", "a/b", "a\\b", "a\n", "\x00", "\x85", "\udc80", "x.safetensors"])
def test_names_of_sets_that_are_no_file_names_are_refused(name, tmp_path):
    content = {**GOOD, "ci_sets": {name: GOOD["ci_sets"]["seed_0"]}}
    with refuses(f"ci.json: set {re.escape(repr(name))}: what is written of a set is called as the set"):
        read(content, tmp_path)


def test_a_prompt_that_is_no_text_is_refused(tmp_path):
    with refuses(r"ci\.json: the prompt '\\ud800' has a lone surrogate"):
        read({**GOOD, "prompt": "\ud800"}, tmp_path)
