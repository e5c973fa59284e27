"""The cache of keys and values of rows that enter and leave while others decode."""

from typing import Any

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin

from trl.rollout.draws import on


class ColumnLayer(CacheLayerMixin):
    """Keys and values of one layer, [rows, heads, columns, D]. Their bookkeeping is shared by all layers."""

    is_sliding = False

    def __init__(self, columns: "ColumnCache") -> None:
        super().__init__()
        self.columns = columns

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        rows, capacity = self.columns.rows, self.columns.capacity
        self.keys = key_states.new_zeros(rows, key_states.shape[1], capacity, key_states.shape[3])
        self.values = value_states.new_zeros(rows, value_states.shape[1], capacity, value_states.shape[3])
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        columns, used = self.columns, key_states.shape[0]
        self.keys[:used, :, columns.at] = key_states[:, :, 0]
        self.values[:used, :, columns.at] = value_states[:, :, 0]
        span = slice(columns.first, columns.at + 1)
        return self.keys[:used, :, span], self.values[:used, :, span]

    def get_mask_sizes(self, query_length: Any) -> tuple[int, int]:
        return self.columns.at + 1 - self.columns.first, 0

    def get_seq_length(self) -> int:
        return self.columns.at - self.columns.first

    def get_max_length(self) -> int:
        return -1


class ColumnCache(Cache):
    """A cache whose rows all end at the column `at`, which is written next; no row begins before `first`."""

    def __init__(self, layers: int, rows: int, capacity: int, at: int) -> None:
        self.rows, self.capacity, self.at, self.first = rows, capacity, at, at
        super().__init__(layers=[ColumnLayer(self) for _ in range(layers)])

    def get_query_offset(self, layer_idx: int = 0) -> int:
        return self.at - self.first

    def put(self, row: int, prompt: list[tuple[Tensor, Tensor]]) -> None:
        """A prompt's keys and values into a row, ending before the current column."""
        start = self.at - prompt[0][0].shape[1]
        for layer, (keys, values) in zip(self.layers, prompt, strict=True):
            if not layer.is_initialized:
                layer.lazy_initialization(keys[None], values[None])
            layer.keys[row, :, start : self.at] = keys
            layer.values[row, :, start : self.at] = values

    def keep(self, rows: list[int]) -> None:
        """Move these rows to the front."""
        span = slice(self.first, self.at)
        index = torch.tensor(rows)
        for layer in self.layers:
            for kept in (layer.keys, layer.values):
                index = on(index, kept.device)
                kept[: len(rows), :, span] = kept[:, :, span].index_select(0, index)

    def shift(self, to: int) -> None:
        """Move what is held to the left, so that the current column is `to`."""
        width = self.at - self.first
        for layer in self.layers:
            for kept in (layer.keys, layer.values):
                kept[:, :, to - width : to] = kept[:, :, self.first : self.at].clone()
        self.first, self.at = to - width, to
