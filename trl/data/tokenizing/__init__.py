"""Rows to tokens and masks: one reader, and a recipe for sequences, one for comparisons, one for prompts."""
