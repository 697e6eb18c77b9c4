"""Files other than ControlNeXt, recognised by the names inside: the kind of each, and the node that loads it."""

from __future__ import annotations

from collections.abc import Callable, Mapping

Names = Mapping[str, tuple[int, ...]]
"""Names of a file's tensors -> their shapes."""


def _any(*parts: str) -> Callable[[Names], bool]:
    return lambda names: any(part in name for name in names for part in parts)


def _starts(*starts: str) -> Callable[[Names], bool]:
    return lambda names: any(name.startswith(starts) for name in names)


FOREIGN: tuple[tuple[Callable[[Names], bool], str], ...] = (
    (
        _starts("base."),
        "holds weights of a base and no encoder. It is the other half of a ControlNeXt: choose it as weights_name, and "
        "the encoder that came with it as control_name.",
    ),
    (
        _any("enc_zero_convs_in.0.0.weight", "control_to_base_for_conv_in.weight", "ctrl_conv_in.weight"),
        "is a ControlNet-XS, another method than ControlNeXt. Load it with Load ControlNet-XS; it stacks with "
        "ControlNeXt.",
    ),
    (
        _any("lllite_conditioning1.", "lllite_dit_blocks_"),
        "is a ControlNet-LLLite for Anima. Put it into models/model_patches and load it with the stock Load Model "
        "Patch and Apply Anima LLLite nodes.",
    ),
    (
        _any("lllite_unet_"),
        "is a ControlNet-LLLite for SDXL. Load it with the nodes of a pack for ControlNet-LLLite; it stacks with "
        "ControlNeXt.",
    ),
    (
        _any("control_all_x_embedder.", "control_noise_refiner.", "control_layers."),
        "is a Fun ControlNet for Z-Image. Put it into models/model_patches and load it with the stock Load Model Patch "
        "and Apply Z-Image Fun ControlNet nodes; it works beside a ControlNeXt.",
    ),
    (
        _any("y_rms.weight"),
        "is a DiffSynth ControlNet for Qwen-Image. Put it into models/model_patches and load it with the stock Load "
        "Model Patch and Apply Qwen Image DiffSynth ControlNet nodes; it works beside a ControlNeXt.",
    ),
    (
        _any("controlnet_patch_embedding.", "feature_embedder.mid_layer_norm.", "audio_proj.proj1."),
        "is a model patch (Uni3C, USO or MultiTalk). Put it into models/model_patches and load it with the stock Load "
        "Model Patch node and the node of that method.",
    ),
    (
        _any(
            "control_img_in.", "control_blocks.", "controlnet_x_embedder.", "pos_embed_input.", "controlnet_mode_embed"
        ),
        "is a ControlNet for a diffusion transformer. Put it into models/controlnet and load it with the stock Load "
        "ControlNet Model node; it chains with ControlNeXt.",
    ),
    (
        _any("img_in.lora_A.", "img_in.lora_down.", "first.lora_A.", "first.lora_down.", "x_embedder.lora_A."),
        "is a control LoRA: it widens the model's input for a hint (canny or depth of FLUX.1 Tools, Krea 2). Put it "
        "into models/loras, load it with Load LoRA, and give the hint as that LoRA wants it, for FLUX.1 Tools with "
        "InstructPixToPixConditioning.",
    ),
    (
        _any(".lora_down.", ".lora_up.", ".lora_A.", ".lora_B.", "lora_unet_", "lora_te"),
        "is a LoRA. Put it into models/loras and use a LoRA loader; it stacks with ControlNeXt.",
    ),
    (
        _starts("model.diffusion_model.", "first_stage_model.", "cond_stage_model.", "conditioner."),
        "is a full checkpoint. Put it into models/checkpoints, load it with Load Checkpoint, connect its MODEL here, "
        "and choose a ControlNeXt encoder (controlnet.safetensors) as control_name.",
    ),
    (
        _any(
            "controlnet_cond_embedding.",
            "input_hint_block.",
            "zero_convs.0.0.",
            "controlnet_down_blocks.",
            "controlnet_blocks.",
            "lora_controlnet",
        ),
        "is a classic ControlNet. Load it with the stock Load ControlNet Model node; it chains with ControlNeXt.",
    ),
    (
        _any(
            "body.0.resnets.0.block1.",
            "body.0.in_conv.",
            "body.0.block1.",
            "adapter.conv_in.",
            "adapter.body.",
        ),
        "is a T2I-Adapter. Load it with the stock Load ControlNet Model node; it chains with ControlNeXt.",
    ),
    (
        _any("control_image_embed."),
        "is a control for a diffusion transformer (SD3) of another method: an encoder of transformer blocks, which no "
        "node loads. Choose a ControlNeXt made with this pack.",
    ),
    (
        _any("joint_blocks.0.", "double_blocks.0.", "transformer_blocks.0.attn.to_q", "noise_refiner.0."),
        "is a whole diffusion transformer or a part of one. Put it into models/diffusion_models, load it with Load "
        "Diffusion Model, connect its MODEL here, and choose a control made for it as control_name.",
    ),
    (
        _any("to_out.0.weight", "attn2.to_", "attn1.to_"),
        "holds UNet weights and no encoder. It is the other half of a ControlNeXt: choose it as weights_name, and the "
        "encoder that came with it (controlnet.safetensors) as control_name.",
    ),
    (
        _starts("encoder.", "decoder.", "quant_conv.", "taesd_"),
        "is an image autoencoder. Put it into models/vae and load it with Load VAE.",
    ),
    (
        _starts("text_model.", "transformer.", "vision_model."),
        "is a text or image encoder. Put it into models/text_encoders or models/clip_vision.",
    ),
)


def foreign_kind(shapes: Names) -> str:
    """Kind of a file and the remedy, as a sentence to follow its path; empty for an unknown kind."""
    return next((words for is_kind, words in FOREIGN if is_kind(shapes)), "")
