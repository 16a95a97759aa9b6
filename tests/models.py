"""Small networks, real ones where a library has them, that are hard in one way each."""

import torch
from timm.models.resnet import BasicBlock, ResNet
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch.nn import functional as F
from torchvision.models.convnext import CNBlockConfig, ConvNeXt
from torchvision.models.swin_transformer import SwinTransformer


def mlp():
    return nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 8))


def cnn():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4),
    )  # fmt: skip


def resnet():
    """One block per stage, with batch norm and a second branch."""
    return ResNet(BasicBlock, (1, 1, 1, 1), num_classes=8, channels=(16, 32, 64, 64))


def convnext():
    """Drops paths with torchvision's StochasticDepth."""
    settings = [CNBlockConfig(16, 32, 2), CNBlockConfig(32, None, 2)]
    return ConvNeXt(settings, stochastic_depth_prob=0.5, layer_scale=1.0, num_classes=8)


def deit():
    """Drops paths with timm's DropPath."""
    return VisionTransformer(
        img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=8, drop_path_rate=0.5
    )


def swin(depths=(2, 2), **options):
    """Reads its layers' weights itself: functional attention."""
    return SwinTransformer(
        patch_size=[4, 4], embed_dim=16, depths=list(depths), num_heads=[2] * len(depths), window_size=[4, 4],
        num_classes=8, stochastic_depth_prob=0.2, **options,
    )  # fmt: skip


class FunctionalDropout(nn.Module):
    """Its own forward differs between train() and eval()."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(16, 32), nn.Linear(32, 8)

    def forward(self, x):
        return self.last(F.dropout(self.first(x), 0.5, training=self.training))


class Branching(nn.Module):
    """Looks at its data, so that no graph of it can be traced."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(16, 16), nn.Linear(16, 8)

    def forward(self, x):
        x = self.first(x)
        if x.sum() > 0:
            x = -x
        return self.last(F.dropout(x, 0.5, training=self.training))


class WithBranchingPart(nn.Module):
    """Can be traced but for one submodule."""

    def __init__(self):
        super().__init__()
        self.stem, self.part, self.head = nn.Linear(16, 16), Branching(), nn.Linear(8, 8)

    def forward(self, x):
        return self.head(self.part(torch.relu(self.stem(x))))


class Encoder(nn.Module):
    """PyTorch's own transformer, which takes a fused path in evaluation mode."""

    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.2, batch_first=True)
        self.encoder, self.head = nn.TransformerEncoder(layer, 2), nn.Linear(32, 8)

    def forward(self, x):
        return self.head(self.encoder(x))


class TiedLanguageModel(nn.Module):
    """Its head is its embedding."""

    def __init__(self):
        super().__init__()
        self.embedding, self.body, self.head = nn.Embedding(24, 16), nn.Linear(16, 16), nn.Linear(16, 24, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens):
        return self.head(self.body(self.embedding(tokens)))


class Recorder(nn.Module):
    """Writes on itself in every forward: plain values, lists and buffers, in place."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(16, 16)
        self.calls, self.kept = 0, []
        self.register_buffer("mean", torch.zeros(16))
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x):
        y = self.layer(x)
        self.calls += 1
        self.kept.append(y)
        self.activation = y
        self.mean.mul_(0.9).add_(y.detach().mean(0))
        self.count += 1
        return y - self.mean


class WithTables(nn.Module):
    """Holds a buffer that no state_dict has, one that it has, and a plain tensor."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(16, 8)
        self.register_buffer("table", torch.arange(16.0), persistent=False)
        self.register_buffer("seen", torch.tensor(7))
        self.constant = torch.full((8,), 2.0)

    def forward(self, x):
        return self.layer(x * self.table) + self.constant


class NeverTheSame(nn.Module):
    """Drops its input in evaluation, too, so that no two answers agree."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(16, 16)

    def forward(self, x):
        return self.layer(F.dropout(x, 0.5, training=True))


class WithExtraState(nn.Module):
    """Puts a plain value into its state_dict."""

    def __init__(self):
        super().__init__()
        self.layer, self.scale = nn.Linear(16, 8), 1.0

    def forward(self, x):
        return self.layer(x) * self.scale

    def get_extra_state(self):
        return {"scale": self.scale}

    def set_extra_state(self, state):
        self.scale = state["scale"]
