"""Queries, responses and scores that `record_ppo.py` and its test train on. Imports no trl."""

import torch

QUERIES = [[1, 5, 9], [1, 6], [1, 15, 16, 17, 18, 3], [1, 20]]
RESPONSES = [[4, 7, 11, 3, 2], [10], [19, 20, 2], [21, 22, 4, 6, 8, 13, 2]]
SCORES = [1.5, -0.7, 0.2, 0.9]
KEPT = ("lm_head.weight", "model.layers.0.self_attn.q_proj.weight", "model.layers.1.mlp.down_proj.weight")
RATE = 1e-3

EVEN = [[1, 5, 9], [1, 6, 7], [1, 15, 16], [1, 20, 21]]
ANSWERS = [[4, 7, 11, 3], [10, 8, 14, 2], [19, 20, 9, 12], [21, 22, 4, 6]]


def head_weights() -> torch.Tensor:
    return 0.5 * torch.sin(torch.arange(1.0, 9.0))[None]
