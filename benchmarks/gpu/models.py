"""The networks that are timed, in plain torch: blocks of a vision transformer, and blocks like Llama's.

``x_BTC`` is batch, tokens, channels. Rotary embeddings are left away: they hold no product.
What flows from block to block is bfloat16.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x_BTC: Tensor) -> Tensor:
        q, k, v = self.qkv(x_BTC).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x_BTC: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x_BTC)))


class ViTBlock(nn.Module):
    def __init__(self, width: int, hidden: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(width), Attention(width, heads)
        self.norm2, self.mlp = nn.LayerNorm(width), MLP(width, hidden)

    def forward(self, x_BTC: Tensor) -> Tensor:
        x_BTC = x_BTC + self.attention(self.norm1(x_BTC))
        return x_BTC + self.mlp(self.norm2(x_BTC))


class GatedMLP(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate, self.up = (nn.Linear(width, hidden, bias=False) for _ in range(2))
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x_BTC: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x_BTC)) * self.up(x_BTC))


class RMSNorm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x_BTC: Tensor) -> Tensor:
        y_BTC = x_BTC.float()
        return (y_BTC * (y_BTC.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * self.weight).to(x_BTC.dtype)


class LlamaBlock(nn.Module):
    def __init__(self, width: int, hidden: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.o = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.norm1, self.norm2 = RMSNorm(width), RMSNorm(width)
        self.mlp = GatedMLP(width, hidden)

    def forward(self, x_BTC: Tensor) -> Tensor:
        normed = self.norm1(x_BTC)
        q, k, v = (p(normed).unflatten(2, (self.heads, -1)).transpose(1, 2) for p in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x_BTC = x_BTC + self.o(y.transpose(1, 2).flatten(2))
        return x_BTC + self.mlp(self.norm2(x_BTC))


def vit_l(blocks: int, dry: bool) -> nn.Module:
    width, hidden, heads = (64, 128, 2) if dry else (1024, 4096, 16)
    return nn.Sequential(*(ViTBlock(width, hidden, heads) for _ in range(blocks)))


def vit_l_mlp(blocks: int, dry: bool) -> nn.Module:
    return nn.Sequential(*(MLP(*((64, 128) if dry else (1024, 4096))) for _ in range(blocks)))


def llama(blocks: int, dry: bool) -> nn.Module:
    width, hidden, heads = (64, 128, 2) if dry else (4096, 11008, 32)
    return nn.Sequential(*(LlamaBlock(width, hidden, heads) for _ in range(blocks)))


def batch(name: str, dry: bool) -> tuple[int, int, int]:
    """Give the shape of a network's input: 64 images of 197 tokens; 8192 tokens of text."""
    if dry:
        return 2, 16, 64
    return (4, 2048, 4096) if name.startswith("llama") else (64, 197, 1024)


MODELS = {"vit_l": vit_l, "vit_l_mlp": vit_l_mlp, "llama": llama}


def made(name: str, blocks: int, device: torch.device, dry: bool) -> nn.Module:
    torch.manual_seed(0)
    with torch.device(device):
        return MODELS[name](blocks, dry)
