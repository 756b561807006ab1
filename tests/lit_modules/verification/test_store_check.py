"""Verifying a finished store later: what passes, what condemns it, what is refused, and a run's parts made again from run.json."""

import json
import re
import shutil
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from exactivations.datamodules import PlanOptions, TextDataModule, TextOptions
from exactivations.lit_modules import ActivationExtractor, ModelOptions, verify_store
from exactivations.lit_modules.extraction.pooling import Pooling
from exactivations.lit_modules.extraction.run_description import Elsewhere, data_of, extractor_of, run_info
from exactivations.lit_modules.verification.sample_check import SampleCheck, SampleResult
from exactivations.store import ActivationStore
from exactivations.store.errors import IdentityError, IncompleteStoreError, InvalidInputError, VerificationError
from exactivations.store.run_folder import RunFolder, RunInfo
from exactivations.store.shard import open_shard, write_shard
from exactivations.store.verification import read_verification
from tests import planted_faults as zoo
from tests.lit_modules.tiny_models import in_dtype, tiny_model


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        yield


def parts(dtype="float32", rows=None, seed=0, **data):
    model = zoo.model_of("llama", dtype, seed)
    return ActivationExtractor(model, zoo.HOOK_POINTS, zoo.POOLINGS), zoo.data_of(rows or zoo.texts(), **data)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    paths = {}

    def finished(dtype):
        if dtype not in paths:
            paths[dtype] = tmp_path_factory.mktemp("run") / "run"
            zoo.run(paths[dtype], *parts(dtype))
        return paths[dtype]

    return finished


@pytest.fixture
def folder(finished, tmp_path):
    shutil.copytree(finished("float32"), tmp_path / "run")
    return RunFolder(tmp_path / "run")


def verdict_of(folder):
    return read_verification(folder, folder.read_info())


@pytest.mark.parametrize("truth", [None, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_finished_run_passes_in_every_dtype_of_the_truth(finished, dtype, truth):
    verification = verify_store(finished(dtype), *parts(dtype), dtype=truth, n_samples=40)
    assert verification.passed and verification.failures == [] and verification.samples == list(range(40))
    assert verification.dtype == str(truth or getattr(torch, dtype)).removeprefix("torch.")
    assert [figures.name for figures in verification.figures] == list(ActivationStore(finished(dtype)).names)
    assert all(figures.worst_error <= figures.tolerance for figures in verification.figures)
    recorded = verdict_of(RunFolder(finished(dtype)))
    coarseness = [torch.float32, torch.float16, torch.bfloat16]
    is_coarser = truth is not None and coarseness.index(truth) > coarseness.index(getattr(torch, dtype))
    assert (recorded != verification) == is_coarser == ("not recorded" in verification.checked[-1])
    assert "no causal language model" in verification.next_tokens_note
    assert "checksums of" in " ".join(verification.checked)


def test_a_run_with_a_head_is_verified_with_it(tmp_path):
    from .test_next_tokens import whole_of

    extractor = ActivationExtractor(whole_of("llama"), ["final_norm", "resid_post.2"], ["tokens", "last", "mean"])
    zoo.run(tmp_path / "run", extractor, zoo.data_of(zoo.texts()))
    verification = verify_store(tmp_path / "run", extractor, zoo.data_of(zoo.texts()), n_samples=5)
    assert verification.passed and verification.next_tokens_note is None
    names = [f"{point}/{pooling}" for point in ("final_norm", "resid_post.2") for pooling in ("last", "tokens")]
    assert [head.name for head in verification.next_tokens] == names
    assert all(head.top1_agreement == 1 and head.largest_difference < 1e-5 for head in verification.next_tokens)


def test_positions_are_verified_with_the_head_too(tmp_path):
    from .test_next_tokens import whole_of

    poolings = ["position:-2", "position:1", "mean"]
    extractor = ActivationExtractor(whole_of("llama"), ["final_norm", "resid_post.2"], poolings)
    check = zoo.run(tmp_path / "run", extractor, zoo.data_of(zoo.texts()))
    assert check.verification.passed and check.verification.next_tokens_note is None
    assert {head.name for head in check.verification.next_tokens} == {
        f"{point}/{pooling}" for point in ("final_norm", "resid_post.2") for pooling in poolings[:2]
    }
    assert all(head.top1_agreement == 1 for head in check.verification.next_tokens)


def test_a_position_counted_over_all_tokens_is_not_that_of_the_tokens_that_count(tmp_path, monkeypatch):
    """What is planted: special tokens are counted too. Each text has one before it, so that token 1 is the text's first."""
    real = Pooling.__init__
    monkeypatch.setattr(Pooling, "__init__", lambda self, name, mask, n, device: real(self, name, mask | True, n, device))
    extractor = ActivationExtractor(zoo.model_of("llama", "float32"), ["resid_post.1"], ["position:1"])
    with pytest.raises(VerificationError, match=r"resid_post\.1/position:1 .*it looks like token 1 of \d+ of the same sample"):
        zoo.run(tmp_path / "run", extractor, zoo.data_of(zoo.texts()))


def test_a_flipped_bit_condemns_the_store_until_it_is_mended(folder):
    path = folder.shard_path(1)
    before = path.read_bytes()
    spoilt = bytearray(before)
    spoilt[-5] ^= 16
    path.write_bytes(spoilt)
    verification = verify_store(folder.path, *parts())
    assert not verification.passed and verification.failed_samples == []
    assert any(re.search(r"00001\.safetensors is damaged: its checksum", failure) for failure in verification.failures)
    with pytest.raises(VerificationError, match="is damaged"):
        ActivationStore(folder.path)
    path.write_bytes(before)
    assert verify_store(folder.path, *parts()).passed and len(ActivationStore(folder.path)) == 40


def test_a_store_of_which_every_shard_is_damaged_does_not_pass_for_want_of_samples(folder):
    for path in folder.shard_folder.iterdir():
        path.write_bytes(path.read_bytes()[:-1] + bytes([path.read_bytes()[-1] ^ 1]))
    verification = verify_store(folder.path, *parts())
    assert not verification.passed and verification.samples == [] and "no sample was checked" in verification.failures


def test_failed_samples_are_drawn_again_first_and_pass_when_the_cause_is_gone(folder, monkeypatch):
    alone = verify_store(folder.path, *parts(), n_samples=2, seed=5).samples
    failing = [i for i in range(40) if i not in alone][:3]
    check = SampleCheck.check

    def wrong(self, i):
        return SampleResult(i, failures=[f"sample {i} is wrong"]) if i in failing else check(self, i)

    with monkeypatch.context() as patch:
        patch.setattr(SampleCheck, "check", wrong)
        assert verify_store(folder.path, *parts(), n_samples=40).failed_samples == failing
        again = verify_store(folder.path, *parts(), n_samples=2, seed=5)  # a smaller draw does not get round them
        assert again.samples == failing == again.failed_samples and not again.passed
        with pytest.raises(VerificationError):
            ActivationStore(folder.path)
    mended = verify_store(folder.path, *parts(), n_samples=2, seed=5)
    assert mended.passed and mended.samples == failing and len(ActivationStore(folder.path)) == 40
    assert verify_store(folder.path, *parts(), n_samples=2, seed=5).samples == alone


def test_a_row_that_was_changed_with_its_checksum_condemns_the_store(folder):
    tensors, metadata = open_shard(folder.shard_path(0))
    tensors = {name: values.clone() for name, values in tensors.items()}
    tensors["resid_post.1/mean"][0] *= 1.01
    del metadata["checksum"]
    write_shard(folder.shard_path(0), tensors, metadata)
    verification = verify_store(folder.path, *parts(), n_samples=40)
    sample = int(tensors["sample_index"][0])
    assert verification.failed_samples == [sample]
    assert verification.failures[0].startswith(f"sample {sample}: resid_post.1/mean is not what the sample gives alone")


def changed(rows, **at):
    return [at.get(f"row{i}", row) for i, row in enumerate(rows)]


ROWS = zoo.texts()
OTHERS = {
    "a changed text": ({"rows": changed(ROWS, row7=" ".join(reversed(ROWS[7].split())))}, "dataset: .*\n.*sample 7 has token_hash"),
    "another order": ({"rows": ROWS[::-1]}, "dataset: .*\n.*sample 0 has"),
    "a text more": ({"rows": [*ROWS, "w1"]}, "n_samples: 40 there, 41 now\n.*40 samples there, 41 now"),
    "other weights": ({"seed": 1}, "  model: '"),
    "another dtype": ({"dtype": "bfloat16"}, "dtype: 'float32' there, 'bfloat16' now"),
    "another tokenizer": ({"shift": 1}, "tokenizer: "),
    "another plan": ({"token_budget": 65}, "token_budget: 64 there, 65 now"),
    "another cut": ({"max_length": 12}, "max_length: None there, 12 now"),
}


@pytest.mark.parametrize("other", OTHERS)
def test_parts_of_another_run_are_refused_by_name_and_the_store_is_not_judged(folder, other):
    arguments, says = OTHERS[other]
    before = (folder.path / "verification.json").read_bytes()
    with pytest.raises(IdentityError, match=rf"was not made of this model and data(.|\n)*{says}"):
        verify_store(folder.path, *parts(**arguments))
    assert (folder.path / "verification.json").read_bytes() == before and len(ActivationStore(folder.path)) == 40


def test_a_changed_column_that_no_hash_holds_is_refused_too(tmp_path):
    import datasets

    def data(label):
        rows = datasets.Dataset.from_dict({"text": ROWS, "label": [label if i == 9 else i for i in range(40)]})
        return TextDataModule(rows, zoo.tokenizer(), plan_options=PlanOptions(64, 100))

    zoo.run(tmp_path / "run", parts()[0], data(9))
    with pytest.raises(IdentityError, match="sample 9 has label 9 there, -1 now"):
        verify_store(tmp_path / "run", parts()[0], data(-1))


def test_an_environment_that_changed_is_told_and_not_refused(folder):
    content = json.loads((folder.path / "run.json").read_text())
    info = folder.read_info()
    info.identity["torch"] = "1.0"
    (folder.path / "run.json").write_text(json.dumps(content | asdict(info)))
    for shard in range(info.n_shards):
        tensors, metadata = open_shard(folder.shard_path(shard))
        tensors = {name: values.clone() for name, values in tensors.items()}
        write_shard(folder.shard_path(shard), tensors, {"shard": metadata["shard"], "fingerprint": info.fingerprint})
    verification = verify_store(folder.path, *parts())
    assert verification.passed and f"torch: '1.0' in the run, '{torch.__version__}' now" in verification.checked


def test_an_incomplete_store_and_a_draw_of_nothing_are_refused(folder):
    with pytest.raises(InvalidInputError, match="n_samples must be at least 1, got 0"):
        verify_store(folder.path, *parts(), n_samples=0)
    folder.shard_path(0).unlink()
    with pytest.raises(IncompleteStoreError):
        verify_store(folder.path, *parts())


CHAT = "{% if tone is defined %}{{ tone }} {% endif %}"
CHAT += "{% for m in messages %}{{ m['role'] }} {% generation %}{{ m['content'] }} {% endgeneration %}{% endfor %}"


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A model, its tokenizer with a chat template, and files of texts and of conversations."""
    path = tmp_path_factory.mktemp("files")
    in_dtype(tiny_model("llama"), torch.float32).save_pretrained(path / "model")
    tokenizer = zoo.tokenizer()
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(path / "model")
    rows = [{"text": text, "prose": text[::-1] if i % 5 else "", "label": i} for i, text in enumerate(ROWS)]
    (path / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    talks = [{"chat": [{"role": "w1", "content": text}, {"role": "w2", "content": "w3 w4"}]} for text in ROWS]
    (path / "talks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in talks))
    return path


def described(extractor, data):
    """run.json as it is read back."""
    info = run_info(extractor, data, extractor.specs())
    return RunInfo(**{name: value for name, value in json.loads(json.dumps(asdict(info))).items()})


RUNS = {
    "plain": ("texts.jsonl", {}, {}),
    "template and cut": ("texts.jsonl", {"template": "w5 {text} w6", "max_length": 9, "truncation_side": "left"}, {}),
    "messages": ("talks.jsonl", {"messages_column": "chat", "token_mask": "assistant", "add_generation_prompt": True}, {}),
    "messages and a variable": ("talks.jsonl", {"messages_column": "chat", "chat_template_kwargs": {"tone": "w9"}}, {}),
    "without the first token": ("texts.jsonl", {"skip_first": 1}, {}),
    "the first samples": ("texts.jsonl", {"add_special_tokens": False, "token_mask": "all"}, {"num_samples": 7}),
    "chosen samples and columns": ("texts.jsonl", {}, {"num_samples": 7, "sample_seed": 3, "keep_columns": ["label"]}),
    "no columns": ("texts.jsonl", {}, {"keep_columns": []}),
    "another column, empties skipped": ("texts.jsonl", {"text_column": "prose", "on_empty": "skip"}, {}),
    "a plan of its own": ("texts.jsonl", {}, {"plan_options": PlanOptions(33, 77, "tail", 0.4)}),
    "a split": ("texts.jsonl", {}, {"split": "train[5:20]"}),
}


@pytest.mark.parametrize("name", RUNS)
def test_the_data_of_a_run_is_made_again_from_its_description(files, name):
    source, text, options = RUNS[name]
    data = TextDataModule(str(files / source), str(files / "model"), text=TextOptions(**text), **options)
    info = described(ActivationExtractor(str(files / "model"), ["embed"], ["mean"]), data)
    again = data_of(info, Elsewhere())
    assert again.identity() == data.identity() and again.text == data.text and again.plan_options == data.plan_options
    assert again.samples.equals(data.samples) and again.tokens.skipped == data.tokens.skipped
    assert again.encode_alone(int(data.tokens.sample_index[-1])).token_hash == data.tokens.token_hash[-1].as_py()
    if "skipped" in name:
        assert data.tokens.skipped == list(range(0, 40, 5))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("store_dtype", [None, "float16"])
def test_the_extractor_of_a_run_is_made_again_from_its_description(files, dtype, store_dtype):
    options = ModelOptions(dtype=dtype, attn_implementation="eager")
    poolings = ["last", "exp_decay:0.1"]
    extractor = ActivationExtractor(
        str(files / "model"), ["resid_post.1", "module:layers.0.mlp"], poolings, options=options, store_dtype=store_dtype
    )
    info = described(extractor, TextDataModule(str(files / "texts.jsonl"), str(files / "model")))
    again = extractor_of(info, Elsewhere())
    assert again.identity() == extractor.identity() and again.specs() == extractor.specs()


def test_a_run_whose_files_moved_is_found_where_it_is_said_to_be(files, tmp_path):
    data = TextDataModule(str(files / "texts.jsonl"), str(files / "model"))
    extractor = ActivationExtractor(str(files / "model"), ["embed"], ["mean"])
    info = described(extractor, data)
    for kind in ("model", "tokenizer", "dataset"):
        info.about[kind] = "nowhere"
    shutil.copytree(files, tmp_path / "moved")
    model, texts = str(tmp_path / "moved" / "model"), str(tmp_path / "moved" / "texts.jsonl")
    elsewhere = Elsewhere(model=model, tokenizer=model, dataset=texts)
    assert data_of(info, elsewhere).identity() == data.identity()
    assert extractor_of(info, elsewhere).identity() == extractor.identity()
    with pytest.raises(InvalidInputError, match="model 'nowhere' could not be loaded"):
        extractor_of(info, Elsewhere()).load()


def test_a_dataset_that_was_a_list_in_python_says_what_to_do_and_can_be_given(files):
    extractor = ActivationExtractor(str(files / "model"), ["embed"], ["mean"])
    info = described(extractor, TextDataModule(ROWS, str(files / "model")))
    with pytest.raises(InvalidInputError, match=r"was a list in Python.*pass --dataset; or verify from Python with .*verify_store"):
        data_of(info, Elsewhere())
    saved = data_of(info, Elsewhere(dataset=str(files / "texts.jsonl")))
    assert saved.identity()["dataset"] == info.identity["dataset"]


def test_a_relative_path_is_recorded_as_it_was_given(files, monkeypatch):
    monkeypatch.chdir(files)
    data = TextDataModule(Path("texts.jsonl"), "model")
    info = described(ActivationExtractor("model", ["embed"], ["mean"]), data)
    assert data_of(info, Elsewhere()).identity() == data.identity()
