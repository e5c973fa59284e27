"""Callbacks for `transformers.Trainer`."""

from .answers import LogCompletionsCallback as LogCompletionsCallback
from .answers import WinRateCallback as WinRateCallback
from .merging import MergeConfig as MergeConfig
from .merging import MergeModelCallback as MergeModelCallback
from .traces import WeaveCallback as WeaveCallback
from .weights import BEMACallback as BEMACallback
from .weights import SyncRefModelCallback as SyncRefModelCallback
