"""What a run will need, from the model's configuration alone: memory by part, time, cost. No weights, no device.

`plan(run)` gives a `Plan` for a `Run`; `trl plan <method> <the flags of the method>` makes both. Activations are
measured on tensors without values (`trace`); the rest is arithmetic (`memory`, `cost`).
"""

from .cards import CARDS, Card
from .memory import Plan, plan, tokens_that_fit
from .run import Run

__all__ = ["CARDS", "Card", "Plan", "Run", "plan", "tokens_that_fit"]
