"""What the README and docs tell a user to type works as it stands there."""

import re
import shlex
from pathlib import Path

import datasets
import pytest

from exactivations.scripts.main import command_line_parser, main, to_parser_spelling

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]


def commands_in(text):
    joined = text.replace("\\\n", " ")
    for line in re.findall(r"(?m)^(?:[A-Z_]+=\S+ |\t|\.venv/bin/|\$\(BIN\)/)*exactivations (.+)$", joined):
        yield shlex.split(line, comments=True)


@pytest.mark.parametrize("page", [*PAGES, ROOT / "Makefile"], ids=lambda page: page.name)
def test_every_command_line_is_understood(page):
    parser = command_line_parser()
    for words in commands_in(page.read_text()):
        words = [word for word in words if word != "…"]
        if "--dataset" not in words and words[0] == "extract":
            words += ["demo", "--dataset", "demo"]
        parser.parse_args(to_parser_spelling(words))


def test_commands_are_found_at_all():
    assert sum(len(list(commands_in(page.read_text()))) for page in [*PAGES, ROOT / "Makefile"]) >= 5


@pytest.mark.filterwarnings("ignore:set .* it does not explain the model's prediction")  # eight components are few
def test_the_python_of_readme_and_docs_runs_in_order(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    demo = next(words for words in commands_in((ROOT / "Makefile").read_text()) if "runs/demo" in words)
    demo[demo.index("--num-samples") + 1] = "40"
    main(demo)
    blocks = [block for page in PAGES for block in re.findall(r"(?s)```python\n(.*?)```", page.read_text())]
    assert len(blocks) >= 3
    scope = {}
    for block in blocks:
        exec(block, scope)
    assert scope["rows"].shape == (40, 160)
    assert len(scope["labels"]) == 40
    assert scope["vector"].shape == (160,)
