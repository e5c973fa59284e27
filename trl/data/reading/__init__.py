"""Rows as the user gives them: opening sources, finding the shape of rows, reading messages and comparisons."""
