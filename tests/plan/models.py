"""The shapes of models that plans are made of."""

from peft import LoraConfig
from transformers import LlamaConfig, Qwen2Config

LLAMA_8B = LlamaConfig(
    vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
    num_key_value_heads=8, max_position_embeddings=8192,
)  # fmt: skip
LLAMA_70B = LlamaConfig(
    vocab_size=128256, hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64,
    num_key_value_heads=8, max_position_embeddings=8192,
)  # fmt: skip
LLAMA_13B = LlamaConfig(
    vocab_size=32000, hidden_size=5120, intermediate_size=13824, num_hidden_layers=40, num_attention_heads=40,
    max_position_embeddings=4096,
)  # fmt: skip
QWEN_7B = Qwen2Config(
    vocab_size=152064, hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28,
    num_key_value_heads=4, max_position_embeddings=32768,
)  # fmt: skip
LORA = LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM")
