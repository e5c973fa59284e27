"""Rows as they are given: opening sources, the shapes of rows, messages."""
