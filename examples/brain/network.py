"""The example's network: a 3-D U-Net small enough for two CPU cores."""

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

CLASSES = ("background", "grey matter", "white matter")
# Two levels of pooling, so spatial sizes must be multiples of 4.
WIDTHS = (8, 16, 32)


class ConvBlock(nn.Module):
    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__()
        self.conv: nn.Module = nn.Conv3d(n_in, n_out, 3, padding=1, bias=False)
        self.norm: nn.Module = nn.BatchNorm3d(n_out, momentum=0.03)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.act(self.norm(self.conv(x)))
        return y

    def fold(self) -> None:
        """Fold the batch norm's constant scale and shift into the convolution."""
        if isinstance(self.conv, nn.Conv3d) and isinstance(self.norm, nn.BatchNorm3d):
            self.conv = fuse_conv_bn_eval(self.conv, self.norm)
            self.norm = nn.Identity()


def double_block(n_in: int, n_out: int) -> nn.Sequential:
    return nn.Sequential(ConvBlock(n_in, n_out), ConvBlock(n_out, n_out))


class UNet3d(nn.Module):
    """U-Net: (N, 1, D, H, W) float32 raw intensities 0..255 -> (N, 3, D, H, W) probabilities.

    The result of a voxel depends only on its receptive field. So there is no instance or group
    norm: these use statistics of the complete patch, and overlapping patches would disagree
    everywhere. Batch norm is a constant once the network is in eval mode.
    """

    def __init__(self) -> None:
        super().__init__()
        a, b, c = WIDTHS
        self.down1 = double_block(1, a)
        self.down2 = double_block(a, b)
        self.bottom = double_block(b, c)
        self.up2 = nn.ConvTranspose3d(c, b, 2, stride=2)
        self.join2 = double_block(2 * b, b)
        self.up1 = nn.ConvTranspose3d(b, a, 2, stride=2)
        self.join1 = double_block(2 * a, a)
        self.head = nn.Conv3d(a, len(CLASSES), 1)
        self.pool = nn.MaxPool3d(2)

    def logits(self, raw: Tensor) -> Tensor:
        x1 = self.down1(raw / 128.0 - 1.0)
        x2 = self.down2(self.pool(x1))
        x3 = self.bottom(self.pool(x2))
        y2 = self.join2(torch.cat([x2, self.up2(x3)], 1))
        y1: Tensor = self.head(self.join1(torch.cat([x1, self.up1(y2)], 1)))
        return y1

    def forward(self, raw: Tensor) -> Tensor:
        # Probabilities, not logits: chunkq averages the predictions of overlapping patches. An
        # average of probabilities is a probability, but one patch's large logit would dominate.
        return torch.softmax(self.logits(raw), 1)

    def settle(self) -> None:
        """Freeze the statistics of all batch norms; training may continue."""
        for module in self.modules():
            if isinstance(module, nn.BatchNorm3d):
                module.eval()

    def fold(self) -> "UNet3d":
        """Fold every batch norm into its convolution, for export; requires eval mode."""
        for module in self.modules():
            if isinstance(module, ConvBlock):
                module.fold()
        return self
