"""The command line: its spelling, its errors, and that it starts without loading what it does not need."""

import json
import subprocess
import sys

import pytest
import torch
from transformers import AutoTokenizer

from exactivations.datamodules.embedded import DEMO_MODEL
from exactivations.scripts.main import main, to_parser_spelling
from exactivations.store import ActivationStore


@pytest.fixture
def texts(tmp_path):
    path = tmp_path / "texts.jsonl"
    rows = [{"body": f"def f{i}(x):\n    return x + {i}\n" * (1 + i % 3), "label": i % 2} for i in range(12)]
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def extract(texts, out, *more):
    main(["extract", "demo", "--dataset", str(texts), "--text-column", "body", "--out", str(out), *more])


def error_of(capsys, *args):
    """Runs a command that must fail, and returns the one message it gave."""
    with pytest.raises(SystemExit) as stop:
        main([str(arg) for arg in args])
    assert stop.value.code == 1
    message = capsys.readouterr().err
    assert message.startswith("exactivations: error: ")
    assert "Traceback" not in message
    return message


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["--layers", "1", "3", "--out", "x"], ["--layers=[1, 3]", "--out", "x"]),
        (["--layers", "-1"], ["--layers=[-1]"]),
        (["--layers", "all"], ["--layers=all"]),
        (["--layers", "[1,2]"], ["--layers=[1,2]"]),
        (["--pooling", "mean", "last", "--overwrite"], ['--pooling=["mean", "last"]', "--overwrite=true"]),
        (["--overwrite", "false", "--keep", "--dtype", "auto"], ["--overwrite=false", "--keep=[]", "--dtype", "auto"]),
        (["--pooling=[mean]"], ["--pooling=[mean]"]),
        (["--pooling=mean", "--layers=1"], ['--pooling=["mean"]', "--layers=[1]"]),
        (["--overwrite=True", "--out=a=b"], ["--overwrite=true", "--out=a=b"]),
        (["--template", "x = {text}="], ["--template", "x = {text}="]),
    ],
)
def test_options_may_be_spelled_as_users_expect(given, expected):
    assert to_parser_spelling(["extract", "demo", *given]) == ["extract", "demo", *expected]


def test_help_loads_neither_torch_nor_any_other_heavy_library():
    program = (
        "import sys\nfrom exactivations.scripts.main import main\n"
        "try:\n    main(['extract', '--help'])\nexcept SystemExit:\n    pass\n"
        "heavy = {'torch', 'transformers', 'lightning', 'datasets', 'numpy', 'pyarrow'} & set(sys.modules)\n"
        "sys.exit(f'loaded {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--max-length" in done.stdout
    assert "_" not in "".join(word for word in done.stdout.split() if word.startswith("--"))


def test_extract_then_show_tells_what_is_there_and_how_to_read_it(texts, tmp_path, capsys):
    run = tmp_path / "run"
    extract(texts, run, "--layers", "1", "-1", "--hooks", "resid_post", "final_norm", "--pooling", "mean", "tokens")
    told = capsys.readouterr().out
    assert "12 samples" in told and "0.0% padding" in told and f'ActivationStore("{run}")' in told
    main(["show", str(run), "--checksums"])
    shown = capsys.readouterr().out
    assert "complete; all checksums agree" in shown
    for name in ("resid_post.1/mean", "resid_post.3/tokens", "final_norm/tokens"):
        assert name in shown
    assert ActivationStore(run).samples.column("label").to_pylist() == [i % 2 for i in range(12)]


def test_the_three_lines_that_are_printed_at_the_end_run(texts, tmp_path, capsys):
    extract(texts, tmp_path / "run", "--layers", "0", "--pooling", "mean")
    lines = capsys.readouterr().out.partition("read it with\n")[2]
    scope = {}
    exec("\n".join(line.strip() for line in lines.splitlines()), scope)
    assert scope["rows"].shape == (12, 160)


def test_a_printed_configuration_can_be_run(texts, tmp_path, capsys):
    with pytest.raises(SystemExit):
        extract(texts, tmp_path / "run", "--layers", "0", "--pooling", "last", "--print-config")
    config = tmp_path / "run.yaml"
    config.write_text(capsys.readouterr().out)
    main(["extract", "--config", str(config)])
    assert ActivationStore(tmp_path / "run").names == ["resid_post.0/last"]


def test_variables_of_a_chat_template_are_given_as_json_and_through_a_configuration(tmp_path, capsys):
    tokenizer = AutoTokenizer.from_pretrained(DEMO_MODEL)
    tokenizer.chat_template = (
        "{% if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
        "{{ date_string }}{% if quiet is true %} quiet{% endif %} {% for m in messages %}{{ m['content'] }}{% endfor %}"
    )
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    chats = tmp_path / "chats.jsonl"
    chats.write_text("".join(json.dumps({"chat": [{"role": "user", "content": f"import {x}"}]}) + "\n" for x in "abc"))
    arguments = [
        "extract", "demo", "--tokenizer", str(tmp_path / "tokenizer"), "--dataset", str(chats), "--messages-column", "chat",
        "--accelerator", "cpu", "--cpu-threads", "1", "--layers", "1", "--pooling", "tokens",
    ]  # fmt: skip
    assert "would be rendered with today's date" in error_of(capsys, *arguments, "--out", tmp_path / "dated")
    given = ["--chat-template-kwargs", '{"date_string": "26 Jul 2024", "quiet": true}']
    main([*arguments, *given, "--out", str(tmp_path / "run")])
    expected = [tokenizer(f"26 Jul 2024 quiet import {x}")["input_ids"] for x in "abc"]
    assert [ActivationStore(tmp_path / "run")[i].input_ids.tolist() for i in range(3)] == expected
    with pytest.raises(SystemExit):
        capsys.readouterr()
        main([*arguments, *given, "--out", str(tmp_path / "again"), "--print-config"])
    config = tmp_path / "run.yaml"
    config.write_text(capsys.readouterr().out)
    main(["extract", "--config", str(config)])
    assert [ActivationStore(tmp_path / "again")[i].input_ids.tolist() for i in range(3)] == expected
    main(["verify", str(tmp_path / "run")])


def test_a_position_may_be_counted_from_the_end(texts, tmp_path):
    extract(texts, tmp_path / "run", "--layers", "0", "--pooling", "tokens", "position:-2", "last", "position:0")
    store = ActivationStore(tmp_path / "run")
    for sample in store:
        counted = sample.activations["resid_post.0/tokens"][sample.token_mask]
        assert torch.equal(sample.activations["resid_post.0/position:-2"], counted[-2])
        assert torch.equal(sample.activations["resid_post.0/position:0"], counted[0])


def test_a_second_call_computes_nothing(texts, tmp_path, capsys):
    extract(texts, tmp_path / "run", "--layers", "0")
    capsys.readouterr()
    extract(texts, tmp_path / "run", "--layers", "0")
    assert "wrote 0 shards (1 were there already)" in capsys.readouterr().out


def test_hook_points_tells_widths_of_inputs_and_where_states_are_normed_before_they_are_added(tmp_path, capsys):
    main(["hook-points", "demo"])
    told = capsys.readouterr().out
    assert "attn_z.3         [B, L, 160]    input of layers.3.attention.dense (Linear)" in told
    assert "mlp_act.3        [B, L, 640]    input of layers.3.mlp.dense_4h_to_h (Linear)" in told
    assert "note:" not in told
    import transformers

    transformers.Gemma2Config(
        vocab_size=9, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=4,
        intermediate_size=12,
    ).save_pretrained(tmp_path)  # fmt: skip
    main(["hook-points", str(tmp_path)])
    assert "note: attn_out, mlp_out: are read before the norms that Gemma2DecoderLayer puts on them" in capsys.readouterr().out


def test_hook_points_lists_shapes_places_and_what_is_missing(tmp_path, capsys):
    import transformers

    main(["hook-points", "demo", "--modules"])
    told = capsys.readouterr().out
    assert "resid_post.3     [B, L, 160]" in told and "module:layers.0.mlp" in told
    transformers.MambaConfig(vocab_size=9, hidden_size=8, num_hidden_layers=2, state_size=4).save_pretrained(tmp_path)
    main(["hook-points", str(tmp_path)])
    assert "not found: attn_out: no attention module in MambaBlock" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--text-column", "text"], "no column 'text'; it has body, label"),
        (["--layers", "4"], "no layer 4: the model has layers 0 to 3"),
        (["--layers", "-5"], "no layer -5"),
        (["--hooks", "resid_post"], "resid_post needs layers"),
        (["--hooks", "resid_post.7"], "there is no layer 7; GPTNeoXModel has layers 0 to 3"),
        (["--hooks", "nonsense"], "'nonsense' is not one of embed"),
        (["--layers", "1", "--hooks", "embed"], "--layers applies to resid_post"),
        (["--layers", "1", "--pooling", "median"], "'median' is not one of tokens"),
        (
            ["--layers", "1", "--pooling", "mean", "position:-99"],
            "tokens that count, the pooling position:-99 needs 99 (12 of 12 are",
        ),
        (["--layers", "1", "--keep", "body", "colour"], "no column 'colour' to keep"),
        (["--layers", "1", "--num-samples", "13"], "13 samples were asked for, the dataset has 12"),
        (["--layers", "1", "--template", "no place"], "must hold {text} exactly once"),
        (["--layers", "1", "--split", "validation"], 'Unknown split "validation"'),
        (["--layers", "1", "--allow-changed", "dtype"], "may change within a run, not dtype"),
        (["--layers", "1", "--token-budget", "0"], "token_budget must be at least 1"),
        (["--layers", "1", "--devices", "0"], "--devices 0 cannot be had here"),
    ],
)
def test_options_that_do_not_fit_are_one_clear_line(texts, tmp_path, capsys, options, message):
    base = [] if "--text-column" in options else ["--text-column", "body"]
    layers = [] if {"--layers", "--hooks"} & set(options) else ["--layers", "1"]
    error = error_of(capsys, "extract", "demo", "--dataset", texts, "--out", tmp_path / "run", *base, *layers, *options)
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "run" / "shards").exists()


def test_empty_texts_are_refused_by_index_or_skipped_and_recorded(tmp_path, capsys):
    path = tmp_path / "texts.jsonl"
    path.write_text("\n".join(json.dumps({"text": text}) for text in ["a b", "", "c", None, "d"]))
    arguments = ["extract", "demo", "--dataset", path, "--out", tmp_path / "run", "--layers", "1"]
    error = error_of(capsys, *arguments)
    assert "sample 1 is empty" in error and "sample 3 is empty: it is None" in error and "--on-empty skip" in error
    main([str(a) for a in arguments] + ["--on-empty", "skip"])
    assert "2 empty samples are left out: 1, 3" in capsys.readouterr().out
    store = ActivationStore(tmp_path / "run")
    assert store.sample_index.tolist() == [0, 2, 4]
    assert store.info.skipped == [1, 3]
    with pytest.raises(IndexError, match="sample 3 was skipped"):
        store[3]


def test_a_budget_below_the_longest_sample_is_told_and_that_sample_runs_alone(texts, tmp_path, capsys):
    extract(texts, tmp_path / "run", "--layers", "0", "--token-budget", "20")
    told = capsys.readouterr().out
    longest = max(ActivationStore(tmp_path / "run").samples.column("n_tokens").to_pylist())
    assert f"longer than the token budget of 20 (the longest has {longest}): each runs alone" in told


def test_a_sample_longer_than_the_model_names_itself_and_the_way_out(tmp_path, capsys):
    path = tmp_path / "texts.txt"
    path.write_text("short\n" + "x = 1 + 2 " * 400)
    error = error_of(capsys, "extract", "demo", "--dataset", path, "--out", tmp_path / "run", "--layers", "0")
    assert "sample 1 has" in error and "1024 positions" in error and "--max-length 1024" in error


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["show", "nowhere"], "nowhere is not a run folder"),
        (["hook-points", "./nowhere"], "could not be loaded"),
        (["extract", "demo", "--dataset", "./nowhere.jsonl", "--out", "x", "--layers", "1"], "no such file or folder"),
    ],
)
def test_names_that_lead_nowhere_are_one_clear_message(capsys, command, message):
    assert message in error_of(capsys, *command)


def test_a_run_with_other_settings_is_refused_with_both_values(texts, tmp_path, capsys):
    extract(texts, tmp_path / "run", "--layers", "0", "--pooling", "mean")
    again = ["extract", "demo", "--dataset", texts, "--text-column", "body", "--out", tmp_path / "run"]
    error = error_of(capsys, *again, "--layers", 1, "--max-length", 9)
    assert "hook_points: ['resid_post.0'] there, ['resid_post.1'] now" in error
    assert "poolings: ['mean'] there, ['mean', 'last'] now" in error
    assert "max_length: None there, 9 now" in error
    assert ActivationStore(tmp_path / "run").names == ["resid_post.0/mean"]
