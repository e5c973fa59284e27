"""Rows to tokens and masks: deterministic, without a model and without a device."""
