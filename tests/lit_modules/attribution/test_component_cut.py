"""Cut forward passes of models that work in place, flatten positions, or have a head that is no plain linear map."""

import pytest
import torch
import transformers as t
from torch import nn

from exactivations.lit_modules.attribution.attribution_paths import find_paths
from exactivations.lit_modules.attribution.component_cut import logits
from exactivations.lit_modules.attribution.local_attributor import LocalAttributor
from exactivations.lit_modules.decomposition.component_model import ComponentModel
from exactivations.store.errors import InvalidInputError
from tests.lit_modules.decompositions import MAPS, ToyLanguageModel, naive, random_prompt
from tests.lit_modules.pairs import language_model

IDS = torch.tensor([[7, 33, 8, 91], [44, 12, 70, 9]])
TOKENS = torch.tensor([3, 50, 98])
FALCON = t.FalconConfig(vocab_size=99, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, bias=True)
OPT = t.OPTConfig(
    vocab_size=99, hidden_size=32, word_embed_proj_dim=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4,
    max_position_embeddings=64, dropout=0.0,
)  # fmt: skip

pytestmark = pytest.mark.filterwarnings("ignore:set .* it does not explain the model's prediction")  # sets at random do not


class InPlace(ToyLanguageModel):
    """Changes in place what the token embedding wrote and a map has read."""

    def __init__(self, config):
        super().__init__(config)
        self.embed, self.head = nn.Embedding(99, 8), nn.Linear(8, 99)
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, input_ids):
        x = self.embed(input_ids)
        x += self.down(self.up(x).tanh_())
        return t.modeling_outputs.CausalLMOutput(logits=self.head(x))


def test_a_model_that_adds_in_place_has_the_attributions_of_one_gradient_at_a_time():
    components = ComponentModel.from_random(language_model("falcon", config=FALCON), MAPS["gpt_neox"], 6, 0)
    prompt = random_prompt(components, 2)
    (found,) = LocalAttributor(components, "falcon")([prompt])
    for name in prompt.sets.names:
        expected, _ = naive(components, prompt, name)
        pairs = {(pair.source, pair.target): pair for pair in found.by_set[name]}
        assert {key for key, values in expected.items() if values.any()} <= set(pairs)
        for key, pair in pairs.items():
            index, values = pair.edges()
            torch.testing.assert_close(values.double(), expected[key][tuple(index.T)], rtol=1e-5, atol=1e-6)


def test_what_a_model_later_does_in_place_to_what_a_map_read_is_no_path_into_the_map():
    torch.manual_seed(0)
    paths = find_paths(ComponentModel.from_svd(InPlace(t.PreTrainedConfig()), ["up", "down"]))
    assert {p.target: p.sources for p in paths} == {
        "up": {"wte": False},
        "down": {"up": False},
        "output": {"wte": False, "down": False},
    }


@pytest.mark.parametrize("n_sets", [1, 2])
def test_maps_that_read_positions_and_rows_as_one_are_refused_in_words(n_sets):
    components = ComponentModel.from_svd(language_model("opt", config=OPT), ["*.fc1", "*.fc2"], 6)
    with pytest.raises(
        InvalidInputError, match=r"map model\.decoder\.layers\.0\.fc1 reads \[4, 32\] for a batch \[1, 4\]: only maps"
    ):
        LocalAttributor(components, "opt")([random_prompt(components, n_sets)])


class Scaled(nn.Linear):
    def forward(self, x):
        return 3 * super().forward(x)


class Bilinear(nn.Module):
    """A head that is no nn.Linear."""

    def __init__(self, linear):
        super().__init__()
        self.weight = linear.weight

    def forward(self, x):
        return (x @ self.weight.T) * x.mean(-1, keepdim=True)


@pytest.mark.parametrize("head", ["plain", "scaled", "other"])
def test_logits_of_some_tokens_are_those_of_all_whatever_the_head_is(head):
    model = language_model("llama")
    linear = model.lm_head
    if head == "scaled":
        model.lm_head = Scaled(32, 99, bias=False).double()
        model.lm_head.weight = linear.weight
    elif head == "other":
        model.lm_head = Bilinear(linear)
    with torch.no_grad():
        some, whole = logits(model, IDS, TOKENS), logits(model, IDS)
    torch.testing.assert_close(some, whole[..., TOKENS], rtol=0, atol=1e-12)


def test_an_error_is_laid_to_the_heads_restriction_only_if_it_comes_after_it():
    model = language_model("llama")

    def fails(*_):
        raise RuntimeError("out of memory")

    handle = model.model.register_forward_pre_hook(fails)
    with pytest.raises(RuntimeError, match=r"^out of memory$"):
        logits(model, IDS, TOKENS)
    handle.remove()
    forward = model.forward
    model.forward = lambda ids, **arguments: needs_all(forward(ids, **arguments))
    with pytest.raises(InvalidInputError, match="LlamaForCausalLM cannot compute the logits of some tokens only"):
        logits(model, IDS, TOKENS)


def needs_all(output):
    return t.modeling_outputs.CausalLMOutput(logits=output.logits + torch.ones(99))
