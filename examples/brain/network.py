"""The network of the example: a 3-D U-Net small enough for two CPU cores."""

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

CLASSES = ("background", "grey matter", "white matter")
# Two levels of pooling: spatial sizes must be multiples of 4.
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
        """Move the batch norm's (then constant) scale and shift into the convolution."""
        if isinstance(self.conv, nn.Conv3d) and isinstance(self.norm, nn.BatchNorm3d):
            self.conv = fuse_conv_bn_eval(self.conv, self.norm)
            self.norm = nn.Identity()


def double_block(n_in: int, n_out: int) -> nn.Sequential:
    return nn.Sequential(ConvBlock(n_in, n_out), ConvBlock(n_out, n_out))


class UNet3d(nn.Module):
    """(N, 1, D, H, W) float32 raw 0..255 intensities -> (N, 3, D, H, W) probabilities.

    A voxel's result depends on its receptive field and on nothing else of the patch: no instance
    or group norm (those would mix in the whole patch's statistics, so overlapping patches would
    disagree everywhere), and batch norm is a constant once the network is in eval mode.
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
        # Probabilities, not logits: chunkq averages what overlapping patches say, and an average
        # of probabilities is one, whereas one patch's huge logit would outvote its neighbours.
        return torch.softmax(self.logits(raw), 1)

    def settle(self) -> None:
        """Keep the batch norms' statistics as they are from now on; training may go on."""
        for module in self.modules():
            if isinstance(module, nn.BatchNorm3d):
                module.eval()

    def fold(self) -> "UNet3d":
        """Fold every batch norm into its convolution, for export (eval mode only)."""
        for module in self.modules():
            if isinstance(module, ConvBlock):
                module.fold()
        return self
