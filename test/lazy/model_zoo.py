"""Small, random-weight ``transformers`` models for the tests that capture whole programs.

Each entry of `MODELS` builds one architecture with a tiny config (about two layers, width 32,
images of 32 to 64 pixels), in eval mode, on the CPU, with no download.  The entries marked
``core`` are the 25 that every test run covers; the others form the slow set, chosen to differ
from each other as much as possible.  Nothing here imports `transformers` until a model is made.

    case = MODELS["BERT"]
    model, first, second = case.make(), case.inputs(0), case.inputs(1)
    tensors(model(**first))

Inputs of different seeds have the same names, shapes and dtypes, and different values.  Where a
model takes an attention mask, its last row ends in zeros (how many depends on the seed).
Calls return what the library returns by default, caches included; `tensors` lists the tensors.
"""

from __future__ import annotations

import copy
import dataclasses
import importlib.util
import os
import unittest
from collections.abc import Callable, Mapping

import torch
from torch import nn

Part = Callable[[torch.Generator], dict]
VOCAB, PAD = 99, 1


@dataclasses.dataclass(frozen=True)
class ModelCase:
    """One architecture: the name of its class in `transformers`, its config, and its inputs."""

    name: str
    cls: str
    config: dict
    part: Part
    core: bool = False
    rng: bool = False
    """Whether a call in eval mode draws random numbers: seed them to compare two calls."""
    varies: bool = False
    """Whether shapes inside depend on the values of the inputs: fresh ones may need a variant."""

    def make(self) -> nn.Module:
        """The model, in eval mode: the same weights each time; the caller's RNG is untouched."""
        import transformers

        cls = getattr(transformers, self.cls)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = cls(cls.config_class(**copy.deepcopy(self.config))).eval()
            _enliven(model, self.inputs(1000))
        return model

    def inputs(self, seed: int = 0) -> dict:
        """Fresh keyword arguments for one call."""
        return self.part(torch.Generator().manual_seed(seed))


MODELS: dict[str, ModelCase] = {}


def set_up_module() -> None:
    """What a test file over these models does first, as its `setUpModule`.

    Skips the file where the library is missing; nothing is downloaded, and one thread is used.
    """
    if importlib.util.find_spec("transformers") is None:
        raise unittest.SkipTest("transformers is not installed: pip install transformers==5.23.0")
    # Read on import: a model that asked for a file would fail, not download it.
    os.environ["HF_HUB_OFFLINE"] = "1"
    from transformers.utils import logging

    logging.set_verbosity_error()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    unittest.addModuleCleanup(torch.set_num_threads, threads)


def names(core: bool | None = None) -> list[str]:
    """The names of all models, or of those in (True) or outside (False) the core set."""
    return [n for n, case in MODELS.items() if core is None or case.core == core]


def tensors(value: object) -> list[torch.Tensor]:
    """All tensors in a model's output, in a fixed order, those inside cache objects included."""
    found: list[torch.Tensor] = []
    seen: set[int] = set()

    def walk(v: object) -> None:
        if isinstance(v, torch.Tensor):
            found.append(v)
        elif isinstance(v, Mapping):
            for item in v.values():
                walk(item)
        elif isinstance(v, (list, tuple)):
            for item in v:
                walk(item)
        elif (
            type(v).__module__.startswith("transformers.")
            and not isinstance(v, nn.Module)
            and id(v) not in seen
            and hasattr(v, "__dict__")
        ):
            seen.add(id(v))
            walk(vars(v))

    walk(value)
    return found


@torch.no_grad()
def _enliven(model: nn.Module, inputs: dict) -> None:
    """Give a new model weights and statistics with which every part of it matters.

    Zero biases, unit norms, layer scales of 1e-6, matrices of width 0.02, and batch norms that do
    not fit their input would hide an operator that was dropped or applied to the wrong thing.
    """
    for p in model.parameters():
        if p.is_floating_point():
            gain = 1 if p.dim() == 2 else 2
            spread = 0.1 if p.dim() < 2 else min(0.5, (gain / p[0].numel()) ** 0.5)
            if p.numel() < 2 or p.float().std() < spread / 2:
                p.add_(torch.randn_like(p), alpha=spread)
    for name, b in model.named_buffers():
        if name.endswith((".embed", ".embed_sum")):  # the codebooks of EnCodec and Mimi
            b.normal_()
        elif name.endswith((".x_min", ".x_max")):  # the ranges of I-BERT's quantized activations
            b.mul_(4 / b.abs())

    def fit(norm: nn.Module, args: tuple) -> None:
        x = args[0].transpose(0, 1).flatten(1)
        norm.running_mean.copy_(x.mean(1))
        norm.running_var.copy_((x.var(1) + x.var(1).mean()) / 2)

    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    hooks = [m.register_forward_pre_hook(fit) for m in norms]
    if norms:
        model(**inputs)
    for hook in hooks:
        hook.remove()


# --- inputs ------------------------------------------------------------------------------------


def _all(*parts: Part) -> Part:
    """The inputs of several parts together, drawn one after the other."""
    return lambda g: {k: v for part in parts for k, v in part(g).items()}


def _but(config: dict, *without: str) -> dict:
    """A config without some of its entries."""
    return {k: v for k, v in config.items() if k not in without}


def _float(name: str, *shape: int) -> Part:
    """Normal values."""
    return lambda g: {name: torch.randn(shape, generator=g)}


def _unit(name: str, *shape: int) -> Part:
    """Values in [0, 1)."""
    return lambda g: {name: torch.rand(shape, generator=g)}


def _int(name: str, *shape: int, low: int = 3, high: int = VOCAB) -> Part:
    """Integers in [low, high); by default tokens without a special meaning."""
    return lambda g: {name: torch.randint(low, high, shape, generator=g)}


def _const(**values: torch.Tensor) -> Part:
    """The same values for each seed."""
    return lambda g: {k: v.clone() for k, v in values.items()}


def _mask(n: int, name: str = "attention_mask") -> Part:
    """Ones; the last row ends in zeros, for a quarter to a half of its length."""

    def part(g: torch.Generator) -> dict:
        mask = torch.ones(2, n, dtype=torch.long)
        mask[-1, -int(torch.randint(max(1, n // 4), n // 2 + 1, (), generator=g)) :] = 0
        return {name: mask}

    return part


def _text(n: int = 12, last: int | None = None) -> Part:
    """Token ids and their attention mask; `last` is put at the end of each text."""

    def part(g: torch.Generator) -> dict:
        ids = torch.randint(3, VOCAB, (2, n), generator=g)
        mask = _mask(n)(g)["attention_mask"]
        if last is not None:
            ids[torch.arange(2), mask.sum(1) - 1] = last
        return {"input_ids": ids.masked_fill(mask == 0, PAD), "attention_mask": mask}

    return part


def _image(size: int) -> Part:
    return _float("pixel_values", 2, 3, size, size)


def _video(frames: int, name: str = "pixel_values") -> Part:
    return _float(name, 1, frames, 3, 32, 32)


def _audio(n: int = 800) -> Part:
    return _all(_float("input_values", 2, n), _mask(n))


def _boxes(n: int) -> Part:
    """Integer boxes x0, y0, x1, y1 with x0 <= x1 and y0 <= y1, one for each token."""

    def part(g: torch.Generator) -> dict:
        corners = torch.randint(0, 100, (2, n, 2, 2), generator=g).sort(2).values
        return {"bbox": corners.flatten(2)}

    return part


def _captioned(image_tokens: int, n: int, image_id: int = VOCAB - 1) -> Part:
    """An image, and a text that starts with the tokens which stand for it."""

    def part(g: torch.Generator) -> dict:
        ids = torch.randint(3, image_id, (2, image_tokens + n), generator=g)
        ids[:, :image_tokens] = image_id
        return {"input_ids": ids}

    return _all(part, _mask(image_tokens + n), IMAGE32)


TEXT = _text()
TYPED = _all(TEXT, _int("token_type_ids", 2, 12, low=0, high=2))
SEQ2SEQ = _all(TEXT, _int("decoder_input_ids", 2, 7))
IMAGE32, IMAGE64 = _image(32), _image(64)

# fmt: off
# --- configs -----------------------------------------------------------------------------------

H = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64)
SPECIAL = dict(pad_token_id=PAD, bos_token_id=0, eos_token_id=2)
ENC = dict(vocab_size=VOCAB, max_position_embeddings=64, **H, **SPECIAL)
DEC = dict(num_key_value_heads=2, **ENC)
MOE = dict(num_experts_per_tok=2, num_local_experts=4, **DEC)
BART = dict(vocab_size=VOCAB, d_model=32, encoder_layers=2, decoder_layers=2,
            encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=64,
            decoder_ffn_dim=64, max_position_embeddings=64, decoder_start_token_id=2,
            forced_eos_token_id=None, **SPECIAL)
T5 = dict(vocab_size=VOCAB, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_decoder_layers=2,
          num_heads=4, decoder_start_token_id=0, **SPECIAL)
VIT = dict(image_size=32, patch_size=8, **H)
SWIN = dict(image_size=32, patch_size=2, embed_dim=16, depths=[2, 2], num_heads=[2, 4],
            window_size=4)
RESNET = dict(embedding_size=8, hidden_sizes=[16, 32], depths=[1, 2])
BACKBONE = dict(model_type="resnet", out_features=["stage2"], **RESNET)
PYRAMID = dict(depths=[1, 1, 1, 1], hidden_sizes=[8, 16, 16, 32],
               num_attention_heads=[1, 2, 2, 4], decoder_hidden_size=16)
SPEECH = dict(conv_dim=[16, 16, 16], conv_kernel=[8, 4, 4], conv_stride=[4, 3, 3],
              num_conv_pos_embeddings=8, num_conv_pos_embedding_groups=2, **H)
CLIP_TEXT = dict(ENC, projection_dim=16)
CLIP_VISION = dict(VIT, projection_dim=16)
DETR = dict(d_model=32, num_queries=5, encoder_layers=2, decoder_layers=2,
            encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=64,
            decoder_ffn_dim=64, num_labels=6, backbone_config=BACKBONE)
SERIES = dict(prediction_length=4, context_length=12, lags_sequence=[1, 2, 3], d_model=32,
              num_time_features=2, encoder_layers=2, decoder_layers=2, encoder_ffn_dim=32,
              decoder_ffn_dim=32)


def _add(name: str, cls: str, part: Part, *, core: bool = False, rng: bool = False,
         varies: bool = False, **config) -> None:
    """Enter a model; what is not for `ModelCase` is its config."""
    assert name not in MODELS, name
    MODELS[name] = ModelCase(name, cls, config, part, core, rng, varies)


def _core(name: str, cls: str, part: Part, **config) -> None:
    """Enter a model of the core set."""
    _add(name, cls, part, core=True, **config)


# --- the core set ------------------------------------------------------------------------------

_core("BERT", "BertModel", TYPED, **ENC)
_core("RoBERTa", "RobertaModel", TEXT, **ENC)
_core("DistilBERT", "DistilBertModel", TEXT, hidden_dim=64, **ENC)
_core("ALBERT", "AlbertModel", TYPED, embedding_size=16, **ENC)
_core("ELECTRA", "ElectraModel", TYPED, embedding_size=16, **ENC)
_core("GPT-2", "GPT2LMHeadModel", TEXT, **ENC)
_core("OPT", "OPTForCausalLM", TEXT, ffn_dim=64, word_embed_proj_dim=16, **ENC)
_core("Llama", "LlamaForCausalLM", TEXT, **DEC)
_core("Mistral", "MistralForCausalLM", TEXT, sliding_window=6, **DEC)
_core("Qwen2", "Qwen2ForCausalLM", TEXT, **DEC)
_core("Gemma", "GemmaForCausalLM", TEXT, head_dim=8, **DEC)
_core("Mixtral", "MixtralForCausalLM", TEXT, **MOE)
_core("T5", "T5Model", SEQ2SEQ, **T5)
_core("BART", "BartModel", SEQ2SEQ, **BART)
_core("ViT", "ViTModel", IMAGE32, **VIT)
_core("DeiT", "DeiTModel", IMAGE32, **VIT)
_core("Swin", "SwinModel", IMAGE32, **SWIN)
_core("ResNet", "ResNetForImageClassification", IMAGE64, **RESNET)
_core("ConvNeXt", "ConvNextModel", IMAGE64, num_stages=2, hidden_sizes=[16, 32], depths=[1, 2])
_core("MobileNetV2", "MobileNetV2Model", IMAGE32, depth_multiplier=0.25)
_core("RegNet", "RegNetModel", IMAGE64, groups_width=8, **RESNET)
_core("Whisper", "WhisperModel",
      _all(_float("input_features", 2, 8, 40), _int("decoder_input_ids", 2, 7)),
      num_mel_bins=8, max_source_positions=20, max_target_positions=20, **BART)
_core("Wav2Vec2", "Wav2Vec2Model", _audio(), **SPEECH)
_core("CLIP", "CLIPModel", _all(_text(last=2), IMAGE32), projection_dim=16, text_config=CLIP_TEXT,
      vision_config=CLIP_VISION)
_core("Mamba", "MambaForCausalLM", TEXT, state_size=4, time_step_rank=2, **ENC)

# --- text encoders -----------------------------------------------------------------------------

_add("DeBERTa", "DebertaModel", TEXT, relative_attention=True, pos_att_type=["c2p", "p2c"],
     position_biased_input=False, **ENC)
_add("DeBERTa-v2", "DebertaV2Model", TEXT, relative_attention=True, pos_att_type=["c2p", "p2c"],
     position_buckets=8, norm_rel_ebd="layer_norm", share_att_key=True, conv_kernel_size=3, **ENC)
_add("XLNet", "XLNetModel", TEXT, d_head=8, d_inner=64, **_but(ENC, "max_position_embeddings"))
_add("XLM", "XLMModel", TEXT, n_langs=1, **ENC)
_add("Longformer", "LongformerModel",
     _all(TEXT, _const(global_attention_mask=torch.eye(2, 12, dtype=torch.long))),
     attention_window=[4, 4], **ENC)
_add("BigBird", "BigBirdModel", _text(40), block_size=4, num_random_blocks=1, **ENC)
_add("Reformer", "ReformerModel", _text(16), attn_layers=["local", "lsh"], axial_pos_shape=[4, 4],
     axial_pos_embds_dim=[16, 16], attention_head_size=8, feed_forward_size=64, num_buckets=2,
     local_attn_chunk_length=4, lsh_attn_chunk_length=4, rng=True, **ENC)
_add("Funnel", "FunnelModel", TYPED, block_sizes=[1, 1], num_decoder_layers=1, d_head=8,
     d_inner=64, **_but(ENC, "num_hidden_layers"))
_add("FNet", "FNetModel", _int("input_ids", 2, 12), **ENC)
_add("Nystromformer", "NystromformerModel", _int("input_ids", 2, 16), num_landmarks=4,
     segment_means_seq_len=16, conv_kernel_size=5, **ENC)
_add("SqueezeBERT", "SqueezeBertModel", TEXT, embedding_size=32, **ENC)
_add("MobileBERT", "MobileBertModel", TEXT, embedding_size=16, intra_bottleneck_size=16, **ENC)
_add("MPNet", "MPNetModel", TEXT, **ENC)
_add("RoFormer", "RoFormerModel", TEXT, embedding_size=16, **ENC)
_add("ConvBERT", "ConvBertModel", TEXT, embedding_size=16, **ENC)
_add("I-BERT", "IBertModel", TEXT, quant_mode=True, **ENC)
_add("CANINE", "CanineModel", _text(16), local_transformer_stride=8, num_hash_buckets=64, **ENC)
_add("YOSO", "YosoModel", TEXT, **ENC)
_add("RemBERT", "RemBertModel", TEXT, input_embedding_size=16, output_embedding_size=16, **ENC)
_add("ESM", "EsmModel", TEXT, position_embedding_type="rotary", mask_token_id=3,
     token_dropout=True, emb_layer_norm_before=True, **ENC)
_add("ModernBERT", "ModernBertModel", TEXT, cls_token_id=0, sep_token_id=2, local_attention=6,
     layer_types=["full_attention", "sliding_attention"], **ENC)
_add("Splinter", "SplinterForQuestionAnswering", _all(TEXT,
     _const(question_positions=torch.tensor([[1, 4], [2, 3]]))), question_token_id=50, **ENC)
_add("LUKE", "LukeModel",
     _all(TEXT, _int("entity_ids", 2, 3, high=20), _mask(3, name="entity_attention_mask"),
          _const(entity_position_ids=torch.tensor([[[1, 2, -1], [3, -1, -1], [4, 5, 6]]] * 2))),
     entity_vocab_size=20, entity_emb_size=16, **ENC)
_add("LayoutLM", "LayoutLMModel", _all(TEXT, _boxes(12)), max_2d_position_embeddings=128, **ENC)
_add("LayoutLMv3", "LayoutLMv3Model", _all(TEXT, _boxes(12), IMAGE32),
     max_2d_position_embeddings=128, coordinate_size=6, shape_size=4, input_size=32, patch_size=8,
     rel_pos_bins=8, rel_2d_pos_bins=8, **ENC)
_add("LiLT", "LiltModel", _all(TEXT, _boxes(12)), max_2d_position_embeddings=128, **dict(ENC,
     hidden_size=48))
_add("BROS", "BrosModel", _all(TEXT, _unit("bbox", 2, 12, 8)), **dict(ENC, hidden_size=64))
_add("TAPAS", "TapasModel", _all(TEXT, _int("token_type_ids", 2, 12, 7, low=0, high=2)), **ENC)
_add("LXMERT", "LxmertModel", _all(TEXT, _float("visual_feats", 2, 4, 8), _unit("visual_pos", 2, 4,
     4)), l_layers=2, x_layers=1, r_layers=1, visual_feat_dim=8, **ENC)
_add("VisualBERT", "VisualBertModel", _all(TEXT, _float("visual_embeds", 2, 4, 8), _mask(4,
     name="visual_attention_mask")), visual_embedding_dim=8, **ENC)

# --- text decoders -----------------------------------------------------------------------------

_add("OpenAI-GPT", "OpenAIGPTLMHeadModel", TEXT, **ENC)
_add("GPT-J", "GPTJForCausalLM", TEXT, rotary_dim=4, **ENC)
_add("GPT-Neo", "GPTNeoForCausalLM", TEXT, attention_types=[[["global", "local"], 1]],
     window_size=4, **ENC)
_add("GPT-NeoX", "GPTNeoXForCausalLM", TEXT, **ENC)
_add("CodeGen", "CodeGenForCausalLM", TEXT, rotary_dim=4, **ENC)
_add("CTRL", "CTRLModel", TEXT, dff=64, **ENC)
_add("BLOOM", "BloomForCausalLM", TEXT, **ENC)
_add("Falcon", "FalconForCausalLM", TEXT, alibi=True, **ENC)
_add("MPT", "MptForCausalLM", TEXT, **ENC)
_add("Phi", "PhiForCausalLM", TEXT, **DEC)
_add("Phi-3", "Phi3ForCausalLM", TEXT, **DEC)
_add("StableLM", "StableLmForCausalLM", TEXT, use_parallel_residual=True, qk_layernorm=True, **DEC)
_add("Cohere", "CohereForCausalLM", TEXT, use_qk_norm=True, **DEC)
_add("OLMo", "OlmoForCausalLM", TEXT, clip_qkv=0.5, **DEC)
_add("Granite", "GraniteForCausalLM", TEXT, residual_multiplier=0.5, **DEC)
_add("Gemma2", "Gemma2ForCausalLM", TEXT, head_dim=8, sliding_window=6, **DEC)
_add("Qwen3", "Qwen3ForCausalLM", TEXT, head_dim=8, **DEC)
_add("Nemotron", "NemotronForCausalLM", TEXT, head_dim=8, **DEC)
_add("DiffLlama", "DiffLlamaForCausalLM", TEXT, head_dim=8, **DEC)
_add("BioGPT", "BioGptForCausalLM", TEXT, **ENC)
_add("XGLM", "XGLMForCausalLM", TEXT, ffn_dim=64, **ENC)
_add("Qwen2-MoE", "Qwen2MoeForCausalLM", TEXT, varies=True, num_experts=4,
     moe_intermediate_size=16, shared_expert_intermediate_size=32, experts_implementation="eager",
     **MOE)
_add("JetMoE", "JetMoeForCausalLM", TEXT, varies=True, kv_channels=8, **MOE)
_add("DBRX", "DbrxForCausalLM", TEXT, varies=True, attn_config=dict(kv_n_heads=2, clip_qkv=1.0,
     rope_theta=10000.0), ffn_config=dict(ffn_hidden_size=32, moe_num_experts=4, moe_top_k=2),
     d_model=32, **_but(ENC, "hidden_size"))
_add("GPT-OSS", "GptOssForCausalLM", TEXT, head_dim=8, sliding_window=6, **MOE)
_add("DeepSeek-V3", "DeepseekV3ForCausalLM", TEXT, n_routed_experts=4, n_group=2, topk_group=1,
     num_experts_per_tok=2, moe_intermediate_size=16, first_k_dense_replace=1, kv_lora_rank=16,
     q_lora_rank=16, qk_rope_head_dim=4, qk_nope_head_dim=4, v_head_dim=8, **dict(DEC,
     num_key_value_heads=4))
_add("RWKV", "RwkvForCausalLM", TEXT, attention_hidden_size=32, rescale_every=0, **ENC)
_add("Mamba2", "Mamba2ForCausalLM", TEXT, num_heads=4, head_dim=16, state_size=8, n_groups=1,
     chunk_size=8, **_but(ENC, "num_attention_heads"))
_add("RecurrentGemma", "RecurrentGemmaForCausalLM", TEXT, block_types=["recurrent", "attention"],
     lru_width=32, attention_window_size=6, **DEC)
_add("xLSTM", "xLSTMForCausalLM", TEXT, num_heads=2, chunk_size=4, **dict(ENC, hidden_size=128))
_add("Jamba", "JambaForCausalLM", TEXT, num_experts=4, attn_layer_period=2, attn_layer_offset=1,
     mamba_d_state=4, mamba_dt_rank=2, use_mamba_kernels=False, **dict(DEC, num_experts_per_tok=2))
_add("MiniMax", "MiniMaxForCausalLM", TEXT, layer_types=["linear_attention", "full_attention"],
     block_size=4, **MOE)
_add("Qwen3-Next", "Qwen3NextForCausalLM", TEXT, layer_types=["linear_attention",
     "full_attention"], head_dim=8, linear_key_head_dim=8, linear_value_head_dim=8,
     linear_num_key_heads=2, linear_num_value_heads=4, num_experts=4, moe_intermediate_size=16,
     shared_expert_intermediate_size=16, **dict(DEC, num_experts_per_tok=2))
_add("LFM2", "Lfm2ForCausalLM", TEXT, layer_types=["conv", "full_attention"], block_multiple_of=8,
     **DEC)
_add("ImageGPT", "ImageGPTModel", _int("input_ids", 2, 12), **ENC)

# --- text to text ------------------------------------------------------------------------------

_add("mBART", "MBartModel", SEQ2SEQ, **BART)
_add("Pegasus", "PegasusModel", SEQ2SEQ, **BART)
_add("PEGASUS-X", "PegasusXModel", _all(_text(16), _int("decoder_input_ids", 2, 7)), block_size=4,
     num_global_tokens=3, **BART)
_add("LED", "LEDModel", SEQ2SEQ, attention_window=4, max_encoder_position_embeddings=64,
     max_decoder_position_embeddings=64, **BART)
_add("ProphetNet", "ProphetNetModel", SEQ2SEQ, hidden_size=32, num_encoder_layers=2,
     num_decoder_layers=2, num_encoder_attention_heads=4, num_decoder_attention_heads=4,
     **_but(BART, "encoder_layers", "decoder_layers", "encoder_attention_heads",
     "decoder_attention_heads"))
_add("Marian", "MarianMTModel", SEQ2SEQ, decoder_vocab_size=VOCAB, **BART)
_add("BigBird-Pegasus", "BigBirdPegasusModel", _all(_text(40), _int("decoder_input_ids", 2, 7)),
     block_size=4, num_random_blocks=1, **BART)
_add("LongT5", "LongT5Model", SEQ2SEQ, encoder_attention_type="transient-global", local_radius=3,
     global_block_size=4, **T5)
_add("UMT5", "UMT5Model", SEQ2SEQ, **T5)
_add("Switch Transformers", "SwitchTransformersModel", SEQ2SEQ, varies=True, num_experts=4,
     expert_capacity=5, num_sparse_encoder_layers=1, num_sparse_decoder_layers=1, **T5)
_add("NLLB-MoE", "NllbMoeModel", SEQ2SEQ, varies=True, num_experts=4, encoder_sparse_step=2,
     decoder_sparse_step=2, **BART)
_add("FSMT", "FSMTModel", SEQ2SEQ, src_vocab_size=VOCAB, tgt_vocab_size=VOCAB, langs=["en", "de"],
     **BART)
_add("BlenderbotSmall", "BlenderbotSmallModel", SEQ2SEQ, **BART)
_add("T5Gemma", "T5GemmaModel", SEQ2SEQ, vocab_size=VOCAB, encoder=dict(DEC, head_dim=8),
     decoder=dict(DEC, head_dim=8))

# --- images and video --------------------------------------------------------------------------

_add("BEiT", "BeitModel", IMAGE32, use_relative_position_bias=True, use_mask_token=True, **VIT)
_add("PVT", "PvtModel", IMAGE64, image_size=64, **PYRAMID)
_add("PVTv2", "PvtV2Model", IMAGE64, linear_attention=True, **PYRAMID)
_add("SegFormer", "SegformerForSemanticSegmentation", IMAGE64, **PYRAMID)
_add("GLPN", "GLPNForDepthEstimation", IMAGE64, **PYRAMID)
_add("PoolFormer", "PoolFormerModel", IMAGE64, depths=[1, 1, 1, 1], hidden_sizes=[8, 16, 16, 32])
_add("LeViT", "LevitModel", IMAGE64, image_size=64, hidden_sizes=[16, 24, 32],
     num_attention_heads=[2, 3, 4], depths=[1, 1, 1], key_dim=[4, 4, 4])
_add("CvT", "CvtModel", IMAGE64, embed_dim=[8, 16, 32], num_heads=[1, 2, 4], depth=[1, 2, 3])
_add("MobileViT", "MobileViTModel", IMAGE64, image_size=64, hidden_sizes=[16, 24, 32],
     neck_hidden_sizes=[8, 8, 8, 16, 16, 24, 32])
_add("MobileViTV2", "MobileViTV2Model", IMAGE64, image_size=64, width_multiplier=0.25)
_add("MobileNetV1", "MobileNetV1Model", IMAGE32, depth_multiplier=0.25)
_add("EfficientNet", "EfficientNetModel", IMAGE32, width_coefficient=0.25, depth_coefficient=0.3,
     hidden_dim=320)
_add("DINOv2", "Dinov2Model", IMAGE32, use_swiglu_ffn=True, **VIT)
_add("DINOv3", "DINOv3ViTModel", IMAGE32, num_register_tokens=2, **VIT)
_add("DPT", "DPTForDepthEstimation", IMAGE32, backbone_out_indices=[0, 1, 2, 3],
     neck_hidden_sizes=[8, 8, 16, 16], fusion_hidden_size=16, **dict(VIT, num_hidden_layers=4))
_add("YOLOS", "YolosForObjectDetection", _image(48), num_detection_tokens=5, num_labels=6,
     **dict(VIT, image_size=[32, 32]))
_add("DETR", "DetrForObjectDetection",
     _all(IMAGE64, _const(pixel_mask=torch.ones(2, 64, 64, dtype=torch.long).tril(20))), **DETR)
_add("Deformable DETR", "DeformableDetrForObjectDetection", IMAGE64, num_feature_levels=2, **DETR)
_add("Swin V2", "Swinv2Model", IMAGE32, **SWIN)
_add("Swin2SR", "Swin2SRForImageSuperResolution", _image(16), **dict(SWIN, patch_size=1,
     image_size=16))
_add("FocalNet", "FocalNetModel", IMAGE32, image_size=32, embed_dim=16, hidden_sizes=[16, 32],
     depths=[1, 1], focal_levels=[2, 2], focal_windows=[3, 3], use_layerscale=True)
_add("Hiera", "HieraModel", IMAGE64, image_size=[64, 64], embed_dim=8, depths=[1, 1, 2],
     num_heads=[1, 2, 4], num_query_pool=2, masked_unit_size=[4, 4], masked_unit_attention=[True,
     True, False])
_add("BiT", "BitModel", IMAGE64, num_groups=4, **RESNET)
_add("SwiftFormer", "SwiftFormerModel", IMAGE64, depths=[1, 1, 1, 1], embed_dims=[8, 16, 16, 32])
_add("ViTDet", "VitDetModel", _image(40), pretrain_image_size=32, window_size=3,
     window_block_indices=[0], residual_block_indices=[1], use_relative_position_embeddings=True,
     **VIT)
_add("ViT-MAE", "ViTMAEModel", IMAGE32, rng=True, **VIT)
_add("TextNet", "TextNetModel", IMAGE64, stem_out_channels=8, hidden_sizes=[8, 8, 16, 16, 32])
_add("SuperPoint", "SuperPointForKeypointDetection", _unit("pixel_values", 2, 3, 48, 48),
     varies=True, encoder_hidden_sizes=[8, 8, 16, 16], decoder_hidden_size=16,
     descriptor_decoder_dim=16)
_add("UPerNet", "UperNetForSemanticSegmentation", IMAGE64, hidden_size=16, auxiliary_channels=8,
     auxiliary_in_channels=32, num_labels=6, backbone_config=dict(BACKBONE, out_features=["stem",
     "stage1", "stage2"]))
_add("MaskFormer", "MaskFormerModel", IMAGE64, fpn_feature_size=32, mask_feature_size=32,
     num_labels=6, decoder_config=dict(model_type="detr", **_but(DETR, "num_labels")),
     backbone_config=dict(BACKBONE, out_features=["stem", "stage1", "stage2"]))
_add("SAM", "SamModel", _all(IMAGE64, _unit("input_points", 2, 1, 3, 2)),
     vision_config=dict(H, image_size=64, patch_size=8, output_channels=16, window_size=3,
                        global_attn_indexes=[1], mlp_dim=64, num_pos_feats=8),
     prompt_encoder_config=dict(hidden_size=16, image_size=64, patch_size=8,
                                mask_input_channels=4),
     mask_decoder_config=dict(hidden_size=16, mlp_dim=32, num_attention_heads=2,
                              iou_head_hidden_dim=16))
_add("TimeSformer", "TimesformerModel", _video(4), num_frames=4, **VIT)
_add("VideoMAE", "VideoMAEModel", _video(4), num_frames=4, **VIT)
_add("ViViT", "VivitModel", _video(4), num_frames=4, tubelet_size=[2, 8, 8], **VIT)
_add("V-JEPA 2", "VJEPA2Model", _video(4, name="pixel_values_videos"), crop_size=32,
     frames_per_clip=4, pred_hidden_size=16, pred_num_attention_heads=2, pred_num_hidden_layers=1,
     num_pooler_layers=1, **VIT)

# --- audio -------------------------------------------------------------------------------------

_add("HuBERT", "HubertModel", _audio(), do_stable_layer_norm=True, feat_extract_norm="layer",
     **SPEECH)
_add("SEW", "SEWModel", _audio(), **SPEECH)
_add("SEW-D", "SEWDModel", _audio(), position_buckets=8, **SPEECH)
_add("UniSpeech", "UniSpeechModel", _audio(), **SPEECH)
_add("WavLM", "WavLMModel", _audio(), num_buckets=16, **SPEECH)
_add("Wav2Vec2-Conformer", "Wav2Vec2ConformerModel", _audio(), conv_depthwise_kernel_size=5,
     **SPEECH)
_add("Wav2Vec2-BERT", "Wav2Vec2BertModel", _all(_float("input_features", 2, 20, 8), _mask(20)),
     feature_projection_input_dim=8, conv_depthwise_kernel_size=5, add_adapter=True,
     output_hidden_size=32, **H)
_add("Data2Vec-Audio", "Data2VecAudioModel", _audio(), conv_pos_kernel_size=5,
     **SPEECH)
_add("SpeechT5", "SpeechT5ForTextToSpeech", _all(TEXT, _float("decoder_input_values", 2, 6, 8),
     _float("speaker_embeddings", 2, 16)), rng=True, num_mel_bins=8,
     speech_decoder_prenet_units=16, speech_decoder_postnet_units=16, speaker_embedding_dim=16,
     **dict(BART, **SPEECH))
_add("Speech2Text", "Speech2TextModel", _all(_float("input_features", 2, 24, 8), _mask(24),
     _int("decoder_input_ids", 2, 7)), input_feat_per_channel=8, conv_channels=16,
     max_source_positions=40, max_target_positions=40, **BART)
_add("AST", "ASTModel", _float("input_values", 2, 32, 16), max_length=32, num_mel_bins=16,
     **dict(VIT, patch_size=8))
_add("EnCodec", "EncodecModel", _float("input_values", 2, 1, 320), hidden_size=16, num_filters=4,
     upsampling_ratios=[4, 2], codebook_size=32, codebook_dim=16, num_lstm_layers=1)
_add("DAC", "DacModel", _float("input_values", 2, 1, 256), encoder_hidden_size=8,
     downsampling_ratios=[2, 4], decoder_hidden_size=32, n_codebooks=3, codebook_size=32,
     codebook_dim=4)
_add("Mimi", "MimiModel", _float("input_values", 2, 1, 512), num_filters=4, upsampling_ratios=[4,
     2], codebook_size=32, codebook_dim=16, vector_quantization_hidden_dimension=16,
     num_quantizers=4, upsample_groups=32, num_key_value_heads=2, head_dim=8, sampling_rate=200,
     sliding_window=6, frame_rate=12.5, **H)
_add("VITS", "VitsModel", _text(6), varies=True, rng=True, vocab_size=VOCAB, hidden_size=16,
     flow_size=16, num_hidden_layers=2, ffn_dim=32, spectrogram_bins=9, speaking_rate=40.0,
     upsample_initial_channel=16, upsample_rates=[4, 2], upsample_kernel_sizes=[8, 4],
     duration_predictor_filter_channels=16, duration_predictor_num_flows=2,
     prior_encoder_num_flows=2, prior_encoder_num_wavenet_layers=2,
     posterior_encoder_num_wavenet_layers=2, resblock_kernel_sizes=[3],
     resblock_dilation_sizes=[[1, 3]])
_add("UnivNet", "UnivNetModel", _float("input_features", 2, 7, 16), rng=True, model_in_channels=8,
     model_hidden_channels=8, num_mel_bins=16, kernel_predictor_hidden_channels=8)
_add("FastSpeech2-Conformer", "FastSpeech2ConformerModel", TEXT, varies=True, hidden_size=16,
     vocab_size=VOCAB, num_mel_bins=8, encoder_layers=1, decoder_layers=1, encoder_linear_units=32,
     decoder_linear_units=32, speech_decoder_postnet_layers=2, speech_decoder_postnet_units=16,
     duration_predictor_channels=16, energy_predictor_channels=16, pitch_predictor_channels=16)
_add("Moonshine", "MoonshineModel", _all(_audio(1600), _int("decoder_input_ids", 2, 7)),
     encoder_num_hidden_layers=2, decoder_num_hidden_layers=2, encoder_num_attention_heads=4,
     decoder_num_attention_heads=4, encoder_num_key_value_heads=4, decoder_num_key_value_heads=4,
     vocab_size=VOCAB, hidden_size=32, intermediate_size=64)

# --- several modalities ------------------------------------------------------------------------

_add("BLIP", "BlipModel", _all(TEXT, IMAGE32), projection_dim=16, text_config=ENC,
     vision_config=VIT)
_add("SigLIP", "SiglipModel", _all(TEXT, IMAGE32), text_config=dict(ENC, projection_size=32),
     vision_config=VIT)
_add("AltCLIP", "AltCLIPModel", _all(TEXT, IMAGE32), projection_dim=16, text_config=dict(ENC,
     project_dim=16), vision_config=CLIP_VISION)
_add("CLIPSeg", "CLIPSegForImageSegmentation", _all(_text(last=2), IMAGE32), projection_dim=16,
     extract_layers=[0, 1], reduce_dim=16, decoder_intermediate_size=32, text_config=CLIP_TEXT,
     vision_config=CLIP_VISION)
_add("GroupViT", "GroupViTModel", _all(_text(last=2), IMAGE32), projection_dim=16,
     projection_intermediate_dim=32, text_config=ENC, vision_config=dict(VIT, depths=[1, 1],
     num_group_tokens=[4, 0], num_output_groups=[4, 4]))
_add("OWL-ViT", "OwlViTForObjectDetection", _all(_text(last=2), IMAGE32), projection_dim=32,
     text_config=ENC, vision_config=VIT)
_add("FLAVA", "FlavaModel", _all(TEXT, IMAGE32), hidden_size=32, projection_dim=16,
     text_config=ENC, image_config=VIT, multimodal_config=H)
_add("ViLT", "ViltModel", _all(TEXT, IMAGE32), rng=True, **ENC, image_size=32, patch_size=8)
_add("Perceiver", "PerceiverModel", _all(_float("inputs", 2, 12, 16), _mask(12)), num_latents=5,
     d_latents=32, d_model=16, num_self_attends_per_block=2, num_self_attention_heads=2,
     num_cross_attention_heads=2)
_add("LLaVA", "LlavaForConditionalGeneration", _captioned(16, 20), image_token_index=VOCAB - 1,
     image_seq_length=16, text_config=dict(DEC, model_type="llama"),
     vision_config=dict(VIT, model_type="clip_vision_model"))
_add("GIT", "GitModel", _all(TEXT, IMAGE32), vision_config=VIT, **ENC)
_add("MGP-STR", "MgpstrForSceneTextRecognition", IMAGE32, image_size=[32, 32], hidden_size=32,
     num_hidden_layers=2, num_attention_heads=4, max_token_length=5, num_character_labels=8,
     num_bpe_labels=9, num_wordpiece_labels=10)

# --- series and decisions ----------------------------------------------------------------------

_SERIES = _all(_float("past_values", 2, 15), _float("past_time_features", 2, 15, 2),
               _unit("past_observed_mask", 2, 15), _float("future_values", 2, 4),
               _float("future_time_features", 2, 4, 2))
_add("Time Series Transformer", "TimeSeriesTransformerModel", _SERIES, **SERIES)
_add("Informer", "InformerModel", _SERIES, rng=True, **SERIES)
_add("Autoformer", "AutoformerModel", _SERIES, label_length=4, moving_average=5, **SERIES)
_add("PatchTST", "PatchTSTModel", _float("past_values", 2, 24, 3), num_input_channels=3,
     context_length=24, patch_length=4, patch_stride=4, num_hidden_layers=2, d_model=32,
     ffn_dim=64)
_add("PatchTSMixer", "PatchTSMixerModel", _float("past_values", 2, 24, 3), num_input_channels=3,
     context_length=24, patch_length=4, patch_stride=4, num_layers=2, mode="mix_channel")
_add("Decision Transformer", "DecisionTransformerModel", _all(_float("states", 2, 5, 6),
     _float("actions", 2, 5, 3), _float("rewards", 2, 5, 1), _float("returns_to_go", 2, 5, 1),
     _int("timesteps", 2, 5, low=0, high=20), _mask(5)), state_dim=6, act_dim=3, max_ep_len=20,
     hidden_size=32, n_layer=2, n_head=4)
# fmt: on
