"""A small convolutional classifier with self-attention between its layers, and without."""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from fastattn.models._checks import check_channels, check_image_size, check_images, check_number
from fastattn.modules.positional_encoding import LearnedPositionalEncoding
from fastattn.modules.self_attention_2d import SelfAttention2d

Between = Literal["attention", "pointwise", "nothing"]


class PointwiseResidual(nn.Module):
    """Two 1x1 convolutions with ReLU between them, and a residual: :class:`SelfAttention2d`'s place without attention.

    Twice as wide inside, it has the parameters of the attention's four convolutions, but for ``channels`` of them.

    Args:
        channels: number of channels that come in and go out.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        check_number("channels", channels)
        self.widen = nn.Conv2d(channels, 2 * channels, 1)
        self.narrow = nn.Conv2d(2 * channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, C, H, W]`` to the same; every position on its own."""
        return x + self.narrow(F.relu(self.widen(x)))


class ConvNet(nn.Module):
    """Three 3x3 convolutions, the first two halved in size, a mean over all positions, a linear layer.

    Behind the second convolution stands what ``between`` says. Without attention one vector of the last feature map
    sees 18 x 18 pixels, and the mean can only add up what such windows found: two things further apart than that are
    never looked at together. With attention every position has looked at every other.

    Args:
        in_channels: of the images.
        classes: number of classes.
        width: number of channels, even.
        between: ``"attention"``: a :class:`SelfAttention2d`; ``"pointwise"``: a :class:`PointwiseResidual`, of as many
            parameters, that mixes no positions; or ``"nothing"``.
        num_heads: of the attention; divides ``width``.
        size: height and width of the images, multiples of 4, where a learned vector is to be added at each position in
            front of ``between``; default none. Attention by itself does not know where a position is.

    Raises:
        ValueError: ``between`` is none of these, ``size`` is no multiple of 4, ``width`` is odd, or a number is not
            positive.
    """

    def __init__(
        self,
        in_channels: int,
        classes: int,
        *,
        width: int = 32,
        between: Between = "attention",
        num_heads: int = 1,
        size: tuple[int, int] | None = None,
    ) -> None:
        super().__init__()
        check_number("in_channels", in_channels)
        check_number("classes", classes)
        check_channels("width", width)
        if size is not None:
            check_image_size(size)
        self.size = size
        self.conv1 = nn.Conv2d(in_channels, width // 2, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(width // 2)
        self.conv2 = nn.Conv2d(width // 2, width, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)
        makes = {
            "attention": lambda: SelfAttention2d(width, num_heads),
            "pointwise": lambda: PointwiseResidual(width),
            "nothing": nn.Identity,
        }
        if between not in makes:
            raise ValueError(f"between={between!r}: expected one of {', '.join(map(repr, makes))}")
        # As large as what the norm in front of it gives
        self.positions = None if size is None else LearnedPositionalEncoding(size[0] * size[1] // 16, width, std=1.0)
        self.between = makes[between]()
        self.conv3 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm3 = nn.BatchNorm2d(width)
        self.head = nn.Linear(width, classes)

    def features(self, images: Tensor) -> Tensor:
        """What comes before ``between``: ``[B, width, H // 4, W // 4]`` for images ``[B, in_channels, H, W]``."""
        check_images(images, self.conv1.in_channels, self.size)
        x = F.max_pool2d(F.relu(self.norm1(self.conv1(images))), 2)
        x = F.max_pool2d(F.relu(self.norm2(self.conv2(x))), 2)
        return x if self.positions is None else self.positions(x.flatten(2).mT).mT.reshape(x.shape)

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``[B, classes]`` of images ``[B, in_channels, H, W]``, at least 4 x 4."""
        x = F.relu(self.norm3(self.conv3(self.between(self.features(images)))))
        return self.head(x.mean(dim=(2, 3)))

    def attention_map(self, images: Tensor) -> Tensor:
        """The weights ``[B, h, w, h, w]`` of the attention, averaged over heads, ``h = H // 4`` and ``w = W // 4``."""
        if not isinstance(self.between, SelfAttention2d):
            raise ValueError('a ConvNet without between="attention" has no attention map')
        return self.between(self.features(images), need_weights=True)[1]
