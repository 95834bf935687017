"""The small parts of the embedded world's policy: a word encoder and a linear image codec.

Both travel inside the checkpoint (vocabulary, basis), so a policy needs nothing of the world it was trained on.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from torch import Tensor, nn

_WORD = re.compile(r"[a-z0-9]+|,")
_PADDING, _UNKNOWN = 0, 1


def words_of(text: str) -> list[str]:
    """What the encoder reads of a text: its words in small letters, numbers and commas; the rest is passed over."""
    return _WORD.findall(text.lower())


class WordEncoder(nn.Module):
    """Text to states and a pooled state: word and position embeddings, one encoder layer, LayerNorm.

    Sequences are padded to a fixed length (the backbone has no text mask), so that a prompt's embedding does not
    depend on what it is batched with. Words out of the vocabulary share one embedding.
    """

    def __init__(self, vocabulary: Sequence[str], width: int, max_length: int) -> None:
        super().__init__()
        self.vocabulary = tuple(vocabulary)
        self.max_length = max_length
        self._index = {word: i + 2 for i, word in enumerate(self.vocabulary)}
        self.words = nn.Embedding(len(self.vocabulary) + 2, width)
        self.positions = nn.Parameter(torch.randn(max_length, width) * 0.02)
        self.layer = nn.TransformerEncoderLayer(width, 4, 2 * width, 0.0, batch_first=True, norm_first=True)
        self.norm = nn.LayerNorm(width)
        nn.init.normal_(self.words.weight, std=0.5)

    def tokenize(self, texts: Sequence[str], length: int) -> Tensor:
        """Word indices, cut or padded to ``length``: int64 [B, length]."""
        rows = [[self._index.get(w, _UNKNOWN) for w in words_of(t)][:length] for t in texts]
        return torch.tensor([row + [_PADDING] * (length - len(row)) for row in rows], dtype=torch.long)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens [B, L] to states [B, L, D] and their mean over words [B, D]."""
        is_word = tokens != _PADDING
        # A prompt without words still attends to its first padding token: a softmax needs one key.
        visible = is_word.clone()
        visible[:, 0] = True
        bias = torch.zeros(visible.shape, device=tokens.device).masked_fill(~visible, float("-inf"))
        states = self.layer(self.words(tokens) + self.positions[: tokens.shape[1]], src_key_padding_mask=bias)
        states = self.norm(states)
        weights = visible.to(states.dtype)[..., None]
        return states, (states * weights).sum(1) / weights.sum(1)


class PatchCodec(nn.Module):
    """A frozen linear autoencoder: square patches of pixels to their leading principal components.

    ``latent = (patch - mean) @ basis / scale`` with an orthonormal basis. The scale is the square root of each
    component's standard deviation (times a constant that gives latents unit mean variance): between whitening, which
    spends the model on detail, and none, which drowns detail in noise.
    """

    mean: Tensor
    basis: Tensor
    scale: Tensor

    def __init__(self, patch_size: int, num_channels: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        dim = 3 * patch_size**2
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("basis", torch.eye(dim)[:, :num_channels].contiguous())
        self.register_buffer("scale", torch.ones(num_channels))

    @property
    def dtype(self) -> torch.dtype:
        """Of what it was fitted to."""
        return self.mean.dtype

    @torch.no_grad()
    def fit(self, images: Tensor) -> None:
        """Fit mean, basis and scale on images, uint8 [B, H, W, 3]."""
        patches = self._patches(images).flatten(0, 2).double()
        mean = patches.mean(0)
        variance, vectors = torch.linalg.eigh((patches - mean).T @ (patches - mean) / len(patches))
        num_channels = len(self.scale)
        std = variance.flip(0)[:num_channels].clamp_min(1e-8).sqrt()
        constant = (std.mean()).sqrt()
        self.mean.copy_(mean)
        self.basis.copy_(vectors.flip(1)[:, :num_channels])
        self.scale.copy_(std.sqrt() * constant)

    def encode(self, images: Tensor) -> Tensor:
        """Images, uint8 [B, H, W, 3], to latents, float32 [B, C, H / p, W / p]."""
        centred = self._patches(images) - self.mean
        return ((centred @ self.basis) / self.scale).permute(0, 3, 1, 2).contiguous()

    def decode(self, latents: Tensor) -> Tensor:
        """Latents [B, C, h, w] to images, uint8 [B, h p, w p, 3]."""
        size = self.patch_size
        patches = (latents.float().permute(0, 2, 3, 1) * self.scale) @ self.basis.T + self.mean
        batch, rows, columns, _ = patches.shape
        pixels = patches.reshape(batch, rows, columns, size, size, 3).permute(0, 1, 3, 2, 4, 5)
        pixels = pixels.reshape(batch, rows * size, columns * size, 3)
        return ((pixels + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)

    def _patches(self, images: Tensor) -> Tensor:
        batch, height, width, _ = images.shape
        size = self.patch_size
        pixels = images.float() / 127.5 - 1
        grid = pixels.reshape(batch, height // size, size, width // size, size, 3)
        return grid.permute(0, 1, 3, 2, 4, 5).flatten(3)
