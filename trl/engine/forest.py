"""Layouts: how a forest of token trees becomes the tensors of one forward pass.

Both layouts list the trained tokens in the same order (tree by tree, sequence by sequence, left to right), so that
results can be compared entry by entry. A sequence is a root without branches; or a branch, whose text is the root's
tokens followed by its own; or a root that is trained in addition to its branches, and comes before them.

Dimensions: `T` tokens in the flat row, `B, L` rows and columns of the padded layout, `N` trained tokens,
`S` sequences, `M` segments.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch

from trl.data.batching.collate import Branch, Tree

# A plain dict, because every wrapper (device hooks, DDP, FSDP) can move one.
Batch = dict[str, Any]


def _trained(ids: np.ndarray, mask: np.ndarray, first: int) -> tuple[np.ndarray, np.ndarray]:
    """Offsets of the trained tokens in a run, from `first` on, and their ids."""
    offsets = np.flatnonzero(mask)
    offsets = offsets[offsets >= first]
    return offsets, ids[offsets]


def _arrays(tree: Tree) -> tuple[tuple[np.ndarray, np.ndarray], list[tuple[np.ndarray, np.ndarray]]]:
    """Root and branches as (ids, mask) arrays. Raises ValueError for unequal shapes and for a root without tokens."""

    def convert(branch: Any, what: str) -> tuple[np.ndarray, np.ndarray]:
        ids, mask = np.asarray(branch.ids, dtype=np.int64), np.asarray(branch.mask, dtype=bool)
        if ids.shape != mask.shape or ids.ndim != 1:
            raise ValueError(f"row {tree.row}: {what} has {ids.shape} token ids and a mask of shape {mask.shape}")
        return ids, mask

    root = convert(tree.root, "the root")
    branches = [convert(branch, f"branch {index}") for index, branch in enumerate(tree.branches)]
    if len(root[0]) == 0:
        raise ValueError(f"row {tree.row}: the prompt has no tokens, so nothing predicts the first token after it")
    return root, branches


def _row(tree: Tree, branch: Branch) -> int:
    return tree.row if branch.row is None else branch.row


def _finish(batch: Batch, predict: list, at: list, target: list, seq: list, rows: list, tokens: int) -> Batch:
    def join(parts: list) -> torch.Tensor:
        return torch.from_numpy(np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64))

    batch["predict_N"], batch["at_N"] = join(predict), join(at)
    batch["target_N"], batch["seq_N"] = join(target), join(seq)
    batch["row_S"] = torch.tensor(rows, dtype=torch.int64)
    # Host-side counts: reading them never waits for a device.
    batch["tokens"] = batch["distinct"] = tokens
    return batch


def flat(trees: Iterable[Tree]) -> Batch:
    """Lay a forest out in one row without padding, each shared prompt once.

    An empty forest becomes one placeholder token that is not trained: a rank without samples still runs its forward
    and backward pass, and adds exactly zero. Returns a dict with
        input_ids [1, T], position_ids [1, T]   positions restart at each root; a branch continues those of its root
        segments                                the input of attention, see below
        predict_N [N]                           index in the row of the hidden state that predicts the trained token
        at_N [N]                                index in the row of the trained token itself
        target_N [N], seq_N [N]                 the trained token's id and the sequence it belongs to
        row_S [S]                               the data-set row each sequence came from
        tokens                                  tokens of the rows, an int: those of the forest, unless a method counts
                                                shared tokens once per row
        distinct                                distinct tokens of the forest, an int (= T: no token is computed twice)

    `segments` holds, for kernels that read lengths on the device: `cu_query_M1` and `cu_key_M1` [M + 1] (int32,
    cumulative lengths), `key_index` (the row entries that are the keys, segment by segment; None if they are the row
    itself) and the two maximum lengths. With shared prompts they also get the tokens of branches and of the roots that
    have any, `branch_index` and `root_index`, with their cumulative lengths by root, `cu_branch_R1` and `cu_root_R1`
    [R + 1], and the maximum lengths of these. For kernels called once per segment it holds `spans`: a list of (length,
    root) in row order, where root is the number of the segment whose keys come first, or -1.
    """
    ids: list[np.ndarray] = []
    positions: list[np.ndarray] = []
    keys: list[np.ndarray] = []
    spans: list[tuple[int, int]] = []
    predict: list[np.ndarray] = []
    at: list[np.ndarray] = []
    target: list[np.ndarray] = []
    seq: list[np.ndarray] = []
    rows: list[int] = []
    width = 0
    trees = list(trees)

    def segment(tokens: np.ndarray, first_position: int, root: int, root_start: int) -> int:
        nonlocal width
        start = width
        ids.append(tokens)
        positions.append(np.arange(first_position, first_position + len(tokens)))
        own = np.arange(start, start + len(tokens))
        keys.append(own if root < 0 else np.concatenate([np.arange(root_start, root_start + first_position), own]))
        spans.append((len(tokens), root))
        width += len(tokens)
        return start

    def sequence(start: int, offsets: np.ndarray, wanted: np.ndarray, before: int, row: int) -> None:
        # The token before the run predicts its first token.
        predict.append(np.where(offsets == 0, before, start + offsets - 1))
        at.append(start + offsets)
        target.append(wanted)
        seq.append(np.full(len(offsets), len(rows)))
        rows.append(row)

    for tree in trees:
        (root_ids, root_mask), branches = _arrays(tree)
        root_number = len(spans)
        root_start = segment(root_ids, 0, -1, 0)
        root_last = root_start + len(root_ids) - 1
        if not branches or root_mask.any():
            sequence(root_start, *_trained(root_ids, root_mask, 1), root_start, _row(tree, tree.root))
        for branch, (branch_ids, branch_mask) in zip(tree.branches, branches, strict=True):
            # A branch without tokens is a sequence without trained tokens, and no segment.
            start = segment(branch_ids, len(root_ids), root_number, root_start) if len(branch_ids) else 0
            sequence(start, *_trained(branch_ids, branch_mask, 0), root_last, _row(tree, branch))

    if not spans:
        segment(np.zeros(1, dtype=np.int64), 0, -1, 0)
    lengths = [length for length, _ in spans]
    key_lengths = [len(part) for part in keys]
    shared = any(root >= 0 for _, root in spans)
    batch: Batch = {
        "input_ids": torch.from_numpy(np.concatenate(ids))[None],
        "position_ids": torch.from_numpy(np.concatenate(positions))[None],
        "segments": {
            "spans": spans,
            "cu_query_M1": _cumulative(lengths),
            "cu_key_M1": _cumulative(key_lengths),
            "key_index": torch.from_numpy(np.concatenate(keys)) if shared else None,
            "longest_query": max(lengths),
            "longest_key": max(key_lengths),
        },
    }
    if shared:
        batch["segments"] |= _roots(spans, lengths)
    return _finish(batch, predict, at, target, seq, rows, width if trees else 0)


def _roots(spans: list[tuple[int, int]], lengths: list[int]) -> dict[str, Any]:
    """What the branches of each root have in common, see `flat`."""
    starts = np.cumsum([0, *lengths])
    first: dict[int, int] = {}  # root -> where its branches begin
    last: dict[int, int] = {}
    for number, (length, root) in enumerate(spans):
        if root >= 0:
            first.setdefault(root, int(starts[number]))
            last[root] = int(starts[number]) + length
    branches = [last[root] - first[root] for root in first]
    roots = [lengths[root] for root in first]
    found = {"longest_branch": max(branches), "longest_root": max(roots)}
    index = {
        "branch_index": np.concatenate([np.arange(first[root], last[root]) for root in first]),
        "root_index": np.concatenate([np.arange(starts[root], starts[root] + lengths[root]) for root in first]),
    }
    return {
        **found,
        **{name: torch.from_numpy(each) for name, each in index.items()},
        "cu_branch_R1": _cumulative(branches),
        "cu_root_R1": _cumulative(roots),
    }


def without_kernel(batch: Batch) -> Batch:
    """A flat batch whose segments go through attention one by one, on any device."""
    return {**batch, "segments": {"spans": batch["segments"]["spans"]}}


def with_repeated_keys(batch: Batch) -> Batch:
    """A flat batch whose kernel is given the keys of a root once for each branch, in one call."""
    segments = {name: each for name, each in batch["segments"].items() if name not in ("branch_index", "root_index")}
    return {**batch, "segments": segments}


def padded(trees: Iterable[Tree], pad_id: int = 0) -> Batch:
    """Lay a forest out as one right-padded row per sequence, the prompt repeated in each.

    For models whose flat rows fail the probe. The trained tokens are those of `flat`, in the same order. Returns a dict
    with input_ids, attention_mask [B, L], predict_N and at_N as indices into the flattened B * L grid, and
    target_N, seq_N, row_S, tokens as in `flat` (`tokens` counts distinct tokens, not positions).
    """
    sequences: list[tuple[np.ndarray, np.ndarray]] = []
    rows: list[int] = []
    tokens = 0
    for tree in trees:
        (root_ids, root_mask), branches = _arrays(tree)
        tokens += len(root_ids) + sum(len(branch_ids) for branch_ids, _ in branches)
        if not branches or root_mask.any():
            sequences.append((root_ids, root_mask))
            rows.append(_row(tree, tree.root))
        for branch, (branch_ids, branch_mask) in zip(tree.branches, branches, strict=True):
            mask = np.concatenate([np.zeros(len(root_ids), dtype=bool), branch_mask])
            sequences.append((np.concatenate([root_ids, branch_ids]), mask))
            rows.append(_row(tree, branch))
    width = max((len(ids) for ids, _ in sequences), default=1)
    grid = np.full((max(len(sequences), 1), width), pad_id, dtype=np.int64)
    attention = np.zeros_like(grid)
    attention[len(sequences) :] = 1  # an empty batch: one placeholder token, as in `flat`
    predict, at, target, seq = [], [], [], []
    for number, (ids, mask) in enumerate(sequences):
        grid[number, : len(ids)] = ids
        attention[number, : len(ids)] = 1
        offsets, wanted = _trained(ids, mask, 1)
        predict.append(number * width + offsets - 1)
        at.append(number * width + offsets)
        target.append(wanted)
        seq.append(np.full(len(offsets), number))
    batch: Batch = {
        "input_ids": torch.from_numpy(grid),
        "attention_mask": torch.from_numpy(attention),
    }
    return _finish(batch, predict, at, target, seq, rows, tokens)


def moved(value: Any, device: torch.device) -> Any:
    """A batch, or an entry of one, on a device. Nobody waits for the copy."""
    if isinstance(value, torch.Tensor):
        return value.to(device, non_blocking=device.type == "cuda")
    return {key: moved(each, device) for key, each in value.items()} if isinstance(value, dict) else value


def with_labels(batch: Batch) -> Batch:
    """A padded batch with `labels` [B, L]: the token where it is trained, -100 elsewhere (not shifted)."""
    labels = torch.full_like(batch["input_ids"], -100)
    labels.view(-1)[batch["at_N"]] = batch["target_N"]
    return {**batch, "labels": labels}


def relabelled(batch: Batch) -> Batch:
    """A padded batch whose trained tokens are read anew from its `labels`, which the user may have changed."""
    labels, width = batch["labels"], batch["labels"].shape[1]
    marked = labels != -100
    # Nothing precedes the first token of a row, so nothing predicts it.
    marked[:, 1:] &= batch["attention_mask"][:, :-1].bool()
    marked[:, :1] = False
    at_N = marked.flatten().nonzero().squeeze(1)
    return {**batch, "at_N": at_N, "predict_N": at_N - 1, "target_N": labels.flatten()[at_N], "seq_N": at_N // width}


def gridded(batch: Batch, rows: Sequence[int]) -> Batch:
    """The output of a transformers collator (`input_ids`, `labels` [B, L], optionally `attention_mask`) as a padded
    batch. Its other entries are kept."""
    grids = {key: torch.as_tensor(batch[key]) for key in ("input_ids", "labels")}
    mask = batch.get("attention_mask")
    grids["attention_mask"] = torch.ones_like(grids["input_ids"]) if mask is None else torch.as_tensor(mask)
    tokens = int(grids["attention_mask"].sum())
    row_S = torch.tensor(rows, dtype=torch.int64, device=grids["input_ids"].device)
    return relabelled({**batch, **grids, "row_S": row_S, "tokens": tokens, "distinct": tokens})


def unshared(trees: Iterable[Tree]) -> list[Tree]:
    """The same sequences with each prompt repeated before its branch: independent dropout, at full cost."""
    out: list[Tree] = []
    for tree in trees:
        if not tree.branches or any(tree.root.mask):
            out.append(Tree(tree.root, row=_row(tree, tree.root)))
        for branch in tree.branches:
            ids = [*tree.root.ids, *branch.ids]
            mask = [*(False for _ in tree.root.ids), *branch.mask]
            out.append(Tree(Branch(ids, mask), row=_row(tree, branch)))
    return out


def computed(batch: Batch) -> tuple[int, int]:
    """Distinct tokens of a batch, and token positions that its forward passes compute, with padding and repetition.
    Layouts nested in the batch are counted too."""
    inner = [computed(each) for each in batch.values() if isinstance(each, dict) and "input_ids" in each]
    distinct = batch["distinct"] + sum(each[0] for each in inner)
    # The placeholder of an empty forest does not count.
    own = batch["input_ids"].numel() if batch["distinct"] else 0
    return distinct, own + sum(each[1] for each in inner)


def trained(batch: Batch) -> int:
    """Number of trained tokens of a batch, without waiting for the device."""
    return batch["target_N"].shape[0]


def _cumulative(lengths: Sequence[int]) -> torch.Tensor:
    return torch.from_numpy(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32))
