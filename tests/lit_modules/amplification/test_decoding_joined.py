"""Rows that join a decoding half-way, and those whose neighbours leave, become what each becomes alone."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from exactivations.lit_modules.amplification.decoding import Decoding, Prompts, Rows, generate
from exactivations.lit_modules.amplification.model_pair import ModelPair
from exactivations.lit_modules.amplification.row_sampling import RowSampling
from tests.lit_modules.pairs import FAMILIES, language_model, pair

ENDING = frozenset(range(5, 99, 9))
PAIRS = {}


def models(family, dtype):
    if (family, dtype) not in PAIRS:
        windows = family == "gemma2"  # its window is shorter than these texts
        far = {name: language_model(family, seed, dtype) for seed, name in enumerate(("after", "before"))} if windows else None
        PAIRS[family, dtype] = ModelPair(**(far or pair(family, dtype)))
    return PAIRS[family, dtype]


def rows_of(*asks):
    alpha, temperature, top_p, seed, n = zip(*asks, strict=True)
    doubles = [torch.tensor(values, dtype=torch.float64) for values in (alpha, temperature, top_p)]
    return Rows(torch.arange(len(asks)), doubles[0], RowSampling(*doubles[1:], torch.tensor(seed)), torch.tensor(n))


def decoding(of, prompts, asks, scores=False):
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.arange(longest) >= longest - torch.tensor([len(prompt) for prompt in prompts])[:, None]
    return Decoding(Prompts(of, ids, mask), rows_of(*asks), eos_token_ids=ENDING, scores=scores)


def alone(of, prompt, ask, scores=False):
    done = generate(Decoding(Prompts(of, torch.tensor([prompt])), rows_of(ask), eos_token_ids=ENDING, scores=scores))
    return done.token_ids.tolist(), None if done.scores is None else torch.stack([*vars(done.scores).values()])


asks = st.tuples(
    st.sampled_from([-1.0, 0.0, 0.5, 2.0]), st.sampled_from([0.0, 0.7, 1.3]), st.sampled_from([0.5, 1.0]),
    st.integers(0, 2**63 - 1), st.integers(1, 14),
)  # fmt: skip
arrivals = st.tuples(
    st.integers(0, 6),  # steps before it comes
    st.lists(st.tuples(st.lists(st.integers(6, 98), min_size=1, max_size=9), asks), min_size=1, max_size=3),
    st.booleans(),  # scored
)


@pytest.mark.parametrize(
    ("family", "dtype"),
    [*((family, torch.float64) for family in FAMILIES), *((family, torch.float32) for family in (*FAMILIES, "gemma2"))],
)
@given(waves=st.lists(arrivals, min_size=1, max_size=4), dropped=st.sets(st.integers(0, 11), max_size=3), data=st.data())
@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_rows_admitted_at_any_step_among_any_neighbours_are_those_alone(family, dtype, waves, dropped, data):
    of, running = models(family, dtype), None
    expected, found, scores, by_number, n_given = [], {}, {}, {}, 0
    for steps, wave, scored in waves:
        prompts, wanted = [prompt for prompt, _ in wave], [ask for _, ask in wave]
        expected += [(alone(of, prompt, ask, scored)) for prompt, ask in wave]
        entering = decoding(of, prompts, wanted, scored)
        if running is None or not len(running.living):
            running, by_number, numbers = entering, {}, entering.living
        else:
            numbers = running.join(entering)
        by_number |= dict(zip(numbers.tolist(), range(n_given, n_given + len(wave)), strict=True))
        n_given += len(wave)
        leaving = [number for number, i in by_number.items() if i in dropped]
        running.drop(torch.tensor(leaving, dtype=torch.int64))
        for _ in range(steps if wave is not waves[-1][1] else 20):
            if not len(running.living):
                break
            step = running.step()
            values = iter(() if step.scores is None else torch.stack([*vars(step.scores).values()]).unbind(dim=1))
            for number, token in zip(step.row.tolist(), step.token.tolist(), strict=True):
                i = by_number[number]
                found.setdefault(i, []).append(token)
                if expected[i][1] is not None:
                    scores.setdefault(i, []).append(next(values))
            assert next(values, None) is None
    for i, (ids, known) in enumerate(expected):
        if i in dropped:
            continue
        assert found[i] == ids
        if known is not None:
            close = {"rtol": 1e-7, "atol": 1e-9} if dtype == torch.float64 else {"rtol": 1e-3, "atol": 1e-4}
            torch.testing.assert_close(torch.stack(scores[i], dim=1), known, **close)


def test_a_long_prompt_and_a_long_completion_of_another_row_do_not_add_up():
    of = models("gpt2", torch.float64)  # 64 positions
    long, short = [7] * 60, [44, 12]
    rows = [(1.0, 1.0, 1.0, 3, 4), (1.0, 0.8, 1.0, 4, 60)]
    joined = decoding(of, [long], rows[:1])
    joined.join(decoding(of, [short, [8]], [rows[1], rows[1]]))
    found = {}
    while len(joined.living):
        step = joined.step()
        for number, token in zip(step.row.tolist(), step.token.tolist(), strict=True):
            found.setdefault(number, []).append(token)
    assert [found[0], found[1], found[2]] == [alone(of, p, r)[0] for p, r in zip([long, short, [8]], [*rows, rows[1]], strict=True)]


def test_padding_leaves_with_the_row_that_needed_it():
    of = models("llama", torch.float64)
    shapes = []
    handle = of.after.register_forward_pre_hook(
        lambda _, __, a: shapes.append(None if a.get("attention_mask") is None else list(a["attention_mask"].shape)),
        with_kwargs=True,
    )
    both = decoding(of, [[9] * 20, [7, 8]], [(0.0, 1.0, 1.0, 3, 2), (0.0, 1.0, 1.0, 4, 9)])
    both._eos = torch.tensor([], dtype=torch.int64)
    while len(both.living):
        both.step()
    handle.remove()
    assert shapes[:2] == [[2, 20], [2, 21]] and set(map(str, shapes[2:])) == {"None"}


def test_a_row_that_overflows_is_named_and_the_others_go_on():
    of = models("llama", torch.float32)
    two = decoding(of, [[9, 8], [7]], [(1e39, 1.0, 1.0, 3, 5), (1.0, 1.0, 1.0, 4, 5)])
    with pytest.raises(ValueError, match="no token to draw"):
        two.step()
    assert two.overflowed().tolist() == [0]
    two.drop(torch.tensor([0]))
    assert generate_rest(two) == alone(of, [7], (1.0, 1.0, 1.0, 4, 5))[0]


def generate_rest(one):
    ids = []
    while len(one.living):
        ids += one.step().token.tolist()
    return ids
