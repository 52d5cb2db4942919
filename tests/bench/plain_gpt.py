"""The opponent of step.py on any machine: a plain GPT of the same shape, as a textbook writes it, trained with AdamW.

Rotary positions, grouped key/value heads, RMS norm, squared relu, tied and softcapped head; PyTorch's attention over whole rows, one projection for
queries, keys and values. No feature of train_gpt.py beyond these.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Layer(nn.Module):
    """Attention, then MLP, each on the normed stream."""

    def __init__(self, dim: int, heads: int, kv_heads: int, hidden: int) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.width = heads, kv_heads, dim // heads
        self.qkv = nn.Linear(dim, (heads + 2 * kv_heads) * self.width, bias=False)
        self.out, self.up, self.down = nn.Linear(dim, dim, bias=False), nn.Linear(dim, hidden, bias=False), nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        def rotate(side: Tensor) -> Tensor:
            first, second = F.rms_norm(side, (self.width,)).chunk(2, dim=-1)
            return torch.cat((first * cos + second * sin, second * cos - first * sin), dim=-1)

        q, k, v = (
            side.unflatten(-1, (-1, self.width)).transpose(1, 2)
            for side in self.qkv(F.rms_norm(x, x.shape[-1:])).split([n * self.width for n in (self.heads, self.kv_heads, self.kv_heads)], dim=-1)
        )
        y = F.scaled_dot_product_attention(rotate(q), rotate(k), v, is_causal=True, enable_gqa=True)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        return x + self.down(F.relu(self.up(F.rms_norm(x, x.shape[-1:]))).square())


class PlainGPT(nn.Module):
    """Tokens and targets (B, T) -> mean loss in nats."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        c = config
        self.embedding = nn.Embedding(c.vocab_size, c.model_dim)
        self.layers = nn.ModuleList(Layer(c.model_dim, c.num_heads, c.num_kv_heads, c.mlp_dim) for _ in range(c.num_layers))
        angles = torch.outer(torch.arange(c.train_seq_len), 10000.0 ** -torch.linspace(0, 1, c.head_dim // 2))
        self.register_buffer("cos", angles.cos())
        self.register_buffer("sin", angles.sin())
        nn.init.normal_(self.embedding.weight, std=0.02)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for layer in self.layers:
            x = layer(x, self.cos, self.sin)
        logits = 30 * torch.tanh(F.linear(F.rms_norm(x, x.shape[-1:]), self.embedding.weight) / 30)
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


def opponent(config: Any, device: torch.device) -> Callable[[Tensor], None]:
    """Returns a training step on rows (B, T + 1), for the shapes of `config`."""
    model = PlainGPT(config).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, fused=True)
    forward = torch.compile(model, fullgraph=True, dynamic=False) if config.compile else model

    def step(rows: Tensor) -> None:
        for part in rows.split(max(config.micro_batch_tokens // config.train_seq_len, 1)):
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                loss: Tensor = forward(part[:, :-1], part[:, 1:])
            (loss * len(part) / len(rows)).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step
