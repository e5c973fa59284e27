"""Helpers that upstream TRL offers beside its trainers, for loops and trainers of one's own. Ours do not use them.

`trl.compat.table.HELPERS` says which module has which; every old path finds them there.
"""
