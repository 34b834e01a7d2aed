"""A picture into words: a convolutional network makes a grid of features, a recurrent one looks at it and speaks."""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastattn.models._checks import check_channels, check_image_size, check_images, check_number, evaluating
from fastattn.models.attention_decoder import AttentionDecoder, Decoded, Memory
from fastattn.modules.positional_encoding import LearnedPositionalEncoding


class ImageCaptioner(nn.Module):
    """A small CNN, and the decoder of :class:`fastattn.models.Seq2Seq` on its grid of features (arXiv:1502.03044).

    The grid ``[B, C, h, w]`` is read as ``h * w`` vectors, where sequence-to-sequence has an encoder's states. Without
    attention a linear layer makes one vector of all of them, which every word has to be said from; with attention that
    vector only makes the first state, and every word has a context of its own.

    Args:
        in_channels: of the images.
        vocabulary: number of words.
        size: height and width of the images, multiples of 4.
        channels: number ``C`` of the grid's channels, even.
        hidden: size of the decoder's state.
        embedding: size of the vector that stands for a word.
        attention_dim: size of the layer that scores the grid's vectors; None: no attention.

    Attributes:
        grid: height ``h`` and width ``w`` of the grid, a quarter of the image's.

    Raises:
        ValueError: ``size`` is no multiple of 4, ``channels`` is odd, or a number is not positive.
    """

    def __init__(
        self,
        in_channels: int,
        vocabulary: int,
        size: tuple[int, int],
        *,
        channels: int = 32,
        hidden: int = 64,
        embedding: int = 32,
        attention_dim: int | None = 64,
    ) -> None:
        super().__init__()
        check_number("in_channels", in_channels)
        check_channels("channels", channels)
        check_image_size(size)
        self.in_channels, self.size = in_channels, size
        self.grid = size[0] // 4, size[1] // 4
        widths = in_channels, channels // 2, channels, channels
        pairs = list(itertools.pairwise(widths))
        self.convolutions = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1, bias=False) for a, b in pairs)
        self.norms = nn.ModuleList(nn.BatchNorm2d(b) for _, b in pairs)
        positions = self.grid[0] * self.grid[1]
        self.positions = LearnedPositionalEncoding(positions, channels, std=0.5)
        self.summary = nn.Linear(positions * channels, channels)
        self.decoder = AttentionDecoder(
            vocabulary, channels, hidden=hidden, embedding=embedding, attention_dim=attention_dim
        )

    def features(self, images: Tensor) -> Tensor:
        """The grid ``[B, C, h, w]`` of images ``[B, in_channels, 4 h, 4 w]``."""
        check_images(images, self.in_channels, self.size)
        x = images
        for i, (convolution, norm) in enumerate(zip(self.convolutions, self.norms)):
            x = F.relu(norm(convolution(x)))
            if i < 2:
                x = F.max_pool2d(x, 2)
        return x

    def encode(self, images: Tensor) -> Memory:
        """The grid's vectors ``[B, h * w, C]``, each told where it stands, and one summary ``[B, C]`` of all."""
        # Channels last in shape, but not in memory: the positions are added to a view of the grid
        vectors = self.positions(self.features(images).flatten(2).mT)
        return Memory(vectors, self.summary(vectors.flatten(1)))

    def forward(self, images: Tensor, captions: Tensor, *, need_weights: bool = False) -> tuple[Tensor, Tensor | None]:
        """Teacher forcing: the word behind each of the caption's words, had all before it been said.

        Args:
            images: ``[B, in_channels, H, W]``.
            captions: integers ``[B, T]``, from the start token on.
            need_weights: also return the weights of the attention.

        Returns:
            Logits ``[B, T, vocabulary]``, and the weights ``[B, T, h * w]`` or None.
        """
        return self.decoder(captions, self.encode(images), need_weights=need_weights)

    def loss(self, images: Tensor, captions: Tensor, padding: Tensor | None = None) -> Tensor:
        """Mean cross entropy, in nats, of each word behind the first that is no ``padding`` ``[B, T]``."""
        return self.decoder.loss(captions, self.encode(images), padding)

    @torch.no_grad()
    def generate(
        self,
        images: Tensor,
        length: int,
        *,
        start: int,
        end: int | None = None,
        beam: int = 1,
        need_weights: bool = False,
    ) -> Decoded:
        """The captions of ``images``; the rest as for :meth:`AttentionDecoder.generate`."""
        with evaluating(self):
            memory = self.encode(images)
            return self.decoder.generate(memory, length, start=start, end=end, beam=beam, need_weights=need_weights)
