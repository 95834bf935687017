"""The autoencoders of tiny pipelines: the published channels, compression and scale on narrow layers."""

from __future__ import annotations

from typing import Any

_BLOCKS: dict[str, Any] = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 1,
}
_WIDTHS = (8, 8, 8, 8)


def tiny_vae(
    scaling_factor: float,
    shift_factor: float,
    latent_channels: int = 16,
    widths: tuple[int, int, int, int] = _WIDTHS,
    norm_num_groups: int = 4,
) -> Any:
    """A random AutoencoderKL as SD3's and FLUX.1's: latents have an eighth of the pixels' size."""
    import diffusers

    library: Any = diffusers
    return library.AutoencoderKL(
        **_BLOCKS,
        block_out_channels=widths,
        latent_channels=latent_channels,
        norm_num_groups=norm_num_groups,
        scaling_factor=scaling_factor,
        shift_factor=shift_factor,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def tiny_flux1_vae() -> Any:
    """FLUX.1's, which Z-Image has too."""
    return tiny_vae(0.3611, 0.1159)


def tiny_flux2_vae() -> Any:
    """FLUX.2's, with statistics that a latent must really be normalised by."""
    import diffusers

    library: Any = diffusers
    vae = library.AutoencoderKLFlux2(**_BLOCKS, block_out_channels=_WIDTHS, norm_num_groups=4)
    vae.bn.running_mean.normal_(std=0.3)
    vae.bn.running_var.uniform_(0.5, 2.0)
    return vae
