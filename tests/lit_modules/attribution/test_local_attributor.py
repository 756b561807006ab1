"""Attributions are what the definition gives, whatever else is in the batch, and what theory says where it says something."""

import json

import lightning.pytorch as pl
import pytest
import torch
import transformers as t
from torch import nn

from exactivations.callbacks.attribution_writer import AttributionWriter
from exactivations.datamodules.ci_prompts import CiPrompt, CiPromptDataModule
from exactivations.lit_modules.attribution.attribution_paths import find_paths
from exactivations.lit_modules.attribution.component_cut import cut_pass, many_gradients
from exactivations.lit_modules.attribution.local_attributor import AttributionOptions, LocalAttributor
from exactivations.lit_modules.decomposition.component_model import ComponentModel
from exactivations.store.attributions import read_attributions, write_attributions
from exactivations.store.ci_sets import CiSets, write_ci_sets
from exactivations.store.errors import InvalidInputError
from tests.lit_modules.decompositions import MAPS, OVER_POSITIONS, THRESHOLD, ToyLanguageModel, decomposed, naive, random_prompt
from tests.lit_modules.pairs import language_model

# Norms and rotary angles of Hugging Face models compute in float32 also where the model is in float64.
TOLERANCE = {"rtol": 1e-5, "atol": 1e-6}

pytestmark = pytest.mark.filterwarnings("ignore:set .* it does not explain the model's prediction")  # sets at random do not


def refuses(message):
    return pytest.raises(InvalidInputError, match=message)


def dense_of(pair, like):
    """A pair's attributions over all components, as the naive loops have them."""
    full = torch.zeros_like(like)
    index, values = pair.edges()
    full[tuple(index.T)] = values.to(full.dtype)
    return full


def assert_same(mine, other):
    assert [(p.source, p.target) for p in mine] == [(p.source, p.target) for p in other]
    for a, b in zip(mine, other, strict=True):
        torch.testing.assert_close(a.values, b.values, **TOLERANCE)
        assert a.trimmed_c_in_idxs == b.trimmed_c_in_idxs and a.trimmed_c_out_idxs == b.trimmed_c_out_idxs


@pytest.mark.parametrize("unmasked", [False, True], ids=["masked", "unmasked"])
@pytest.mark.parametrize("n_sets", [1, 4])
@pytest.mark.parametrize("family", MAPS)
def test_attributions_are_those_of_one_gradient_at_a_time(family, n_sets, unmasked):
    components = decomposed(family)
    prompt = random_prompt(components, n_sets)
    (found,) = LocalAttributor(components, family, AttributionOptions(unmasked=unmasked))([prompt])
    assert found.set_names == prompt.sets.names and found.token_ids == tuple(prompt.token_ids.tolist())
    alive = [{path: pair.trimmed_c_in_idxs for pair in of for path in [pair.source]} for of in found.by_set.values()]
    assert n_sets == 1 or alive[0] != alive[1]
    for n, name in enumerate(prompt.sets.names):
        expected, probabilities = naive(components, prompt, name, unmasked)
        torch.testing.assert_close(found.output_probabilities[n], probabilities.float(), rtol=0, atol=1e-6)
        pairs = {(pair.source, pair.target): pair for pair in found.by_set[name]}
        assert {key for key, values in expected.items() if values.any()} <= set(pairs)
        for key, pair in pairs.items():
            torch.testing.assert_close(dense_of(pair, expected[key]), expected[key], **TOLERANCE)
            mine = pair.attribution
            assert mine.shape == (5, len(pair.trimmed_c_in_idxs), 5, len(pair.trimmed_c_out_idxs))
            assert 0 not in pair.trimmed_c_in_idxs or pair.source == "wte" or (prompt.sets.values[pair.source][n, 1:, 0] > 0).any()
            trimmed = expected[key][:, list(pair.trimmed_c_in_idxs)][..., list(pair.trimmed_c_out_idxs)]
            torch.testing.assert_close(mine.double(), trimmed, **TOLERANCE)
            last = key[0].rsplit(".", 1)[-1], key[1].rsplit(".", 1)[-1]
            same_block = key[0].rsplit(".", 1)[0] == key[1].rsplit(".", 1)[0]
            assert pair.is_kv_to_o_pair == (last in OVER_POSITIONS and same_block)
            assert not mine.permute(1, 3, 0, 2).tril(-1).any()  # nothing flows backwards in position


@pytest.mark.parametrize("unmasked", [False, True], ids=["masked", "unmasked"])
@pytest.mark.parametrize("family", MAPS)
def test_sets_together_are_sets_one_by_one_whatever_is_beside_them_and_however_little_memory_there_is(family, unmasked):
    components = decomposed(family)
    prompts = [random_prompt(components, 3, seed=1), random_prompt(components, 2, seed=2, own="set 1")]
    attributor = LocalAttributor(components, family, AttributionOptions(unmasked=unmasked))
    together = attributor(prompts)
    in_bits = LocalAttributor(components, family, AttributionOptions(unmasked=unmasked, memory_mib=1e-6))(prompts)
    for prompt, found, chunked in zip(prompts, together, in_bits, strict=True):
        assert found.prompt == prompt.sets.prompt
        for n, name in enumerate(prompt.sets.names):
            (alone,) = attributor([CiPrompt(prompt.token_ids, prompt.sets.one(name))])
            assert_same(found.by_set[name], alone.by_set[name])
            assert_same(found.by_set[name], chunked.by_set[name])
            torch.testing.assert_close(found.output_probabilities[n], alone.output_probabilities[0], rtol=0, atol=1e-6)
    own = together[1].alive["set 1"]
    for pair in together[1].by_set["set 0"]:
        assert pair.source == "wte" or torch.equal(pair.original_alive_mask_in, own[pair.source])
        with torch.no_grad():
            original = components.model(prompts[1].token_ids[None]).logits[0].softmax(-1) >= 0.1
        assert torch.equal(pair.original_alive_mask_out, original if pair.target == "output" else own[pair.target])


class LinearModel(ToyLanguageModel):
    """A causal language model that is linear in its token embeddings: residual blocks, and a fixed mean over what came before."""

    looks_ahead = False

    def __init__(self, config):
        super().__init__(config)
        self.embed = nn.Embedding(20, 8)
        self.v = nn.ModuleList(nn.Linear(8, 8, bias=False) for _ in range(2))
        self.o = nn.ModuleList(nn.Linear(8, 8, bias=False) for _ in range(2))
        self.up = nn.ModuleList(nn.Linear(8, 12, bias=False) for _ in range(2))
        self.down = nn.ModuleList(nn.Linear(12, 8, bias=False) for _ in range(2))
        self.head = nn.Linear(8, 20, bias=False)

    def forward(self, input_ids):
        x = self.embed(input_ids)
        n = input_ids.shape[1]
        mean = torch.ones(n, n, dtype=x.dtype).tril() / torch.arange(1, n + 1)[:, None]
        mean = mean.T if self.looks_ahead else mean
        for v, o, up, down in zip(self.v, self.o, self.up, self.down, strict=True):
            x = x + o(mean @ v(x))
            x = x + down(up(x))
        return t.modeling_outputs.CausalLMOutput(logits=self.head(x))


@pytest.fixture(scope="module")
def linear():
    torch.manual_seed(0)
    model = LinearModel(t.PreTrainedConfig()).double().train(False)
    with torch.no_grad():
        model.head.weight.mul_(6)
    components = ComponentModel.from_svd(model, ["v.*", "o.*", "up.*", "down.*"])
    generator = torch.Generator().manual_seed(3)
    values = {
        path: THRESHOLD + (1 - THRESHOLD) * torch.rand(2, 4, m.n_components, generator=generator)
        for path, m in components.maps.items()
    }
    return components, CiPrompt(torch.tensor([3, 1, 4, 1]), CiSets("linear", ("a", "b"), values))


@pytest.mark.parametrize("unmasked", [False, True], ids=["masked", "unmasked"])
def test_in_a_linear_network_attributions_into_a_target_sum_to_it(linear, unmasked):
    components, prompt = linear
    (found,) = LocalAttributor(components, "linear", AttributionOptions(unmasked=unmasked))([prompt])
    masks = {path: values.double() for path, values in prompt.sets.values.items()}
    passed = cut_pass(components, prompt.token_ids.expand(2, -1), components.maps, None if unmasked else masks)
    n_outputs = 0
    for n, name in enumerate(prompt.sets.names):
        total = {target: torch.zeros(passed.ends["output"].shape[1], 20) for target in [*components.maps, "output"]}
        for pair in found.by_set[name]:
            index, values = pair.edges()
            total[pair.target].index_put_((index[:, 2], index[:, 3]), values, accumulate=True)
            n_outputs += pair.target == "output"
        for target, sums in total.items():
            reads = passed.ends[target][n] if target == "output" else passed.inner[target][n]
            alive = found.alive[name][target]
            torch.testing.assert_close(sums[:, : alive.shape[1]][alive], reads.detach()[alive].float(), rtol=1e-5, atol=1e-5)
    assert n_outputs


def test_an_ablated_source_changes_a_linear_target_by_exactly_its_attribution(linear):
    components, prompt = linear
    (found,) = LocalAttributor(components, "linear")([prompt])
    masks = {path: values[:1].double() for path, values in prompt.sets.values.items()}

    def logits(of):
        with torch.no_grad(), components.masked(of):
            return components.model(prompt.token_ids[None]).logits[0]

    (pair,) = [pair for pair in found.by_set["a"] if (pair.source, pair.target) == ("down.1", "output")]
    for (s_in, c_in, s_out, c_out), value in zip(*pair.edges(), strict=True):
        ablated = {**masks, "down.1": masks["down.1"].clone()}
        ablated["down.1"][0, s_in, c_in] = 0
        torch.testing.assert_close((logits(masks) - logits(ablated))[s_out, c_out].float(), value, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("family", MAPS)
def test_paths_are_direct_and_lead_forwards_only(family):
    paths = {p.target: p.sources for p in find_paths(decomposed(family))}
    order = ["wte", *paths]
    writes_to_stream = [m for m in paths if m.endswith(("attention.dense", "o_proj", "c_proj", "4h_to_h", "down_proj"))]
    for target, sources in paths.items():
        assert all(order.index(source) < order.index(target) for source in sources)
        *parts, last = target.split(".")
        if last in ("o_proj", "dense") or [*parts[-1:], last] == ["attn", "c_proj"]:  # behind attention: its own block's only
            assert all(source.startswith(".".join(parts)) for source in sources) and any(sources.values())
        elif last in ("dense_4h_to_h", "down_proj", "c_proj"):  # behind the nonlinearity
            assert all(source.startswith(".".join(parts)) for source in sources) and not any(sources.values())
        else:  # reads the stream: from all before it that write to it, and from no map that reads it
            assert set(sources) <= {"wte", *writes_to_stream} and not any(sources.values())
    assert set(paths["output"]) == {"wte", *writes_to_stream}


def test_where_attention_is_not_decomposed_positions_are_found_to_meet_in_it():
    components = ComponentModel.from_svd(language_model("llama"), ["*.up_proj", "*.down_proj"])
    paths = {p.target: p.sources for p in find_paths(components)}
    up, down = "model.layers.{}.mlp.up_proj", "model.layers.{}.mlp.down_proj"
    assert paths[up.format(1)] == {"wte": True, down.format(0): True}
    assert paths[down.format(1)] == {"wte": True, down.format(0): True, up.format(1): False}  # by the gate, which is not decomposed
    prompt = random_prompt(components, 1, share=1.0)
    (found,) = LocalAttributor(components, "llama")([prompt])
    (pair,) = [p for p in found.by_set["set 0"] if (p.source, p.target) == (down.format(0), up.format(1))]
    assert pair.is_kv_to_o_pair and pair.attribution[0, :, 3].any() and not pair.attribution[3, :, 0].any()


def test_what_would_be_computed_one_gradient_at_a_time_or_looks_ahead_is_refused(linear):
    components = ComponentModel.from_svd(language_model("llama", attn_implementation="sdpa"), ["*_proj"])
    passed = cut_pass(components, torch.tensor([[7, 8, 9]]), components.maps)
    end, start = (of["model.layers.0.self_attn." + name] for of, name in ((passed.ends, "o_proj"), (passed.starts, "v_proj")))
    with refuses("an operation whose gradients cannot be computed together: There is a performance drop"):
        many_gradients(end, [start], torch.ones(2, *end.shape, dtype=end.dtype))
    assert components.model.config._attn_implementation == "sdpa"
    assert find_paths(components)  # which has attention computed by plain matrix products meanwhile
    assert components.model.config._attn_implementation == "sdpa"
    torch.manual_seed(0)
    ahead = LinearModel(t.PreTrainedConfig())
    ahead.looks_ahead = True
    with refuses("o.0 of LinearModel depends on v.0 at later positions: attributions need a causal model"):
        find_paths(ComponentModel.from_svd(ahead, ["v.*", "o.*"]))


def test_nothing_alive_is_an_empty_result_and_said():
    components = decomposed("gpt2")
    prompt = random_prompt(components, 2)
    for values in prompt.sets.values.values():
        values[0] = 0.5 * THRESHOLD
    with pytest.warns(UserWarning, match="set 'set 0' of 'prompt 0': no component is alive at any position; its result is empty"):
        (found,) = LocalAttributor(components, "gpt2", AttributionOptions(output_threshold=1.0))([prompt])
    assert found.by_set["set 0"] == [] and found.by_set["set 1"]
    with pytest.warns(UserWarning, match="no component is alive at any position; only wte -> output is left"):
        (found,) = LocalAttributor(components, "gpt2", AttributionOptions(output_threshold=1e-9))([prompt])
    assert [(pair.source, pair.target) for pair in found.by_set["set 0"]] == [("wte", "output")]


def test_a_set_that_breaks_the_prediction_is_told_with_both_probabilities_and_written(tmp_path):
    model = language_model("gpt_neox")
    components = ComponentModel.from_svd(model, MAPS["gpt_neox"])
    ids = torch.tensor([11, 34, 70, 9])
    with torch.no_grad():
        own = model(input_ids=ids[None]).logits[0, -1].softmax(-1)
    values = {
        path: torch.stack([torch.ones(4, m.n_components), torch.zeros(4, m.n_components)]) for path, m in components.maps.items()
    }
    for of_map in values.values():
        of_map[1, :, :2] = 1
    prompt = CiPrompt(ids, CiSets("p", ("whole", "broken"), values))
    with components.masked({path: of[1:].double() for path, of in values.items()}), torch.no_grad():
        masked = model(input_ids=ids[None]).logits[0, -1].softmax(-1)
    token, top = int(own.argmax()), int(masked.argmax())
    assert token != top
    options = AttributionOptions(output_threshold=float(own[token] + masked[token]) / 2)
    attributor = LocalAttributor(components, "tiny", options, decode=lambda token: f"<{token}>")
    with pytest.warns(UserWarning, match=f"set 'broken' of 'p': it does not explain the model's prediction '<{token}>'") as caught:
        (found,) = attributor([prompt])
    assert not any("'whole'" in str(warning.message) for warning in caught)
    broken = found.predictions["broken"]
    assert (broken.token, broken.top, broken.text, broken.top_text) == (token, top, f"<{token}>", f"<{top}>")
    told = (broken.probability, broken.of_set, broken.top_probability)
    assert told == pytest.approx((own[token].item(), masked[token].item(), masked[top].item()), abs=1e-6)
    assert found.predictions["whole"].of_set == pytest.approx(own[token].item(), abs=1e-5) and list(found.faults) == ["broken"]
    assert f"its pass predicts '<{top}>'" in found.faults["broken"] and "no node" in found.faults["broken"]
    read = read_attributions(write_attributions(tmp_path, found))
    assert read.predictions == found.predictions and read.faults == found.faults
    assert found.faults["broken"] in {of["fault"] for of in json.loads((tmp_path / "attributions.json").read_text())["sets"]}
    assert list(found.one("whole").predictions) == ["whole"]


def test_what_does_not_fit_the_model_is_refused():
    components = decomposed("gpt2")
    prompt = random_prompt(components, 1)
    path = list(components.maps)[2]

    def with_values(**changes):
        return CiPrompt(prompt.token_ids, CiSets("p", ("set 0",), {**prompt.sets.values, **changes}))

    attributor = LocalAttributor(components, "gpt2")
    with refuses(r"set 'set 0' has layer 'other', which is none of the maps: transformer\.h\.0"):
        attributor([with_values(other=torch.ones(1, 5, 6))])
    with refuses(rf"set 'set 0', layer '{path}', position 0: 7 components, the map has 6"):
        attributor([with_values(**{path: torch.ones(1, 5, 7)})])
    with refuses(f"set 'set 0' lacks layer '{path}'"):
        attributor(
            [CiPrompt(prompt.token_ids, CiSets("p", ("set 0",), {p: v for p, v in prompt.sets.values.items() if p != path}))]
        )
    with refuses("6 tokens beside 5: prompts of a batch have one length"):
        attributor([prompt, random_prompt(components, 1, length=6)])
    with refuses(r"set 'set 0', layer .*: 5 positions, but the prompt 'prompt 0' has 4 tokens"):
        CiPrompt(prompt.token_ids[:4], prompt.sets)
    with refuses("there is no set 'mine', only 'set 0'"):
        CiPrompt(prompt.token_ids, prompt.sets, own="mine")
    with refuses("load it in float32"):
        LocalAttributor(ComponentModel.from_svd(language_model("gpt2", dtype=torch.bfloat16), ["*.c_fc"]), "gpt2")
    with refuses("no causal language model"):
        LocalAttributor(ComponentModel.from_svd(nn.Sequential(nn.Linear(3, 3)), ["*"]), "toy")
    for bad in ({"ci_threshold": 0}, {"output_threshold": 1.5}, {"memory_mib": 0}):
        with refuses(f"{next(iter(bad))} must be"):
            AttributionOptions(**bad)


def test_a_trainer_predicts_what_the_module_gives_and_files_give_it_back(tmp_path):
    components = decomposed("gpt_neox")
    prompt = random_prompt(components, 2, own="set 1")
    attributor = LocalAttributor(components, "tiny", decode=lambda token: f"<{token}>")
    read = []
    writer = AttributionWriter(
        {f"{tmp_path}/ci.json": tmp_path / "by_trainer"},
        separate=True,
        tell=lambda _, paths: read.extend(map(read_attributions, paths)),
    )
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False, callbacks=[writer])
    write_ci_sets(tmp_path / "ci.json", prompt.sets)
    data = CiPromptDataModule([tmp_path / "ci.json"], lambda text, **_: {"input_ids": prompt.token_ids.tolist()}, own="set 1")
    trainer.predict(attributor, datamodule=data, return_predictions=False)
    (found,) = attributor([prompt])
    path = write_attributions(tmp_path, found)
    single = write_attributions(tmp_path / "one.safetensors", found.one("set 1"))
    assert [one.set_names for one in read] == [("set 0",), ("set 1",)]
    for other in (*read, read_attributions(path)):
        for name in other.set_names:
            assert_same(found.by_set[name], other.by_set[name])
            assert list(other.alive[name]) == ["wte", *components.maps, "output"]
            assert all(torch.equal(mask, other.alive[name][layer]) for layer, mask in found.alive[name].items())
            for a, b in zip(found.by_set[name], other.by_set[name], strict=True):
                assert a.is_kv_to_o_pair == b.is_kv_to_o_pair
                assert torch.equal(a.original_alive_mask_in, b.original_alive_mask_in)
                assert torch.equal(a.original_alive_mask_out, b.original_alive_mask_out)
            assert torch.equal(found.one(name).output_probabilities, other.one(name).output_probabilities)
        for field in ("made", "prompt", "tokens", "token_ids", "output_tokens"):
            assert getattr(found, field) == getattr(other, field)
    assert read_attributions(single).set_names == ("set 1",)
    assert_same(read_attributions(single).by_set["set 1"], found.by_set["set 1"])
    with refuses("there is no set 'set 7'"):
        found.one("set 7")
