"""Rows to tokens and masks, by a recipe for each kind of row."""
