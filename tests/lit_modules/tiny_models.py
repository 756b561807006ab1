"""Tiny models with random weights, one of each family that the extractor is held against."""

import torch
import transformers as t

SMALL = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48}
POSITIONS = {"max_position_embeddings": 64}
KEYS = {"num_key_value_heads": 2, "head_dim": 8}

CONFIGS = {
    "gpt2": t.GPT2Config(vocab_size=99, n_embd=32, n_layer=3, n_head=4, n_positions=64),
    "gpt_neox": t.GPTNeoXConfig(**SMALL, **POSITIONS),
    "llama": t.LlamaConfig(**SMALL, **POSITIONS, num_key_value_heads=2),
    "qwen3": t.Qwen3Config(**SMALL, **POSITIONS, **KEYS),
    "gemma2": t.Gemma2Config(**SMALL, **POSITIONS, **KEYS, sliding_window=4, query_pre_attn_scalar=8),
    "mixtral": t.MixtralConfig(**SMALL, **POSITIONS, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2),
    "mamba": t.MambaConfig(vocab_size=99, hidden_size=32, num_hidden_layers=3, state_size=8, expand=2, conv_kernel=4),
    "bert": t.BertConfig(**SMALL, **POSITIONS),
    "roberta": t.RobertaConfig(**SMALL, max_position_embeddings=66, pad_token_id=1),
}
CAUSAL = [name for name in CONFIGS if name not in ("bert", "roberta")]


def tiny_model(family: str, seed: int = 0) -> t.PreTrainedModel:
    """Returns the model without a head, its weights large enough that no state is trivial."""
    torch.manual_seed(seed)
    model = t.AutoModel.from_config(CONFIGS[family])
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(3.0)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.train(False)


def in_dtype(model: t.PreTrainedModel, dtype: torch.dtype) -> t.PreTrainedModel:
    """Returns the model with its weights in this dtype, and its rotary frequencies as they were: as from_pretrained does."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model
