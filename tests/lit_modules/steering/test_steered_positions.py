"""Which tokens are steered, against a loop over each token written out, whatever the padding and however the text is cut."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from exactivations.lit_modules.steering.steered_positions import ForwardPass, Generated
from exactivations.store.errors import InvalidInputError


class Cache:
    def __init__(self, length):
        self.length = length

    def get_seq_length(self):
        return torch.tensor(self.length)  # as a static one gives it


class Reads(torch.nn.Module):
    def forward(self, input_ids=None, attention_mask=None, past_key_values=None):
        raise AssertionError("only its signature is looked at")


def by_definition(positions, attention, n_prompt):
    """bool [B, T] of the whole text, token by token."""
    rows = []
    for r, row in enumerate(attention.tolist()):
        seen, marks = 0, []
        for column, real in enumerate(row):
            if positions == "all" if isinstance(positions, str) else False:
                wanted = True
            elif isinstance(positions, slice):
                wanted = (positions.start or 0) <= seen and (positions.stop is None or seen < positions.stop)
            elif isinstance(positions, Generated):
                wanted = column >= n_prompt
            else:
                wanted = column < n_prompt and bool(positions[r, column])
            marks.append(bool(real) and wanted)
            seen += int(real)
        rows.append(marks)
    return torch.tensor(rows)


@st.composite
def texts(draw):
    n_rows, n_prompt, n_new = draw(st.integers(1, 3)), draw(st.integers(1, 6)), draw(st.integers(0, 4))
    attention = torch.ones(n_rows, n_prompt + n_new, dtype=torch.long)
    left = draw(st.booleans())
    for row in attention:
        padding = draw(st.integers(0, n_prompt - 1))
        row[:padding] = 0 if left else 1
        row[n_prompt - padding : n_prompt] = 1 if left else 0
    start = draw(st.none() | st.integers(0, 7))
    stop = draw(st.none() | st.integers((start or 0) + 1, 12))
    marks = torch.tensor(draw(st.lists(st.booleans(), min_size=n_rows * n_prompt, max_size=n_rows * n_prompt))).reshape(n_rows, -1)
    marks &= attention[:, :n_prompt].bool()
    positions = draw(st.sampled_from(["all", slice(start, stop), Generated(n_prompt), marks]))
    cuts = sorted(draw(st.sets(st.integers(n_prompt, n_prompt + n_new)))) if n_new else []
    return attention, n_prompt, positions, [n_prompt, *cuts, n_prompt + n_new], draw(st.booleans())


@given(texts())
@settings(max_examples=300, deadline=None)
def test_a_text_read_in_any_pieces_is_steered_at_the_tokens_of_the_definition(case):
    attention, n_prompt, positions, ends, named = case
    expected = by_definition(positions, attention, n_prompt)
    ids, found, before = torch.zeros_like(attention), [], 0
    for end in ends:
        if end == before:
            continue
        args, kwargs = (ids[:, before:end], attention[:, :end], Cache(before)), {}
        if named:
            args, kwargs = (), dict(zip(("input_ids", "attention_mask", "past_key_values"), args, strict=True))
        found.append(ForwardPass.of(Reads(), args, kwargs).marked(positions))
        before = end
    assert torch.equal(torch.cat(found, dim=1), expected)
    whole = ForwardPass.of(Reads(), (), {"input_ids": ids, "attention_mask": attention}).marked(positions)
    assert torch.equal(whole, expected)
    if attention.all():
        unmasked = ForwardPass.of(Reads(), (), {"input_ids": ids}).marked(positions)
        assert torch.equal(unmasked, expected)


def test_a_prompt_read_in_pieces_is_refused_where_its_width_matters():
    first = ForwardPass.of(Reads(), (torch.zeros(1, 3),), {})
    assert first.marked(slice(1, None)).tolist() == [[False, True, True]]
    for positions in (Generated(4), torch.ones(1, 4, dtype=torch.bool)):
        with pytest.raises(InvalidInputError, match="one pass"):
            first.marked(positions)
