"""Set up before anything of the package is imported: no network, and tensor shapes checked at run time."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"

import hypothesis
from jaxtyping import install_import_hook

if "CI" not in os.environ:  # hypothesis has a profile of its own there, the same examples in every run
    hypothesis.settings.register_profile("timeless", deadline=None)  # a busy machine is no failure
    hypothesis.settings.load_profile("timeless")

SHAPED = tuple(
    f"lit_modules.{name}"
    for name in (
        "extraction.pooling", "probes.logistic", "probes.logistic_hessian", "probes.logistic_loss", "probes.centred_rows",
        "probes.batched_newton", "attribution.component_cut", "attribution.attribution_paths", "attribution.row_attributions",
        "decomposition.causal_importance", "decomposition.decomposition_losses",
    )
)  # fmt: skip
install_import_hook([f"exactivations.{name}" for name in SHAPED], "beartype.beartype")

import torch  # noqa: E402  # after the hook, so that shapes are checked

torch.set_num_threads(1)  # pytest-xdist uses the cores; two threads in each of its workers only wait for each other
