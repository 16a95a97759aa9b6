"""The residual networks for small images of He et al. (2016), section 4.2: three stages of widths w, 2w and 4w."""

import torch.nn.functional as F
from torch import Tensor, nn


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut without weights; ``stride`` 2 halves the image and doubles the channels."""

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)
        self.stride = stride
        self.new_channels = channels - channels_in

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.conv1(x)))
        y = self.norm2(self.conv2(y))
        shortcut = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.new_channels))
        return F.relu(y + shortcut)


class ResNet(nn.Module):
    """A stem, three stages and a classifier: ``depth`` 8, 14, 20, 32, 44, 56 layers that hold weights."""

    def __init__(self, depth: int, width: int = 16, *, channels_in: int = 3, classes: int = 10) -> None:
        super().__init__()
        if depth < 8 or (depth - 2) % 6:
            raise ValueError(f"depth {depth} is not 6n + 2: two layers, and two in each of n blocks of three stages.")
        self.stem = nn.Conv2d(channels_in, width, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        self.stages = nn.Sequential(
            self._stage(width, width, 1, depth),
            self._stage(width, 2 * width, 2, depth),
            self._stage(2 * width, 4 * width, 2, depth),
        )
        self.classifier = nn.Linear(4 * width, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")

    @staticmethod
    def _stage(channels_in: int, channels: int, stride: int, depth: int) -> nn.Sequential:
        more = (ResidualBlock(channels, channels, 1) for _ in range((depth - 2) // 6 - 1))
        return nn.Sequential(ResidualBlock(channels_in, channels, stride), *more)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stages(F.relu(self.norm(self.stem(x))))
        return self.classifier(x.mean((2, 3)))
