"""GGUF files from models: weights, tokenizer and chat template for llama.cpp, read back and compared."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from trl import checkpoint
from trl.data.tokenizing.chat import end_tokens

from .agreement import gap, outputs
from .gguf import read, require_gguf
from .load import ModelError
from .merging import MergeError, check


class _Architecture(NamedTuple):
    name: str  # llama.cpp's
    interleaved: bool  # rotary pairs are neighbours in llama.cpp, so that rows of queries and keys change places


ARCHITECTURES = {
    "llama": _Architecture("llama", True),
    "mistral": _Architecture("llama", True),
    "qwen2": _Architecture("qwen2", False),
    "qwen3": _Architecture("qwen3", False),
}
TYPES = ("f32", "f16", "bf16", "q8_0")
# llama.cpp's names of the ways in which byte-level tokenizers cut a text into words: by the regular expression, if the
# tokenizer has one of its own.
_LETTERS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SPLITS = {_LETTERS + r"\p{N}{1,3}" + _REST: "llama-bpe", _LETTERS + r"\p{N}" + _REST: "qwen2"}


def write_gguf(
    model: Any,
    tokenizer: Any,
    path: Path,
    *,
    rows: Tensor,
    kind: str = "f16",
    name: str = "model",
    pre: str | None = None,
) -> tuple[float, float]:
    """Write a model (in float32) and its tokenizer into a GGUF file, read it back and compare.

    kind    type of the weights, one of `TYPES`; vectors are kept in float32, and matrices whose rows are no multiple of
            32 in float16 instead of q8_0
    pre     llama.cpp's name of how the tokenizer cuts a text into words; default: found by the tokenizer's own rule

    Returns the gap that rounding to `kind` makes and the gap between the rounded model and the one that was read back.
    The weights of `model` are rounded. Raises `ModelError` for what GGUF cannot hold, and `MergeError`, without a file,
    if what is read back computes something else.
    """
    if kind not in TYPES:
        raise ModelError(f"dtype={kind!r} is not a type of GGUF that is written here: {', '.join(TYPES)}")
    writer = _Writer(require_gguf("Writing GGUF files"), model, tokenizer, kind, name, pre)
    exact = outputs(model, rows)
    gaps: list[float] = []

    def write(target: Path) -> None:
        writer.write(target)
        here = outputs(model, rows)
        gaps.extend((gap(here, exact), gap(writer.read_back(target, rows), here)))
        check("writing", gaps[1], torch.float32)

    checkpoint.write_file(path, write)
    return gaps[0], gaps[1]


class _Writer:
    def __init__(self, gguf: Any, model: Any, tokenizer: Any, kind: str, name: str, pre: str | None) -> None:
        self.gguf, self.model, self.tokenizer, self.name = gguf, model, tokenizer, name
        self.config = model.config.get_text_config()
        self.architecture = architecture_of(model.config)
        self.kind = gguf.GGMLQuantizationType[kind.upper()]
        self.file_type = gguf.LlamaFileType[{"f32": "ALL_F32"}.get(kind, f"MOSTLY_{kind.upper()}")]
        self.factors = _rope_factors(model)
        self.vocabulary = _Vocabulary(gguf, tokenizer, self.config.vocab_size, pre)

    def write(self, path: Path) -> None:
        """Write the file, and round the model's weights as the file has them."""
        writer = self.gguf.GGUFWriter(path, self.architecture.name)
        self._add_sizes(writer)
        self.vocabulary.add(writer)
        for name, data, kind in self._tensors():
            writer.add_tensor(name, data, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()

    def _add_sizes(self, writer: Any) -> None:
        config = self.config
        heads = config.num_attention_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // heads
        writer.add_name(self.name)
        writer.add_file_type(self.file_type)
        writer.add_quantization_version(self.gguf.GGML_QUANT_VERSION)
        writer.add_vocab_size(config.vocab_size)
        writer.add_context_length(config.max_position_embeddings)
        writer.add_embedding_length(config.hidden_size)
        writer.add_block_count(config.num_hidden_layers)
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_head_count(heads)
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_key_length(width)
        writer.add_value_length(width)
        writer.add_rope_dimension_count(width)
        writer.add_rope_freq_base(float(config.rope_parameters["rope_theta"]))
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)

    def _tensors(self) -> Iterator[tuple[str, np.ndarray, Any]]:
        """Name, packed values and type of each tensor. The model's own weight becomes what the packed values are."""
        gguf, config = self.gguf, self.config
        names = gguf.get_tensor_name_map(
            next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == self.architecture.name),
            config.num_hidden_layers,
        )
        for key, weight in self.model.named_parameters():  # a tied head is not listed
            name = names.get_name(key, try_suffixes=(".weight", ".bias"))
            if name is None:
                raise ModelError(f"GGUF has no name for the weight {key} of {type(self.model).__name__}")
            values = weight.detach().float().cpu().numpy()
            kind = self._kind(values)
            packed = gguf.quants.quantize(values, kind)
            rounded = torch.from_numpy(np.array(gguf.quants.dequantize(packed, kind), dtype=np.float32))
            weight.data.copy_(rounded.reshape(weight.shape))
            if self.architecture.interleaved and key.rpartition(".")[0].endswith(("q_proj", "k_proj")):
                heads = config.num_attention_heads if ".q_proj." in key else config.num_key_value_heads
                # Whole rows change places, so that packing before or after is the same.
                packed = packed.reshape(heads, 2, packed.shape[0] // heads // 2, *packed.shape[1:])
                packed = np.ascontiguousarray(packed.swapaxes(1, 2)).reshape(-1, *packed.shape[3:])
            yield name, packed, kind
        if self.factors is not None:
            yield "rope_freqs.weight", self.factors.numpy(), gguf.GGMLQuantizationType.F32

    def _kind(self, values: np.ndarray) -> Any:
        types = self.gguf.GGMLQuantizationType
        if values.ndim == 1:
            return types.F32
        return types.F16 if self.kind == types.Q8_0 and values.shape[-1] % 32 else self.kind

    def read_back(self, path: Path, rows: Tensor) -> Tensor:
        """The logits of the file's model. Raises `MergeError` if its tokenizer is not the one that was given."""
        file = self.gguf.GGUFReader(path)
        for key, wanted in (("tokens", self.vocabulary.tokens), ("merges", self.vocabulary.merges)):
            if file.fields[f"tokenizer.ggml.{key}"].contents() != wanted:
                raise MergeError(f"the {key} of the tokenizer are read back differently: nothing was written")
        try:
            again = read(path)
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[0]
            raise MergeError(f"the file cannot be read back, so that nothing was written: {reason}") from error
        if self.factors is not None:
            # transformers does not read them.
            found = next(each for each in file.tensors if each.name == "rope_freqs.weight")
            rotary = again.model.rotary_emb
            rotary.inv_freq = rotary.inv_freq / torch.from_numpy(np.array(found.data))
        return outputs(again, rows)


def architecture_of(config: Any) -> _Architecture:
    """The architecture of a model with this configuration in llama.cpp's words. Raises `ModelError` for another one."""
    name = (config.architectures or ["a model"])[0]
    config = config.get_text_config()
    if config.model_type not in ARCHITECTURES or not name.endswith("ForCausalLM"):
        raise ModelError(
            f"{name} (model_type {config.model_type}) is not written as GGUF here: supported are the "
            f"language models {', '.join(ARCHITECTURES)}. Export it as safetensors and use llama.cpp's own converter"
        )
    window = getattr(config, "sliding_window", None)
    if window and getattr(config, "use_sliding_window", True) and window < config.max_position_embeddings:
        raise ModelError(
            f"the model attends within a window of {window:,} tokens, which GGUF files of this architecture do not "
            "tell: llama.cpp would attend to all tokens"
        )
    return ARCHITECTURES[config.model_type]


def _rope_factors(model: Any) -> Tensor | None:
    """What llama.cpp divides rotary frequencies by, [D/2], or None if they are the plain ones."""
    config, rotary = model.config.get_text_config(), model.model.rotary_emb
    frequencies = rotary.inv_freq.detach().float().cpu()
    width = 2 * len(frequencies)
    exponents = torch.arange(0, width, 2, dtype=torch.int64).float() / width
    plain = 1.0 / (config.rope_parameters["rope_theta"] ** exponents)
    if torch.allclose(plain, frequencies, rtol=1e-5, atol=0):
        return None
    kind = config.rope_parameters.get("rope_type", "default")
    if kind not in ("llama3", "linear") or getattr(rotary, "attention_scaling", 1.0) != 1.0:
        raise ModelError(f"rotary embeddings of the kind {kind!r} are not written as GGUF here: llama3 and linear are")
    return plain / frequencies


class _Vocabulary:
    """The tokenizer in GGUF's words: tokens by id, their types, merges. Raises `ModelError` if it has none."""

    def __init__(self, gguf: Any, tokenizer: Any, rows: int, pre: str | None) -> None:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        content = json.loads(backend.to_str()) if backend is not None else {"model": {"type": type(tokenizer).__name__}}
        if content["model"]["type"] != "BPE" or content["model"].get("byte_fallback"):
            raise ModelError(
                "only byte-level BPE tokenizers are written as GGUF here, and this one is another "
                f"({type(tokenizer).__name__}). Export the model as safetensors and use llama.cpp's own converter"
            )
        self.tokenizer, self.pre = tokenizer, pre or _pre(content.get("pre_tokenizer"))
        self.merges = [each if isinstance(each, str) else " ".join(each) for each in content["model"]["merges"]]
        types = gguf.TokenType
        known = {number: token for token, number in tokenizer.get_vocab().items()}
        added = tokenizer.added_tokens_decoder
        self.tokens = [known.get(number, f"[PAD{number}]") for number in range(rows)]
        self.types = [
            (types.CONTROL if added[number].special else types.USER_DEFINED)
            if number in added
            else types.NORMAL
            if number in known
            else types.UNUSED
            for number in range(rows)
        ]

    def add(self, writer: Any) -> None:
        tokenizer = self.tokenizer
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.types)
        writer.add_token_merges(self.merges)
        numbers = {
            "bos": tokenizer.bos_token_id,
            "eos": tokenizer.eos_token_id,
            "pad": tokenizer.pad_token_id,
            "unk": tokenizer.unk_token_id,
            # A model that ends its turns with another token than its texts.
            "eot": min(end_tokens(tokenizer) - {tokenizer.eos_token_id}, default=None),
        }
        for what, number in numbers.items():
            if number is not None and number < len(self.tokens):
                getattr(writer, f"add_{what}_token_id")(number)
        begins = tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
        writer.add_add_bos_token(begins)
        if isinstance(tokenizer.chat_template, str):
            writer.add_chat_template(tokenizer.chat_template)


def _pre(rule: Any) -> str:
    """llama.cpp's name of a tokenizer's rule for words. Raises `ModelError` if it is not known."""
    parts = rule.get("pretokenizers", [rule]) if rule else []
    kinds = [part["type"] for part in parts]
    if kinds == ["ByteLevel"]:
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"] and parts[0]["individual_digits"]:
        return "smollm"
    if kinds == ["Split", "ByteLevel"] and (found := _SPLITS.get(parts[0]["pattern"].get("Regex", ""))):
        return found
    raise ModelError(
        "llama.cpp must be told by a name how a tokenizer cuts texts into words, and the name for this tokenizer is "
        "not known here: give it as `pre` (--pre), one that llama.cpp knows (llama-bpe, qwen2, gpt-2, ...)"
    )
