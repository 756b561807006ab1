"""What gets installed: one namespace, everything that is needed, nothing that would shadow a user's own modules."""

import ast
import configparser
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

# Ground first.
FOLDERS = [
    "store", "datamodules", "lit_modules", "lit_modules/models", "lit_modules/extraction", "lit_modules/steering",
    "lit_modules/verification", "lit_modules/probes", "lit_modules/moderation", "lit_modules/amplification",
    "lit_modules/decomposition", "lit_modules/attribution", "callbacks", "scripts",
]  # fmt: skip
ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    source = tmp_path_factory.mktemp("source") / "exactivations"
    ignored = shutil.ignore_patterns(".*", "build", "dist", "runs", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, source, ignore=ignored)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(source / "dist"), str(source)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return next((source / "dist").glob("*.whl"))


def test_a_wheel_holds_the_namespace_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"exactivations"}
    for folder in FOLDERS:
        installed = {name.removeprefix(f"exactivations/{folder}/") for name in names if name.startswith(f"exactivations/{folder}/")}
        here = {p.name for p in (ROOT / folder).iterdir() if p.suffix == ".py" or p.name == "py.typed"}
        assert here <= installed, f"{folder} lacks {here - installed}"


def test_the_demo_model_is_in_the_wheel_and_small(wheel):
    members = {
        Path(info.filename).name: info.file_size for info in zipfile.ZipFile(wheel).infolist() if "demo_model" in info.filename
    }
    assert {"model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json", "README.md"} <= members.keys()
    assert members["model.safetensors"] <= 4_000_000


def test_the_wheel_works_away_from_its_sources(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path)
    program = "import sys; sys.path.insert(0, sys.argv[1]); import exactivations.store as s; print(s.__file__)"
    program += "; from exactivations.scripts.main import main; main(['hook-points', 'demo'])"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, cwd=tmp_path, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(str(tmp_path))
    assert "resid_post.3" in done.stdout


def test_every_dependency_is_pinned_within_its_range_and_has_a_reason():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    pins = {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in pins.items()}
    ranges = setup["options"]["install_requires"] + setup["options.extras_require"]["dev"]
    from packaging.requirements import Requirement

    for line in filter(None, ranges.splitlines()):
        requirement = Requirement(line)
        assert requirement.specifier.contains(pins[re.sub(r"[-_.]+", "-", requirement.name).lower()]), line
    text = (ROOT / "setup.cfg").read_text()
    for line in filter(None, ranges.splitlines()):
        assert re.search(rf"#[^\n]*\b{re.escape(Requirement(line).name)}\b", text), f"{line}: no comment says why"


def test_everything_that_is_installed_is_pinned():
    from importlib.metadata import distributions

    pins = {line.split("==")[0] for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line}
    normal = {re.sub(r"[-_.]+", "-", name).lower() for name in pins}
    installed = {re.sub(r"[-_.]+", "-", d.metadata["Name"]).lower() for d in distributions()}
    assert installed - normal - {"pip", "exactivations"} == set()


def test_the_folders_are_those_that_are_installed():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    listed = setup["options"]["packages"].split()
    assert [f"exactivations.{folder.replace('/', '.')}" for folder in FOLDERS] == listed
    on_disk = {str(p.parent.relative_to(ROOT)) for folder in FOLDERS for p in (ROOT / folder.split("/")[0]).rglob("__init__.py")}
    assert on_disk == set(FOLDERS)


@pytest.mark.parametrize("folder", FOLDERS)
def test_no_module_imports_upwards(folder):
    above = [f"exactivations.{f.replace('/', '.')}" for f in FOLDERS[FOLDERS.index(folder) + 1 :]]
    for path in (ROOT / folder).glob("*.py"):
        if path == ROOT / "lit_modules" / "__init__.py":  # what users import by the package's name
            continue
        found = imported(path.read_text())
        wrong = [name for name in found if any(f"{name}.".startswith(f"{f}.") for f in above)]
        if folder.startswith("lit_modules/") and "exactivations.lit_modules" in found:
            wrong.append("exactivations.lit_modules")  # its names are those of its folders, which may stand above
        assert not wrong, f"{path.relative_to(ROOT)} imports {wrong}, which stand above {folder}"


def imported(source):
    """Returns the dotted names that a source text imports, also inside functions: modules, and what is taken from them."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, ast.unparse(node)
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found
