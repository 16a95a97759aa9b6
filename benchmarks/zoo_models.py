"""The models of the zoo: torchvision's, one of every timm family, and Hugging Face architectures of tiny configurations.

Nothing is downloaded: weights are random, and configurations are written here. Where a model takes a smaller image or
fewer blocks, it is given those; what is built differently from the library's default stands in its options.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from conversion import import_torchvision
from torch import Tensor, nn

SEED = 0
Arguments = tuple[Any, ...] | dict[str, Any]


@dataclass(frozen=True)
class Entry:
    """One model.

    Attributes:
        name: library and model.
        build: makes it, the same weights each time.
        inputs: makes the arguments of a call, given whether it trains.
        light: why only those checks are made that need no values; empty if all are.
    """

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[bool], Arguments]
    light: str = ""

    @property
    def library(self) -> str:
        """Which library it is from."""
        return self.name.partition("/")[0]


def seed() -> None:
    """Seed whatever a model draws from."""
    torch.manual_seed(SEED)
    random.seed(SEED)
    try:
        import numpy
    except ImportError:
        return
    numpy.random.seed(SEED)


def image(size: int, batch: int = 2) -> Callable[[bool], Arguments]:
    return lambda training: (torch.randn(batch, 3, size, size),)


def clip_of(frames: int, size: int) -> Callable[[bool], Arguments]:
    return lambda training: (torch.randn(2, 3, frames, size, size),)


# torchvision

LARGE = "too large to run here: tried on the meta device"
TORCHVISION_LIGHT = {
    "convnext_base", "convnext_large", "efficientnet_b6", "efficientnet_b7", "efficientnet_v2_l", "efficientnet_v2_m",
    "regnet_x_16gf", "regnet_x_32gf", "regnet_y_128gf", "regnet_y_16gf", "regnet_y_32gf", "resnext101_32x8d",
    "resnext101_64x4d", "swin_b", "swin_v2_b", "swin3d_b", "swin3d_s", "vgg11", "vgg13", "vgg13_bn", "vgg16",
    "vgg16_bn", "vgg19", "vgg19_bn", "vit_b_32", "vit_h_14", "vit_l_16", "vit_l_32", "wide_resnet101_2",
}  # fmt: skip
_RPN = {
    "rpn_pre_nms_top_n_train": 50, "rpn_pre_nms_top_n_test": 50, "rpn_post_nms_top_n_train": 20,
    "rpn_post_nms_top_n_test": 20, "box_batch_size_per_image": 16,
}  # fmt: skip


def _torchvision_entry(name: str) -> Entry:
    from torchvision.models import get_model

    options: dict[str, Any] = {"weights": None}
    inputs = image(64)
    if "rcnn" in name or any(word in name for word in ("retinanet", "fcos", "ssd")):
        options["weights_backbone"] = None
        inputs = _detection_inputs
        if not name.startswith("ssd"):
            options |= {"min_size": 128, "max_size": 128}
        if "rcnn" in name:
            options |= _RPN
    elif name.startswith(("deeplab", "fcn", "lraspp")):
        options |= {"weights_backbone": None} | ({} if name.startswith("lraspp") else {"aux_loss": True})
    elif name in ("googlenet", "inception_v3"):
        options |= {"init_weights": False}
        inputs = image(299 if name == "inception_v3" else 64)
    elif name.startswith("vit_"):
        size = 56 if name == "vit_h_14" else 64
        options, inputs = options | {"image_size": size}, image(size)
    elif name == "maxvit_t":
        inputs = image(224)
    elif name.startswith("mvit") or name == "s3d":
        inputs = clip_of(16, 224)
    elif name.startswith("swin3d") or name in ("r3d_18", "mc3_18", "r2plus1d_18"):
        inputs = clip_of(8, 64)
    elif name.startswith("raft"):
        inputs = lambda training: (torch.rand(1, 3, 128, 128), torch.rand(1, 3, 128, 128), 2)  # noqa: E731
    return Entry(f"torchvision/{name}", lambda: get_model(name, **options), inputs, LARGE if name in TORCHVISION_LIGHT else "")  # fmt: skip


def _detection_inputs(training: bool) -> Arguments:
    images = [torch.rand(3, 128, 128) for _ in range(2)]
    if not training:
        return (images,)
    masks = torch.zeros(1, 128, 128, dtype=torch.uint8)
    masks[:, 20:90, 10:100] = 1
    points = torch.rand(1, 17, 3) * 60 + 20
    points[..., 2] = 1
    target = {"boxes": torch.tensor([[10.0, 20.0, 100.0, 90.0]]), "labels": torch.tensor([1]), "masks": masks, "keypoints": points}  # fmt: skip
    return images, [target, target]


def define_nms() -> None:
    """Give torchvision a suppression of overlapping boxes in plain code, where its own operators do not load."""
    import torchvision

    if torchvision.extension._has_ops():
        return
    library = torch.library.Library("torchvision", "IMPL")
    library.impl("nms", _nms, "CPU")
    torch._nmgraph_zoo_library = library  # a library that is collected takes its operators with it
    torchvision.ops.boxes._assert_has_ops = lambda: None


def _nms(boxes: Tensor, scores: Tensor, threshold: float) -> Tensor:
    from torchvision.ops import box_iou

    left = scores.argsort(descending=True, stable=True)
    kept = []
    while len(left):
        kept.append(left[0])
        overlap = box_iou(boxes[left[:1]], boxes[left[1:]])[0]
        left = left[1:][overlap <= threshold]
    return torch.stack(kept) if kept else left


def torchvision_models() -> list[Entry]:
    """List all of torchvision's models but the quantized, whose weights are integers."""
    import_torchvision()
    from torchvision.models import list_models

    define_nms()
    return [_torchvision_entry(name) for name in list_models() if not name.startswith("quantized_")]


# timm: the smallest model of each of its modules, ``timm.list_modules()``. Each name with its image size, which is the
# model's own where that is fixed, and options that make a large one smaller.

TIMM: dict[str, tuple[str, int, dict[str, Any]]] = {
    "beit": ("beit_base_patch16_224", 224, {"depth": 4}),
    "byoanet": ("halonet_h1", 256, {}),
    "byobnet": ("test_byobnet", 96, {}),
    "cait": ("cait_xxs24_224", 224, {}),
    "coat": ("coat_tiny", 224, {}),
    "convit": ("convit_tiny", 224, {}),
    "convmixer": ("convmixer_768_32", 64, {}),
    "convnext": ("test_convnext", 96, {}),
    "cpubone": ("cpubone_nano", 128, {}),
    "crossvit": ("crossvit_tiny_240", 240, {}),
    "csatv2": ("csatv2", 512, {}),
    "cspnet": ("cs3darknet_focus_s", 128, {}),
    "cspnext": ("cspnext_tiny", 128, {}),
    "davit": ("davit_tiny", 224, {}),
    "deepseek_vit": ("deepseek_vit_412m", 126, {"depth": 2}),
    "deit": ("deit_tiny_patch16_224", 224, {}),
    "densenet": ("densenet121", 96, {}),
    "dla": ("dla46x_c", 96, {}),
    "dpn": ("dpn48b", 96, {}),
    "edgenext": ("edgenext_xx_small", 128, {}),
    "efficientformer": ("efficientformer_l1", 224, {}),
    "efficientformer_v2": ("efficientformerv2_s0", 224, {}),
    "efficientnet": ("test_efficientnet", 96, {}),
    "efficientvim": ("efficientvim_m1", 224, {}),
    "efficientvit_mit": ("efficientvit_b0", 128, {}),
    "efficientvit_msra": ("efficientvit_m0", 224, {}),
    "eva": ("vit_tiny_patch16_dinov3_qkvb", 256, {}),
    "fasternet": ("fasternet_t0", 128, {}),
    "fastvit": ("fastvit_t8", 128, {}),
    "focalnet": ("focalnet_tiny_srf", 128, {}),
    "gcvit": ("gcvit_xxtiny", 224, {}),
    "gemma4_vit": ("gemma4_vit_167m", 192, {"depth": 2}),
    "ghostnet": ("ghostnet_050", 128, {}),
    "hardcorenas": ("hardcorenas_b", 128, {}),
    "hgnet": ("hgnetv2_b0", 128, {}),
    "hiera": ("hiera_tiny_224", 224, {}),
    "hieradet_sam2": ("sam2_hiera_tiny", 224, {}),
    "hrnet": ("hrnet_w18_small", 128, {}),
    "iformer": ("iformer_t", 224, {}),
    "inception_next": ("inception_next_atto", 128, {}),
    "inception_resnet_v2": ("inception_resnet_v2", 160, {}),
    "inception_v3": ("inception_v3", 160, {}),
    "inception_v4": ("inception_v4", 160, {}),
    "lcnetv2": ("lcnetv2_small", 128, {}),
    "levit": ("levit_128s", 224, {}),
    "lowformer": ("lowformer_b0", 128, {}),
    "mambaout": ("test_mambaout", 96, {}),
    "maxxvit": ("test_coatnet", 160, {}),
    "metaformer": ("poolformerv2_s12", 128, {}),
    "mlp_mixer": ("gmlp_ti16_224", 224, {}),
    "mobilenetv3": ("mobilenetv3_small_050", 128, {}),
    "mobilenetv5": ("mobilenetv5_base", 256, {}),
    "mobilevit": ("mobilevit_xxs", 128, {}),
    "mvitv2": ("mvitv2_tiny", 224, {}),
    "naflexvit": ("naflexvit_base_patch16_parfac_gap", 128, {"depth": 2}),
    "nasnet": ("nasnetalarge", 96, {}),
    "nest": ("nest_tiny", 224, {}),
    "nextvit": ("nextvit_small", 128, {}),
    "nfnet": ("test_nfnet", 96, {}),
    "pit": ("pit_ti_224", 224, {}),
    "pnasnet": ("pnasnet5large", 96, {}),
    "pvt_v2": ("pvt_v2_b0", 128, {}),
    "qwen3_vit": ("qwen3_vit_88m", 192, {"depth": 2}),
    "rdnet": ("rdnet_tiny", 128, {}),
    "regnet": ("regnetx_002", 96, {}),
    "repghost": ("repghostnet_050", 128, {}),
    "repvit": ("repvit_m1", 128, {}),
    "res2net": ("res2next50", 96, {}),
    "resnest": ("resnest14d", 96, {}),
    "resnet": ("test_resnet", 96, {}),
    "resnetv2": ("resnetv2_18", 96, {}),
    "rexnet": ("rexnet_100", 96, {}),
    "selecsls": ("selecsls42", 96, {}),
    "senet": ("legacy_seresnet18", 96, {}),
    "sequencer": ("sequencer2d_s", 224, {}),
    "shvit": ("shvit_s1", 224, {}),
    "sknet": ("skresnet18", 96, {}),
    "starnet": ("starnet_s050", 128, {}),
    "swiftformer": ("swiftformer_xs", 224, {}),
    "swin_transformer": ("swin_tiny_patch4_window7_224", 224, {}),
    "swin_transformer_v2": ("swinv2_tiny_window8_256", 256, {}),
    "swin_transformer_v2_cr": ("swinv2_cr_tiny_224", 224, {}),
    "tiny_vit": ("tiny_vit_5m_224", 224, {}),
    "tnt": ("tnt_s_legacy_patch16_224", 224, {}),
    "tresnet": ("tresnet_m", 96, {}),
    "twins": ("twins_svt_small", 224, {}),
    "vgg": ("vgg11", 64, {}),
    "visformer": ("visformer_tiny", 224, {}),
    "vision_transformer": ("test_vit", 160, {}),
    "vision_transformer_hybrid": ("vit_tiny_r_s16_p8_224", 224, {}),
    "vision_transformer_relpos": ("test_vit_relpos", 160, {}),
    "vision_transformer_sam": ("samvit_base_patch16_224", 224, {"depth": 4}),
    "vitamin": ("vitamin_small_224", 224, {}),
    "volo": ("volo_d1_224", 224, {}),
    "vovnet": ("ese_vovnet19b_slim_dw", 96, {}),
    "xception": ("legacy_xception", 96, {}),
    "xception_aligned": ("xception41p", 96, {}),
    "xcit": ("xcit_nano_12_p8_224", 224, {}),
}


def timm_models() -> list[Entry]:
    """List the smallest model of each timm family."""
    import_torchvision()
    import timm

    def entry(family: str, name: str, size: int, options: dict[str, Any]) -> Entry:
        return Entry(f"timm/{family}/{name}", lambda: timm.create_model(name, pretrained=False, **options), image(size))

    return [entry(family, *made) for family, made in TIMM.items()]


# Hugging Face

_TEXT = {"vocab_size": 128, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}  # fmt: skip
_DECODER = {**_TEXT, "num_key_value_heads": 2, "max_position_embeddings": 64, "use_cache": False, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
_VISION = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128, "image_size": 32, "patch_size": 8}  # fmt: skip
_HEADED = {"encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 128, "decoder_ffn_dim": 128, "d_model": 64}  # fmt: skip


def _ids(training: bool = False) -> Tensor:
    return torch.randint(3, 128, (2, 16))


def _text(training: bool) -> Arguments:
    return {"input_ids": _ids()}


def _seq2seq(training: bool) -> Arguments:
    return {"input_ids": _ids(), "decoder_input_ids": _ids()}


def _pixels(size: int) -> Callable[[bool], Arguments]:
    return lambda training: {"pixel_values": torch.randn(2, 3, size, size)}


def _image_text(training: bool) -> Arguments:
    return {"input_ids": _ids(), "pixel_values": torch.randn(2, 3, 32, 32)}


def _layout(training: bool) -> Arguments:
    corner = torch.randint(0, 50, (2, 16, 2))
    return {"input_ids": _ids(), "bbox": torch.cat([corner, corner + 20], -1)}


def _detr(transformers: Any) -> nn.Module:
    backbone = transformers.ResNetConfig(
        embedding_size=32, hidden_sizes=[32, 64], depths=[1, 1], layer_type="basic", out_features=["stage2"]
    )
    config = transformers.DetrConfig(
        use_timm_backbone=False, use_pretrained_backbone=False, backbone=None, backbone_config=backbone, num_queries=8,
        num_labels=4, **_HEADED,
    )  # fmt: skip
    return transformers.DetrForObjectDetection(config)


def _clip(transformers: Any, kind: str) -> nn.Module:
    text = {**_TEXT, "max_position_embeddings": 32, "projection_dim": 32}
    if kind == "Blip":
        text |= {"encoder_hidden_size": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "sep_token_id": 2}
    config = getattr(transformers, f"{kind}Config")(text_config=text, vision_config=_VISION, projection_dim=32)
    return getattr(transformers, f"{kind}Model" if kind == "CLIP" else f"{kind}ForConditionalGeneration")(config)


Made = tuple[str, str, dict[str, Any], Callable[[bool], Arguments]]
# name: class of the model, class of its configuration, configuration, arguments
HUGGING_FACE: dict[str, Made] = {
    "bert": ("BertForSequenceClassification", "BertConfig", _TEXT, _text),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", {"vocab_size": 128, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64, "use_cache": False}, _text),
    "llama": ("LlamaForCausalLM", "LlamaConfig", _DECODER, _text),
    "mistral": ("MistralForCausalLM", "MistralConfig", _DECODER, _text),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", _DECODER, _text),
    "mixtral": ("MixtralForCausalLM", "MixtralConfig", {**_DECODER, "num_local_experts": 4}, _text),
    "t5": ("T5ForConditionalGeneration", "T5Config", {"vocab_size": 128, "d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4, "use_cache": False}, _seq2seq),
    "opt": ("OPTForCausalLM", "OPTConfig", {"vocab_size": 128, "hidden_size": 64, "num_hidden_layers": 2, "ffn_dim": 128, "num_attention_heads": 4, "max_position_embeddings": 64, "word_embed_proj_dim": 32, "use_cache": False}, _text),
    "vit": ("ViTForImageClassification", "ViTConfig", _VISION, _pixels(32)),
    "deit": ("DeiTForImageClassification", "DeiTConfig", _VISION, _pixels(32)),
    "swin": ("SwinForImageClassification", "SwinConfig", {"image_size": 64, "patch_size": 4, "embed_dim": 32, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4}, _pixels(64)),
    "convnext": ("ConvNextForImageClassification", "ConvNextConfig", {"hidden_sizes": [32, 64, 96, 128], "depths": [1, 1, 2, 1]}, _pixels(64)),
    "clip": ("CLIP", "", {}, _image_text),
    "whisper": ("WhisperForConditionalGeneration", "WhisperConfig", {**_HEADED, "vocab_size": 128, "max_source_positions": 50, "max_target_positions": 64, "num_mel_bins": 80, "use_cache": False, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1, "suppress_tokens": None, "begin_suppress_tokens": None}, lambda training: {"input_features": torch.randn(2, 80, 100), "decoder_input_ids": _ids()}),
    "wav2vec2": ("Wav2Vec2ForCTC", "Wav2Vec2Config", {**_TEXT, "conv_dim": (32,) * 7, "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4, "mask_time_length": 2}, lambda training: {"input_values": torch.randn(2, 6000)}),
    "segformer": ("SegformerForSemanticSegmentation", "SegformerConfig", {"hidden_sizes": [32, 32, 64, 64], "depths": [1, 1, 1, 1], "num_attention_heads": [1, 2, 2, 4], "decoder_hidden_size": 64}, _pixels(64)),
    "detr": ("DETR", "", {}, _pixels(64)),
    "deberta-v2": ("DebertaV2ForSequenceClassification", "DebertaV2Config", {**_TEXT, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 16, "max_position_embeddings": 64, "norm_rel_ebd": "layer_norm", "share_att_key": True}, _text),
    "albert": ("AlbertForSequenceClassification", "AlbertConfig", {**_TEXT, "embedding_size": 32}, _text),
    "electra": ("ElectraForPreTraining", "ElectraConfig", {**_TEXT, "embedding_size": 32}, _text),
    "distilbert": ("DistilBertForSequenceClassification", "DistilBertConfig", {"vocab_size": 128, "dim": 64, "n_layers": 2, "n_heads": 4, "hidden_dim": 128}, _text),
    "roberta": ("RobertaForMaskedLM", "RobertaConfig", {**_TEXT, "max_position_embeddings": 64, "pad_token_id": 1}, _text),
    "mobilebert": ("MobileBertForSequenceClassification", "MobileBertConfig", {**_TEXT, "embedding_size": 32, "intra_bottleneck_size": 32, "true_hidden_size": 32}, _text),
    "phi3": ("Phi3ForCausalLM", "Phi3Config", _DECODER, _text),
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", {**_DECODER, "head_dim": 16}, _text),
    "bart": ("BartForConditionalGeneration", "BartConfig", {**_HEADED, "vocab_size": 128, "max_position_embeddings": 64, "use_cache": False}, _seq2seq),
    "blip": ("Blip", "", {}, _image_text),
    "dpt": ("DPTForSemanticSegmentation", "DPTConfig", {**_VISION, "num_hidden_layers": 4, "backbone_out_indices": [0, 1, 2, 3], "neck_hidden_sizes": [16, 32, 64, 64], "fusion_hidden_size": 32, "reassemble_factors": [4, 2, 1, 0.5]}, _pixels(32)),
    "mamba": ("MambaForCausalLM", "MambaConfig", {"vocab_size": 128, "hidden_size": 64, "num_hidden_layers": 2, "state_size": 16, "use_cache": False}, _text),
    "layoutlm": ("LayoutLMForTokenClassification", "LayoutLMConfig", _TEXT, _layout),
}  # fmt: skip


def hugging_face_models() -> list[Entry]:
    """List the Hugging Face architectures."""
    import_torchvision()
    import transformers

    def build(model: str, config: str, options: dict[str, Any]) -> nn.Module:
        if model == "DETR":
            return _detr(transformers)
        if not config:
            return _clip(transformers, model)
        return getattr(transformers, model)(getattr(transformers, config)(**options))

    def entry(name: str, made: Made) -> Entry:
        return Entry(f"transformers/{name}", lambda: build(*made[:3]), made[3])

    return [entry(name, made) for name, made in HUGGING_FACE.items()]


LIBRARIES: dict[str, Callable[[], list[Entry]]] = {
    "torchvision": torchvision_models,
    "timm": timm_models,
    "transformers": hugging_face_models,
}
