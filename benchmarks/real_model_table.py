"""The networks of real_models.py: other people's definitions, unchanged, weights at random.

Each maker imports its package when it is called, so that a package that is missing costs its own
rows alone. What a row is there for stands beside it where the name does not say it.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import importlib.machinery
import importlib.util
import sys
import types
from collections.abc import Callable
from importlib import metadata
from typing import Any

import torch
from torch import Tensor, nn

ABSENT = ("torchvision", "accelerate", "librosa", "pandas", "resampy", "torchaudio")
"""What some packages import for data and weights, and no network here computes with."""

Inputs = Callable[[int], tuple[Tensor, ...]]
"""The arguments for a batch of this size."""


@dataclasses.dataclass(frozen=True)
class Network:
    """A network, its arguments, and whether its package imports what is in ABSENT."""

    make: Callable[[], nn.Module]
    inputs: Inputs
    stub: bool = False


def images(*size: int) -> Inputs:
    """Noise of (batch, 3, height, width), or of (batch, *size)."""
    shape = (3, *size) if len(size) == 2 else size
    return lambda batch: (torch.randn(batch, *shape),)


def steps(*shape: int) -> Inputs:
    """Noise and a time step for each, as diffusion models ask for."""
    return lambda batch: (torch.randn(batch, *shape), torch.arange(10, 10 + batch))


class _Absent(type):
    """A class whose attributes are such classes too: enough to import against, not to compute."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return _Absent(name, (), {})


class _AbsentModules:
    """Finds what is in ABSENT, and everything in it."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name.partition(".")[0] not in ABSENT:
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: Any) -> types.ModuleType:
        module = types.ModuleType(spec.name)
        absent = _Absent(spec.name, (), {"__version__": "0.28"})
        module.__getattr__ = lambda name: getattr(absent, name)  # type: ignore[method-assign]
        return module

    def exec_module(self, module: types.ModuleType) -> None:
        pass


def without_absent() -> None:
    """Lets packages import what is in ABSENT, where it is not installed; nothing of it computes."""
    missing = {name for name in ABSENT if importlib.util.find_spec(name) is None}
    if not missing:
        return
    sys.meta_path.append(_AbsentModules())
    version = metadata.version
    metadata.version = lambda name: "0.28" if name in missing else version(name)


def _at(path: str) -> Any:
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)


# pytorchcv beyond those of third_party.py: module.function, size of the pictures.
PYTORCHCV = {
    "airnet.airnet50_1x64d_r2": 224, "bisenet.bisenet_resnet18_celebamaskhq": 128,
    "cbamresnet.cbam_resnet18": 224, "cgnet.cgnet_cityscapes": 128,
    "condensenet.condensenet74_c4_g4": 224,
    "danet.danet_resnetd50b_cityscapes": 96, "dicenet.dicenet_w1": 224,
    "diracnetv2.diracnet18v2": 224,
    "dla.dla34": 224, "dpn.dpn68": 224, "fastscnn.fastscnn_cityscapes": 128,
    "fishnet.fishnet99": 224,
    "hardnet.hardnet39ds": 224, "hrnet.hrnet_w18_small_v1": 224, "irevnet.irevnet301": 224,
    "lwopenpose_cmupan.lwopenpose2d_mobilenet_cmupan_coco": 128, "msdnet.msdnet22": 224,
    "octresnet.octresnet10_ad2": 224, "pspnet.pspnet_resnetd50b_voc": 96,
    "resattnet.resattnet56": 224, "resnesta.resnesta18": 224, "scnet.scnet50": 224,
    "sinet.sinet_cityscapes": 128,
    "sknet.sknet50": 224, "sparsenet.sparsenet121": 224, "unet.unet_cityscapes": 64,
    "wrn1bit_cifar.wrn20_10_1bit_cifar10": 32, "xdensenet.xdensenet121_2": 224,
}  # fmt: skip

TIMM = {
    "resnetv2_50x1_bit": 64,  # weight standardisation
    "nf_regnet_b0": 64, "eca_nfnet_l0": 64,  # scaled weight standardisation
    "convnext_atto": 64, "convnextv2_atto": 64, "inception_next_atto": 64, "mixnet_s": 64,
    "ghostnetv2_100": 64, "lcnet_050": 64, "mobileone_s0": 64, "repvgg_a0": 64, "fastvit_t8": 256,
    "starnet_s1": 64, "rexnet_100": 64, "dla34": 64, "hrnet_w18_small": 64, "res2net50_14w_8s": 64,
    "skresnet18": 64, "selecsls42": 64, "dpn68": 64, "gcresnext26ts": 64, "lambda_resnet26t": 256,
    "halonet26t": 256, "botnet26t_256": 256, "shvit_s1": 224, "mambaout_femto": 64,
    "focalnet_tiny_srf": 64, "edgenext_xx_small": 64, "mobilevit_xxs": 64, "mobilevitv2_050": 64,
    "poolformerv2_s12": 64, "efficientvit_b0": 64, "efficientformer_l1": 224, "levit_128s": 224,
    "swin_tiny_patch4_window7_224": 224, "swinv2_cr_tiny_224": 224, "maxvit_rmlp_pico_rw_256": 256,
    "coatnet_pico_rw_224": 224, "gcvit_xxtiny": 224, "davit_tiny": 64, "hiera_tiny_224": 224,
    "vit_tiny_patch16_224": 224, "deit3_small_patch16_224": 224, "cait_xxs24_224": 224,
    "xcit_nano_12_p16_224": 224, "crossvit_tiny_240": 240, "pvt_v2_b0": 64, "twins_svt_small": 64,
    "volo_d1_224": 224, "visformer_tiny": 224, "convmixer_768_32": 64,
    "mixer_s32_224": 224, "sequencer2d_s": 224,  # LSTM
    "tf_efficientnetv2_b0": 64, "tresnet_m": 64, "xception41": 64, "repghostnet_100": 64,
    "efficientnet_lite0": 64, "mobilenetv4_conv_small": 64, "vovnet39a": 64, "csatv2": 512,
}  # fmt: skip

SMP = (
    "Unet", "UnetPlusPlus", "FPN", "DeepLabV3Plus", "PSPNet", "PAN", "MAnet", "Linknet",
    "Segformer", "UPerNet",
)  # fmt: skip

# transformers: class, the configuration's arguments that make it small, size of the pictures.
TRANSFORMERS: dict[str, tuple[dict[str, Any], int]] = {
    "ResNetForImageClassification": (dict(depths=[2, 2, 2, 2], layer_type="basic",
        embedding_size=16,
                                           hidden_sizes=[16, 32, 64, 96]), 64),
    "ConvNextForImageClassification": (dict(depths=[1, 1, 2, 1]), 64),
    "ConvNextV2Model": (dict(depths=[1, 1, 2, 1]), 64),
    "RegNetForImageClassification": ({}, 64),
    "MobileNetV1ForImageClassification": ({}, 64),
    "MobileNetV2ForSemanticSegmentation": ({}, 65),
    "MobileViTForSemanticSegmentation": ({}, 64),
    "MobileViTV2Model": ({}, 64),
    "ViTModel": (dict(num_hidden_layers=2), 224),
    "SwinModel": (dict(depths=[2, 2], num_heads=[3, 6], image_size=64), 64),
    "Swinv2Model": (dict(depths=[2, 2], num_heads=[3, 6], image_size=64), 64),
    "SegformerForSemanticSegmentation": ({}, 64),
    "PoolFormerForImageClassification": ({}, 64),
    "LevitForImageClassification": ({}, 224),
    "Dinov2Model": (dict(num_hidden_layers=2), 70),  # interpolated positions
    "BeitModel": (dict(num_hidden_layers=2, use_relative_position_bias=True), 224),
    "FocalNetForImageClassification": (dict(depths=[1, 1, 2, 1]), 64),
    "EfficientNetModel": ({}, 64),
    "BitForImageClassification": (dict(depths=[1, 1, 1, 1]), 64),
    "PvtForImageClassification": (dict(image_size=64), 64),
    "PvtV2Model": (dict(image_size=64), 64),
    "GLPNForDepthEstimation": ({}, 64),
    "Swin2SRForImageSuperResolution": (dict(depths=[2, 2], num_heads=[6, 6], embed_dim=60), 32),
    "YolosForObjectDetection": (dict(num_hidden_layers=2, image_size=[64, 64]), 64),
    "SuperPointForKeypointDetection": ({}, 64),  # control flow on values
    "DPTForDepthEstimation": (dict(num_hidden_layers=12, hidden_size=96, num_attention_heads=4,
                                   intermediate_size=192, image_size=64), 64),
    "UperNetForSemanticSegmentation": ({}, 64),
    "HieraModel": ({}, 224),
    "TextNetForImageClassification": ({}, 64),
    "CLIPVisionModel": (dict(num_hidden_layers=2), 224),
    "DetrModel": (dict(use_timm_backbone=False, use_pretrained_backbone=False, encoder_layers=1,
                       decoder_layers=1), 96),
    "RTDetrModel": (dict(encoder_layers=1, decoder_layers=1), 128),
}  # fmt: skip

ULTRALYTICS = (
    "yolov8n.yaml", "yolo11n.yaml", "yolo11n-seg.yaml", "yolov8n-pose.yaml", "yolo11n-obb.yaml",
    "yolov5n.yaml",
    "yolov10n.yaml", "yolo12n.yaml", "yolo11n-cls.yaml", "yolov3-tiny.yaml",
)  # fmt: skip

MONAI: dict[str, tuple[dict[str, Any], Inputs]] = {
    "UNet": (dict(spatial_dims=2, in_channels=3, out_channels=2, channels=(8, 16, 32), strides=(2,
        2),
                  num_res_units=2), images(64, 64)),
    "BasicUNet": (dict(spatial_dims=2, in_channels=3, out_channels=2), images(64, 64)),
    "BasicUNetPlusPlus": (dict(spatial_dims=2, in_channels=3, out_channels=2), images(64, 64)),
    "AttentionUnet": (dict(spatial_dims=2, in_channels=3, out_channels=2, channels=(8, 16, 32),
                           strides=(2, 2)), images(64, 64)),
    "DynUNet": (dict(spatial_dims=2, in_channels=3, out_channels=2, kernel_size=[3, 3, 3],
                     strides=[1, 2, 2], upsample_kernel_size=[2, 2]), images(64, 64)),
    "SegResNet": (dict(spatial_dims=2, in_channels=3), images(64, 64)),
    "SegResNetDS": (dict(spatial_dims=2, in_channels=3), images(64, 64)),
    "VNet": (dict(spatial_dims=2), images(1, 64, 64)),
    "HighResNet": (dict(spatial_dims=2, in_channels=3), images(32, 32)),
    "DenseNet121": (dict(spatial_dims=2, in_channels=3, out_channels=5), images(64, 64)),
    "EfficientNetBN": (dict(model_name="efficientnet-b0", pretrained=False), images(64, 64)),
    "SwinUNETR": (dict(in_channels=3, out_channels=2, spatial_dims=2, feature_size=12), images(64,
        64)),
    "UNETR": (dict(in_channels=3, out_channels=2, img_size=64, spatial_dims=2, hidden_size=96,
        num_heads=4,
                   mlp_dim=192), images(64, 64)),
    "AutoEncoder": (dict(spatial_dims=2, in_channels=3, out_channels=3, channels=(8, 16),
        strides=(2, 2)),
                    images(64, 64)),
    "AHNet": (dict(spatial_dims=2, in_channels=3, upsample_mode="bilinear"), images(128, 128)),
    "MedNeXtS": (dict(spatial_dims=2, in_channels=3), images(64, 64)),
    "VQVAE": (dict(spatial_dims=2, in_channels=3, out_channels=3, num_embeddings=32), images(32,
        32)),
    "DiffusionModelUNet": (dict(spatial_dims=2, in_channels=3, out_channels=3, channels=(32, 32),
        num_res_blocks=1,
                                attention_levels=(False, True), num_head_channels=32), steps(3, 32,
                                32)),
    "MultiScalePatchDiscriminator": (dict(num_d=2, num_layers_d=2, spatial_dims=2, channels=8,
                                          in_channels=3), images(64, 64)),
}  # fmt: skip

SPANDREL: dict[str, tuple[dict[str, Any], int]] = {
    "ESRGAN.__arch.RRDB:RRDBNet": (dict(num_blocks=2, num_filters=32), 32),
    "Compact.__arch.SRVGG:SRVGGNetCompact": (dict(num_conv=4), 32),
    "SPAN:SPAN": (dict(num_in_ch=3, num_out_ch=3), 32),
    "SwinIR:SwinIR": (dict(img_size=28, embed_dim=36, depths=(2, 2), num_heads=(6, 6)), 28),
    "SCUNet:SCUNet": (dict(config=[1, 1, 1, 1, 1, 1, 1]), 64),
    "NAFNet:NAFNet": (dict(width=16, enc_blk_nums=[1, 1], dec_blk_nums=[1, 1]), 64),
    "OmniSR:OmniSR": (dict(res_num=1, block_num=1), 32),
    "RCAN:RCAN": (dict(n_resgroups=1, n_resblocks=2), 32),
    "SAFMN:SAFMN": (dict(dim=16, n_blocks=2), 32),
    "DRUNet:DRUNet": (dict(in_nc=3, out_nc=3, nc=[16, 32, 48, 64], nb=1), 64),
    "FFTformer:FFTformer": (dict(dim=16, num_blocks=[1, 1, 1]), 64),
    "MoSR:MoSR": (dict(n_block=2), 32),
    "PLKSR:PLKSR": (dict(n_blocks=2), 32),
}  # fmt: skip

KORNIA: dict[str, tuple[dict[str, Any], Inputs]] = {
    "feature:HardNet": (dict(pretrained=False), images(1, 32, 32)),
    "feature:HardNet8": (dict(pretrained=False), images(1, 32, 32)),
    "feature:SOSNet": (dict(pretrained=False), images(1, 32, 32)),
    "feature:TFeat": (dict(pretrained=False), images(1, 32, 32)),
    "feature:HyNet": (dict(pretrained=False), images(1, 32, 32)),
    "feature:KeyNet": (dict(pretrained=False), images(1, 64, 64)),
    "models.dexined:DexiNed": (dict(pretrained=False), images(64, 64)), "filters:Canny": ({},
        images(64, 64)),
}  # fmt: skip

# Classes of other packages: arguments, inputs.
OTHERS: dict[str, tuple[dict[str, Any], Inputs]] = {
    "torchcrepe:Crepe": (dict(model="tiny"), images(1024)),  # batch norm after ReLU, audio
    "facenet_pytorch:InceptionResnetV1": (dict(classify=True, num_classes=10), images(160, 160)),
    "pytorch_msssim:SSIM": ({}, lambda n: (255 * torch.rand(n, 3, 64, 64), 255 * torch.rand(n, 3,
        64, 64))),
    "antialiased_cnns:resnet18": ({}, images(64, 64)),
    "geffnet:tf_mobilenetv3_small_100": (dict(pretrained=False), images(65, 65)),  # padding 'SAME'
    "resnest.torch:resnest50": ({}, images(64, 64)),
    "vit_pytorch.cct:cct_2": (dict(img_size=64), images(64, 64)),
    "vit_pytorch.simple_vit:SimpleViT": (dict(image_size=64, patch_size=16, num_classes=9, dim=64,
        depth=2,
                                              heads=4, mlp_dim=96), images(64, 64)),
    "vit_pytorch.cvt:CvT": (dict(num_classes=9, s3_depth=2), images(64, 64)),
    "vit_pytorch.levit:LeViT": (dict(image_size=64, num_classes=9, stages=2, dim=(32, 64), depth=1,
                                     heads=(2, 4), mlp_mult=2), images(64, 64)),
    "vit_pytorch.mobile_vit:MobileViT": (dict(image_size=(64, 64), dims=[32, 48, 64], num_classes=9,
                                              channels=[16, 16, 24, 24, 32, 32, 48, 48, 64, 64,
                                                  96]),
                                         images(64, 64)),
    "vit_pytorch.crossformer:CrossFormer": (dict(num_classes=9, dim=(32, 64, 96, 128), depth=(1, 1,
        1, 1)),
                                            images(224, 224)),
    "vit_pytorch.max_vit:MaxViT": (dict(num_classes=9, dim=32, depth=(1, 1), window_size=4,
                                        dim_conv_stem=16), images(64, 64)),
    "vit_pytorch.regionvit:RegionViT": (dict(dim=(16, 32, 48, 64), depth=(1, 1, 1, 1),
        num_classes=9),
                                        images(224, 224)),
    "vit_pytorch.sep_vit:SepViT": (dict(num_classes=9, dim=16, heads=(1, 2), depth=(1, 1)),
                                   images(56, 56)),
    "vit_pytorch.xcit:XCiT": (dict(image_size=64, patch_size=8, num_classes=9, dim=32, depth=1,
        cls_depth=1,
                                   heads=2, mlp_dim=48), images(64, 64)),
    "vit_pytorch.nest:NesT": (dict(image_size=64, patch_size=4, dim=24, heads=2, num_hierarchies=2,
                                   block_repeats=(1, 1), num_classes=9), images(64, 64)),
    "denoising_diffusion_pytorch:Unet": (dict(dim=16, dim_mults=(1, 2)), steps(3, 32, 32)),
    "compressai.models:FactorizedPrior": (dict(N=16, M=24), images(64, 64)),  # dict, entropy model
    "compressai.models:JointAutoregressiveHierarchicalPriors": (dict(N=16, M=24), images(64, 64)),
    "segment_anything.modeling:ImageEncoderViT": (
        dict(img_size=128, patch_size=16, embed_dim=64, depth=2, num_heads=4, out_chans=32,
            use_rel_pos=True,
             window_size=3, global_attn_indexes=(1,)), images(128, 128)),
    "pretrainedmodels.models.nasnet_mobile:NASNetAMobile": ({}, images(224, 224)),
    "pretrainedmodels.models.xception:xception": (dict(pretrained=None), images(71, 71)),
    "pretrainedmodels.models.dpn:DPN": (dict(small=True, num_init_features=10, k_r=128, groups=32,
                                             k_sec=(3, 4, 12, 3), inc_sec=(16, 32, 32, 64),
                                             test_time_pool=True),
                                        images(224, 224)),
    "dynamic_network_architectures.architectures.unet:PlainConvUNet": (
        dict(input_channels=3, n_stages=3, features_per_stage=(8, 16, 24), conv_op=nn.Conv2d,
            kernel_sizes=3,
             strides=(1, 2, 2), n_conv_per_stage=2, num_classes=2, n_conv_per_stage_decoder=2,
             conv_bias=True,
             norm_op=nn.InstanceNorm2d, norm_op_kwargs=dict(affine=True), nonlin=nn.LeakyReLU,
             nonlin_kwargs=dict(inplace=True), deep_supervision=True), images(64, 64)),
}  # fmt: skip


def _diffusers() -> dict[str, Network]:
    blocks = dict(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(32, 64, 64),
        layers_per_block=1,
        norm_num_groups=16,
    )
    unet = dict(block_out_channels=(32, 64), layers_per_block=1, norm_num_groups=16)
    plain = dict(
        **unet,
        sample_size=32,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )

    def of(name: str, **kwargs: Any) -> Callable[[], nn.Module]:
        return lambda: _at(f"diffusers:{name}")(**kwargs)

    return {
        "AutoencoderKL": Network(of("AutoencoderKL", **blocks), images(64, 64)),
        "AutoencoderKL, decoder": Network(
            lambda: of("AutoencoderKL", **blocks)().decoder, images(4, 16, 16)
        ),
        "AutoencoderKL, decoder of Stable Diffusion": Network(
            lambda: (
                of(
                    "AutoencoderKL",
                    down_block_types=("DownEncoderBlock2D",) * 4,
                    up_block_types=("UpDecoderBlock2D",) * 4,
                    block_out_channels=(128, 256, 512, 512),
                    layers_per_block=2,
                )().decoder
            ),
            images(4, 16, 16),
        ),
        "AutoencoderTiny": Network(of("AutoencoderTiny"), images(64, 64)),
        "VQModel": Network(of("VQModel", norm_num_groups=16), images(64, 64)),
        "UNet2DModel": Network(of("UNet2DModel", **plain), steps(3, 32, 32)),
        "UNet2DConditionModel": Network(
            of(
                "UNet2DConditionModel",
                **unet,
                down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
                up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
                cross_attention_dim=32,
                attention_head_dim=8,
            ),
            lambda n: (torch.randn(n, 4, 32, 32), torch.arange(n) + 10, torch.randn(n, 7, 32)),
        ),
    }


def _simple(path: str, kwargs: dict[str, Any]) -> Callable[[], nn.Module]:
    return lambda: _at(path)(**kwargs)


def _transformer(name: str, kwargs: dict[str, Any]) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        kind = _at(f"transformers:{name}")
        return kind(kind.config_class(**kwargs))

    return make


def _timm(name: str, **kwargs: Any) -> Callable[[], nn.Module]:
    return lambda: _at("timm:create_model")(name, pretrained=False, **kwargs)


def _smp(name: str) -> Callable[[], nn.Module]:
    return lambda: _at(f"segmentation_models_pytorch:{name}")("tu-resnet18", encoder_weights=None)


def networks() -> dict[str, Network]:
    """By "package: name"."""
    found: dict[str, Network] = {}
    for path, side in PYTORCHCV.items():
        module, _, function = path.partition(".")
        make = _simple(f"pytorchcv.models.{module}:{function}", dict(in_size=(side, side)))
        found[f"pytorchcv: {function}"] = Network(make, images(side, side))
    for name, side in TIMM.items():
        found[f"timm: {name}"] = Network(_timm(name), images(side, side), stub=True)
    found["timm: resnet18, features"] = Network(
        _timm("resnet18", features_only=True), images(64, 64), stub=True
    )
    found["timm: vit_tiny, any size"] = Network(
        _timm("vit_tiny_patch16_224", dynamic_img_size=True), images(96, 96), stub=True
    )
    for name in SMP:
        found[f"smp: {name}"] = Network(_smp(name), images(128, 128), stub=True)
    for name, (kwargs, side) in TRANSFORMERS.items():
        found[f"transformers: {name}"] = Network(_transformer(name, kwargs), images(side, side))
    for name, network in _diffusers().items():
        found[f"diffusers: {name}"] = network
    for name in ULTRALYTICS:
        found[f"ultralytics: {name.removesuffix('.yaml')}"] = Network(
            functools.partial(_yolo, name), images(96, 96), stub=True
        )
    for name, (kwargs, given) in MONAI.items():
        found[f"monai: {name}"] = Network(_simple(f"monai.networks.nets:{name}", kwargs), given)
    for path, (kwargs, side) in SPANDREL.items():
        package, _, name = path.partition(":")
        make = _simple(f"spandrel.architectures.{package}:{name}", kwargs)
        found[f"spandrel: {name}"] = Network(make, images(side, side), stub=True)
    for path, (kwargs, given) in KORNIA.items():
        found[f"kornia: {path}"] = Network(_simple(f"kornia.{path}", kwargs), given)
    for path, (kwargs, given) in OTHERS.items():
        package, name = path.split(".")[0].split(":")[0], path.rpartition(":")[2]
        found[f"{package}: {name}"] = Network(_simple(path, kwargs), given, stub=True)
    found["efficientnet_pytorch: efficientnet-b0"] = Network(
        lambda: _at("efficientnet_pytorch:EfficientNet").from_name("efficientnet-b0"),
        images(96, 96),
    )
    return found


def _yolo(name: str) -> nn.Module:
    kinds = {
        "-seg": "SegmentationModel", "-pose": "PoseModel", "-obb": "OBBModel",
        "-cls": "ClassificationModel",
    }  # fmt: skip
    kind = next((k for end, k in kinds.items() if end in name), "DetectionModel")
    tasks = importlib.import_module("ultralytics.nn.tasks")
    return getattr(tasks, kind)(tasks.yaml_model_load(name), verbose=False)
