"""`exactivations import-masks`: another run's per-batch masks, kept by sample index."""

from typing import Literal


def import_masks(
    masks: str,
    *,
    store: str,
    out: str,
    mask_name: str | None = None,
    padding_side: Literal["right", "left"] | None = None,
    rows: Literal["dataset", "store"] = "dataset",
    more_rows: bool = False,
    overwrite: bool = False,
) -> None:
    """Converts a folder of per-batch masks into one file of masks by sample index, for one store.

    Samples are counted over all batches, whatever their sizes. Anything that does not fit is refused: a missing or doubled
    batch, another number of masks than samples, a wrong length, a mask that marks nothing, marks that cannot be of these samples,
    and other tokens if the masks' input_ids were saved too. What cannot be told is a warning.

    Args:
        masks: A folder of batch_<i> folders (or batch_<i>.safetensors or .pt files).
        store: The run folder that the masks are for.
        out: The .parquet file to write; read it with exactivations.store.masks.read_masks.
        mask_name: Name of the mask in each batch. Default: attention_mask, attention_masks, token_mask, mask, or the only one.
        padding_side: The side on which masks are padded. Default: found out, by input_ids or by what is marked.
        rows: What the masks count: all samples of the dataset as given, or those that the store kept of it.
        more_rows: Allow masks after the store's last sample, which may hold only the first ones of the dataset.
        overwrite: Replace the file if it is there.
    """
    from pathlib import Path

    from exactivations.store.errors import InvalidInputError
    from exactivations.store.mask_folder import read_mask_batches
    from exactivations.store.mask_identity import judge_marks
    from exactivations.store.mask_layout import SampleTable, lay_masks
    from exactivations.store.masks import write_masks
    from exactivations.store.run_folder import RunFolder

    if Path(out).exists() and not overwrite:
        raise InvalidInputError(f"{out} is there already: name another file, or pass --overwrite")
    if RunFolder(masks).exists:
        raise InvalidInputError(f"{masks} is a store, which keeps its masks by sample index already: store[i].token_mask")
    table = SampleTable.of(store)
    batches = read_mask_batches(masks, mask_name)
    if wrong := table.wrong_number(len(batches), rows, more_rows=more_rows):
        raise InvalidInputError(f"{masks}: {wrong}")
    places = table.rows(rows)
    marks = judge_marks(batches, table, places, lay_masks(batches, table, places, padding_side))
    for warning in marks.warnings:
        print(f"warning: {warning}", flush=True)
    if marks.fault and not marks.laid.problems:
        raise InvalidInputError(f"{masks}: {marks.fault}")
    write_masks(out, table, marks.laid, masks)
    print(f"{len(table):,} masks from {len(batches.masks):,} batches, padded on the {marks.laid.side}, by sample index -> {out}")
    if batches.ids is None:
        print("only their lengths were checked: no input_ids are kept beside the masks, so whose they are cannot be told")
    else:
        print("all of them are their samples' own, by token hash")
    print("read it with")
    print("    from exactivations.store import ActivationStore")
    print("    from exactivations.store.masks import read_masks")
    print(f'    masks = read_masks("{out}", ActivationStore("{store}"))')
    print(f"    print(masks[{table.sample_index[0]}])")
