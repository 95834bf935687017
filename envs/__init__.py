"""What is asked? Prompts, source images, episodes and the embedded world.

Importing the package registers its environments with Gymnasium: ``pdtr/TextToImage-v0``, ``pdtr/ImageEditing-v0`` and
``pdtr/Denoising-v0``, for ``gymnasium.make`` and ``gymnasium.make_vec``. Their modules are imported when one is made.
"""

import gymnasium

ENTRY_POINTS = {
    "pdtr/TextToImage-v0": "envs.text_to_image:TextToImage",
    "pdtr/ImageEditing-v0": "envs.image_editing:ImageEditing",
    "pdtr/Denoising-v0": "envs.denoising:Denoising",
}


def register() -> None:
    """Register the environments that are not registered yet."""
    for name, entry_point in ENTRY_POINTS.items():
        if name not in gymnasium.registry:
            gymnasium.register(name, f"{entry_point}Env", vector_entry_point=f"{entry_point}VectorEnv")


register()
