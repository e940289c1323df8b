"""Pipelines that are given images beside a prompt: image to video, edits, upscaling, image to image of more families."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import (
    ChronoEditPipeline,
    ChronoEditTransformer3DModel,
    CogVideoXImageToVideoPipeline,
    CogVideoXTransformer3DModel,
    DDPMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideo15ImageToVideoPipeline,
    HunyuanVideo15Transformer3DModel,
    Kandinsky5I2VPipeline,
    KandinskyV22Img2ImgPipeline,
    KandinskyV22InpaintPipeline,
    LTXConditionPipeline,
    LTXImageToVideoPipeline,
    QwenImageEditPipeline,
    QwenImageEditPlusPipeline,
    QwenImageImg2ImgPipeline,
    StableDiffusion3Img2ImgPipeline,
    StableDiffusionDepth2ImgPipeline,
    StableDiffusionLatentUpscalePipeline,
    StableDiffusionUpscalePipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableUnCLIPImg2ImgPipeline,
    WanImageToVideoPipeline,
    WanTransformer3DModel,
    ZImageImg2ImgPipeline,
)
from diffusers.pipelines.chronoedit import pipeline_chronoedit
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit, pipeline_qwenimage_edit_plus
from diffusers.pipelines.stable_diffusion.stable_unclip_image_normalizer import StableUnCLIPImageNormalizer
from diffusers.pipelines.wan import pipeline_wan_i2v
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    CLIPVisionModelWithProjection,
    SiglipImageProcessor,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from tiny import cogvideox, hunyuanvideo15, joyimage, kandinsky2, kandinsky5, ltx, qwenimage, sd3, sd15, sdxl, wan, zimage
from tiny._language import TextProcessor
from tiny._parts import lively, quiet
from tiny.family import TinyFamily
from tiny.text import prompts

SIZE = 16
VISION = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
VISION |= {"image_size": SIZE, "patch_size": 8}

for module in (pipeline_wan_i2v, pipeline_chronoedit):  # which want it, unlike the plain one
    vars(module).setdefault("ftfy", SimpleNamespace(fix_text=str))
pipeline_qwenimage_edit.calculate_dimensions = lambda area, ratio: (SIZE, SIZE, None)  # 1024² whatever the picture is
pipeline_qwenimage_edit_plus.calculate_dimensions = lambda area, ratio: (SIZE, SIZE)


def beside(cls: type, pipe: Any, *attributes: str, **changes: Any) -> Any:
    """Another pipeline of the same components, but for the changes, with these attributes of `pipe`."""
    other = quiet(cls(**{**pipe.components, **changes}))
    for name in attributes:
        setattr(other, name, getattr(pipe, name))
    return other


def again(transformer: Any, gains: dict[str, float] | None = None, **changes: Any) -> Any:
    """A model of the same config, but for the changes."""
    config = {name: value for name, value in transformer.config.items() if not name.startswith("_")}
    torch.manual_seed(0)
    return lively(type(transformer)(**{**config, **changes}), gains=gains)


def clip_processor() -> CLIPImageProcessor:
    return CLIPImageProcessor(size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE})


def wan_i2v(**changes: Any) -> WanImageToVideoPipeline:
    """As 2.1, with an image encoder; changes: of the pipeline's parts."""
    pipe = wan.pipeline()
    vision = lively(CLIPVisionModel(CLIPVisionConfig(**VISION)))
    model = again(pipe.transformer, in_channels=4 + 4 + 4, image_dim=8, added_kv_proj_dim=24)
    parts = {"transformer": model, "image_encoder": vision, "image_processor": clip_processor()}
    return beside(WanImageToVideoPipeline, pipe, **{**parts, **changes})


def wan22_i2v() -> WanImageToVideoPipeline:
    models: list[WanTransformer3DModel] = [again(wan.transformer(0), in_channels=4 + 4 + 4) for _ in range(2)]
    transformer, transformer_2 = models
    parts = {"transformer": transformer, "transformer_2": lively(transformer_2, 1), "image_encoder": None}
    return wan_i2v(**parts, boundary_ratio=0.875)


def wan_ti2v() -> WanImageToVideoPipeline:
    """As TI2V-5B, whose tokens have a t of their own."""
    return wan_i2v(transformer=wan.transformer(0), image_encoder=None, expand_timesteps=True)


def chronoedit() -> ChronoEditPipeline:
    parts = wan_i2v().components
    torch.manual_seed(0)
    model = ChronoEditTransformer3DModel(**{**wan.SIZES, "in_channels": 4 + 4 + 4}, image_dim=8, added_kv_proj_dim=24)
    kept = {name: part for name, part in parts.items() if name not in ("transformer_2", "boundary_ratio", "expand_timesteps")}
    return quiet(ChronoEditPipeline(**{**kept, "transformer": lively(model)}))


def cogvideox_i2v() -> CogVideoXImageToVideoPipeline:
    pipe = cogvideox.pipeline()
    model: CogVideoXTransformer3DModel = again(pipe.transformer, {"*.to_v.weight": 4.0}, in_channels=8, ofs_embed_dim=16)
    return beside(CogVideoXImageToVideoPipeline, pipe, transformer=model)


def ltx_condition() -> LTXConditionPipeline:
    return beside(LTXConditionPipeline, ltx.pipeline(), scheduler=FlowMatchEulerDiscreteScheduler())


def hunyuanvideo15_i2v() -> HunyuanVideo15ImageToVideoPipeline:
    pipe = hunyuanvideo15.pipeline()
    model: HunyuanVideo15Transformer3DModel = again(
        pipe.transformer, {"*.add_v_proj.weight": 8.0}, task_type="i2v", target_size=8
    )
    return beside(
        HunyuanVideo15ImageToVideoPipeline,
        pipe,
        "system_message",
        "prompt_template_encode_start_idx",
        "tokenizer_max_length",
        "tokenizer_2_max_length",
        "vision_num_semantic_tokens",
        transformer=model,
        image_encoder=lively(SiglipVisionModel(SiglipVisionConfig(**VISION))),
        feature_extractor=SiglipImageProcessor(size={"height": SIZE, "width": SIZE}),
    )


def kandinsky5_i2v() -> Kandinsky5I2VPipeline:
    return beside(Kandinsky5I2VPipeline, kandinsky5.pipeline(), "prompt_template", "prompt_template_encode_start_idx")


def qwenimage_with(cls: type) -> Any:
    """With a processor that leaves the pictures out: the transformer sees them, the text encoder does not."""
    pipe = qwenimage.pipeline()
    edits = {"processor": TextProcessor(pipe.tokenizer)} if cls is not QwenImageImg2ImgPipeline else {}
    return beside(cls, pipe, "prompt_template_encode", "prompt_template_encode_start_idx", **edits)


def sd2(cls: type, channels: int, unet: dict[str, Any] | None = None, **parts: Any) -> Any:
    """Pipelines of SD 2.x, without a safety checker."""
    kept = {name: part for name, part in sd15.components().items() if name in ("vae", "text_encoder", "tokenizer", "scheduler")}
    return quiet(cls(**{**kept, "unet": sd15.unet(channels, **(unet or {})), **parts}))


def upscale() -> StableDiffusionUpscalePipeline:
    unet = {"num_class_embeds": 400}
    return sd2(StableDiffusionUpscalePipeline, 4 + 3, unet, low_res_scheduler=DDPMScheduler(), max_noise_level=350)


def latent_upscale() -> StableDiffusionLatentUpscalePipeline:
    """It hands its scheduler a mixture of the prediction and x_t."""
    scheduler = EulerDiscreteScheduler(prediction_type="sample")
    return sd2(StableDiffusionLatentUpscalePipeline, 4 + 4, {"out_channels": 5, "time_cond_proj_dim": 144}, scheduler=scheduler)


def unclip() -> StableUnCLIPImg2ImgPipeline:
    torch.manual_seed(0)
    return sd2(
        StableUnCLIPImg2ImgPipeline,
        4,
        {"class_embed_type": "projection", "projection_class_embeddings_input_dim": 16},
        feature_extractor=clip_processor(),
        image_encoder=lively(CLIPVisionModelWithProjection(CLIPVisionConfig(**VISION, projection_dim=8))),
        image_normalizer=StableUnCLIPImageNormalizer(8),
        image_noising_scheduler=DDPMScheduler(),
    )


def images(count: int, edge: int = SIZE) -> dict[str, Any]:
    return {"prompt": prompts(count), "image": [sd15.image(row).resize((edge, edge)) for row in range(count)]}


def of_size(edge: int) -> Callable[[int], dict[str, Any]]:
    return lambda count: images(count, edge)


def pairs(count: int) -> dict[str, Any]:
    """Two pictures a prompt."""
    return {"prompt": prompts(count), "image": [[sd15.image(row), sd15.image(row + 1)] for row in range(count)]}


def embedded(count: int, **inputs: Any) -> dict[str, Any]:
    """Embeddings of pictures from a prior in place of prompts."""
    return {**kandinsky2.pictures(count), **inputs}


def depths(count: int) -> dict[str, Any]:
    return {**images(count), "depth_map": torch.rand(count, SIZE, SIZE, generator=torch.Generator().manual_seed(0))}


STEPS: dict[str, Any] = {"num_inference_steps": 4, "output_type": "latent"}
SQUARE: dict[str, Any] = {**STEPS, "height": SIZE, "width": SIZE}
TRUE: dict[str, Any] = {"guided": {"true_cfg_scale": 4.0, "negative_prompt": " "}, "off": {"true_cfg_scale": 1.0}}
TWO = ("guidance_scale", "guidance_scale_2")

SIBLINGS = {
    family.name: family
    for family in (
        TinyFamily("wan_i2v", wan_i2v, of_size(32), wan.CALL),
        TinyFamily("wan22_i2v", wan22_i2v, of_size(32), wan.CALL, dict.fromkeys(TWO, 4.0), dict.fromkeys(TWO, 1.0)),
        TinyFamily("wan_ti2v", wan_ti2v, of_size(32), wan.CALL),
        TinyFamily("chronoedit", chronoedit, of_size(32), wan.CALL),
        TinyFamily("cogvideox_i2v", cogvideox_i2v, of_size(32), {**cogvideox.CALL, "max_sequence_length": 16}),
        TinyFamily(
            "ltx_i2v",
            lambda: beside(LTXImageToVideoPipeline, ltx.pipeline()),
            of_size(64),
            {**ltx.CALL, "max_sequence_length": 16},
        ),
        TinyFamily("ltx_condition", ltx_condition, of_size(64), {**ltx.CALL, "max_sequence_length": 16}),
        TinyFamily("hunyuanvideo15_i2v", hunyuanvideo15_i2v, images, {**STEPS, "num_frames": 5}),
        TinyFamily("joyimage_edit", joyimage.edit, of_size(32), joyimage.CALL),
        TinyFamily(
            "joyimage_edit_plus",
            joyimage.edit_plus,
            lambda count: {"prompt": prompts(count), "images": pairs(count)["image"]},
            joyimage.CALL,
        ),
        TinyFamily(
            "kandinsky21",
            kandinsky2.decoder21,
            lambda count: embedded(count, prompt=prompts(count)),
            {**SQUARE, "output_type": "pt"},
        ),
        TinyFamily(
            "kandinsky21_inpaint",
            kandinsky2.inpainting21,
            lambda count: embedded(count, **images(count), mask_image=[sd15.mask()] * count),
            {**SQUARE, "output_type": "pt"},
        ),
        TinyFamily(
            "kandinsky22_img2img",
            lambda: kandinsky2.decoder(KandinskyV22Img2ImgPipeline),
            lambda count: embedded(count, image=images(count)["image"]),
            {**SQUARE, "strength": 0.8},
        ),
        TinyFamily(
            "kandinsky22_inpaint",
            lambda: kandinsky2.decoder(KandinskyV22InpaintPipeline, in_channels=4 + 4 + 1),
            lambda count: embedded(count, image=images(count)["image"], mask_image=[sd15.mask()] * count),
            SQUARE,
        ),
        TinyFamily(
            "kandinsky22_controlnet",
            kandinsky2.controlnet,
            lambda count: embedded(count, hint=[*torch.rand(count, 1, 3, 64, 64, generator=torch.Generator().manual_seed(0))]),
            {**SQUARE, "output_type": "pt"},
        ),
        TinyFamily("kandinsky5_i2v", kandinsky5_i2v, of_size(32), {**kandinsky5.CALL, "num_frames": 21}),
        TinyFamily("qwenimage_edit", lambda: qwenimage_with(QwenImageEditPipeline), images, SQUARE, **TRUE),
        TinyFamily("qwenimage_edit_plus", lambda: qwenimage_with(QwenImageEditPlusPipeline), pairs, SQUARE, **TRUE),
        TinyFamily(
            "qwenimage_img2img", lambda: qwenimage_with(QwenImageImg2ImgPipeline), images, {**SQUARE, "strength": 0.8}, **TRUE
        ),
        TinyFamily(
            "zimage_img2img",
            lambda: beside(ZImageImg2ImgPipeline, zimage.pipeline()),
            images,
            {**SQUARE, "strength": 0.8, "max_sequence_length": 32},
            guided=zimage.FAMILY.guided,
            off=zimage.FAMILY.off,
            omega_offset=zimage.FAMILY.omega_offset,
        ),
        TinyFamily(
            "sd3_img2img",
            lambda: beside(StableDiffusion3Img2ImgPipeline, sd3.pipeline()),
            images,
            {**SQUARE, "strength": 0.8, "max_sequence_length": 16},
        ),
        TinyFamily(
            "sdxl_img2img", lambda: beside(StableDiffusionXLImg2ImgPipeline, sdxl.pipeline()), images, {**STEPS, "strength": 0.8}
        ),
        TinyFamily(
            "depth2img",
            lambda: sd2(StableDiffusionDepth2ImgPipeline, 4 + 1, depth_estimator=None, feature_extractor=None),
            depths,
            {**STEPS, "strength": 0.8},
        ),
        TinyFamily("upscale", upscale, of_size(8), STEPS),
        TinyFamily("unclip", unclip, images, SQUARE),
    )
}
