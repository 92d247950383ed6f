"""Say in a peer's names what our models are called in transformers', so that both start from the same weights."""

import re
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

Rules = Sequence[tuple[str, str]]

# In this order; each rule is applied to every name.
TO_TIMM: Rules = (
    (r"^embeddings\.cls_token", "cls_token"),
    (r"^embeddings\.position_embeddings", "pos_embed"),
    (r"^embeddings\.patch_embeddings\.projection", "patch_embed.proj"),
    (r"^(encoder\.layer|layers)\.", "blocks."),
    (r"\.attention\.o_proj\.", ".attn.proj."),
    (r"\.attention\.qkv\.", ".attn.qkv."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"\.layer_scale(\d)\.lambda1", r".ls\1.gamma"),
    (r"^layernorm\.", "norm."),
)
TO_OPEN_CLIP: Rules = (
    (r"^vision_model\.", "visual."),
    (r"^text_model\.", ""),
    (r"embeddings\.class_embedding", "class_embedding"),
    (r"embeddings\.position_embedding\.weight", "positional_embedding"),
    (r"embeddings\.patch_embedding", "conv1"),
    (r"embeddings\.token_embedding", "token_embedding"),
    (r"encoder\.layers\.", "transformer.resblocks."),
    (r"self_attn\.qkv\.", "attn.in_proj_"),
    (r"self_attn\.out_proj", "attn.out_proj"),
    (r"layer_norm(\d)", r"ln_\1"),
    (r"mlp\.fc1", "mlp.c_fc"),
    (r"mlp\.fc2", "mlp.c_proj"),
    (r"pre_layrnorm", "ln_pre"),
    (r"post_layernorm", "ln_post"),
    (r"final_layer_norm", "ln_final"),
    (r"^visual_projection\.weight", "visual.proj"),
    (r"^text_projection\.weight", "text_projection"),
)
TO_VIT_MAE: Rules = (
    (r"^tower\.model\.", "vit."),
    (r"^decoder\.embed\.", "decoder.decoder_embed."),
    (r"^decoder\.layers\.", "decoder.decoder_layers."),
    (r"^decoder\.norm\.", "decoder.decoder_norm."),
    (r"^decoder\.predict\.", "decoder.decoder_pred."),
)


def renamed(tensors: Mapping[str, Tensor], rules: Rules) -> dict[str, Tensor]:
    """The same tensors under the names that `rules` make of theirs."""
    result = {}
    for name, tensor in tensors.items():
        for pattern, replacement in rules:
            name = re.sub(pattern, replacement, name)
        result[name] = tensor
    return result


def with_fused_attention(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`....q_proj.weight`, `k_proj` and `v_proj` as one `....qkv.weight`, one below the other; the rest as it is."""
    result = {}
    for name, tensor in tensors.items():
        if ".q_proj." in name:
            parts = [tensors[name.replace(".q_proj.", f".{part}_proj.")] for part in "qkv"]
            result[name.replace(".q_proj.", ".qkv.")] = torch.cat(parts)
        elif ".k_proj." not in name and ".v_proj." not in name:
            result[name] = tensor
    return result


def for_timm(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A ViTModel's or Dinov2Model's weights as timm's VisionTransformer has them; the mask token is left out."""
    fused = with_fused_attention(tensors)
    return renamed({name: fused[name] for name in fused if name != "embeddings.mask_token"}, TO_TIMM)


def for_open_clip(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A CLIPModel's weights as open_clip's CLIP has them: its projections stand the other way round."""
    weights = renamed(with_fused_attention(tensors), TO_OPEN_CLIP)
    return weights | {name: weights[name].T for name in ("visual.proj", "text_projection")}


def for_vit_mae(tensors: Mapping[str, Tensor], patch: int) -> dict[str, Tensor]:
    """The tensors of a MaeObjective on a ViTModel, weights or gradients, under the names of ViTMAEForPreTraining.

    Its decoder lists the values of a patch with the channels innermost, ours with the channels outermost.
    """
    order = torch.arange(3 * patch * patch).reshape(3, patch, patch).permute(1, 2, 0).flatten()
    weights = renamed(tensors, TO_VIT_MAE)
    for name in weights:
        if name.startswith("decoder.decoder_pred."):
            weights[name] = weights[name][order]
        elif name == "decoder.mask_token":
            weights[name] = weights[name][None, None]
    return weights


def copy_in_order(ours: Iterable[nn.Parameter], theirs: Iterable[nn.Parameter]) -> None:
    """Copy weights of two networks that are built alike, one after the other.

    Raises ValueError when they are not built alike.
    """
    with torch.no_grad():
        for mine, other in zip(ours, theirs, strict=True):
            if mine.shape != other.shape:
                raise ValueError(f"a weight {tuple(mine.shape)} of ours stands where the peer has {tuple(other.shape)}")
            other.copy_(mine)
