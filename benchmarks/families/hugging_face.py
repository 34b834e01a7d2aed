"""The family ``hugging_face``: models of transformers, whole, by ``attn_implementation``: ours, "sdpa" and "eager".

The models are small and their weights random; nothing is fetched. Every second text has padding, unless the case says
otherwise. Dropout is off, so that there is one right result.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.cases import Case
from benchmarks.variants import Family, Refused, Step, Variant

HEADS, LAYERS, VOCABULARY = 8, 2, 1024
WINDOW = 64
# So much padding a text has. It is less than a window, so that no row sees padding alone: "eager" makes NaN of such a
# row in float64, where it is to be the truth.
PADDING = 48


@dataclasses.dataclass(frozen=True)
class ModelCase(Case):
    """One model and a batch for it. ``backward`` is a training step: the loss, and all gradients of the parameters.

    Attributes:
        model: a key of :func:`models`.
        batch: texts or images.
        seqlen: tokens of a text; images have as many patches as their model's size says.
        padded: whether every second text lacks its last tokens.
        hidden: size of the hidden state; images are a fourth as wide, in patches of 8.
    """

    model: str
    batch: int = 2
    seqlen: int = 256
    padded: bool = True
    hidden: int = 512

    @property
    def name(self) -> str:
        """As in ``hugging_face-llama-b2-l256-train-padded-float32``."""
        parts = [self.family, self.model, f"b{self.batch}", f"l{self.seqlen}", "train" if self.backward else "eval"]
        return "-".join([*parts, *(["padded"] if self.padded else []), self.dtype_name])

    def tiny(self) -> ModelCase:
        return dataclasses.replace(self, batch=2, seqlen=8, hidden=64)


# ---------------------------------------------------------------------------------------------------------- the models

Inputs = dict[str, Tensor]


@dataclasses.dataclass(frozen=True)
class Model:
    """A model of transformers.

    Attributes:
        architecture: its class.
        configuration: the class of its configuration.
        sizes: the configuration's arguments.
        inputs: what its forward is called with, for a case.
        sdpa_cannot: why "sdpa" does not compute it.
    """

    architecture: str
    configuration: str
    sizes: dict[str, Any]
    inputs: Callable[[ModelCase], Inputs]
    sdpa_cannot: str | None = None


def _ids(case: ModelCase, offset: int = 0) -> Tensor:
    shape, generator = (case.batch, case.seqlen), case.generator(offset)
    return torch.randint(8, VOCABULARY, shape, generator=generator, device=case.device)


def _text(case: ModelCase) -> Inputs:
    ids = _ids(case)
    if not case.padded:
        return {"input_ids": ids, "labels": ids}
    mask = torch.ones_like(ids)
    mask[1::2, case.seqlen - min(PADDING, case.seqlen // 2) :] = 0
    return {"input_ids": ids, "labels": ids.masked_fill(mask == 0, -100), "attention_mask": mask}


def _text_and_target(case: ModelCase) -> Inputs:
    return _text(case) | {"labels": _ids(case, 1)}


def _image(case: ModelCase) -> Inputs:
    return {
        "pixel_values": case.draw(
            case.batch, 3, case.hidden // 4, case.hidden // 4, dtype=case.dtype, generator=case.generator()
        )
    }


def _image_and_text(case: ModelCase) -> Inputs:
    inputs = _image(case) | _text(case)
    inputs.pop("labels")
    inputs["input_ids"][:, -1] = VOCABULARY - 1
    return inputs


def _sound(case: ModelCase) -> Inputs:
    frames = case.draw(case.batch, 80, 2 * case.seqlen, dtype=case.dtype, generator=case.generator())
    return {"input_features": frames, "labels": _ids(case)}


def _wave(case: ModelCase) -> Inputs:
    wave = case.draw(case.batch, 320 * case.seqlen, dtype=case.dtype, generator=case.generator())
    return {"input_values": wave, "labels": _ids(case)[:, : case.seqlen // 8]}


@functools.cache
def models(hidden: int) -> dict[str, Model]:
    """Every model by name, with hidden states of this size."""
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    encoder: dict[str, Any] = tokens | {
        "vocab_size": VOCABULARY,
        "hidden_size": hidden,
        "intermediate_size": 4 * hidden,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "max_position_embeddings": 2048,
    }
    decoder = encoder | {"num_key_value_heads": 2, "head_dim": hidden // HEADS}
    sliding = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
    t5 = tokens | {
        "vocab_size": VOCABULARY,
        "d_model": hidden,
        "d_kv": hidden // HEADS,
        "d_ff": 4 * hidden,
        "num_layers": LAYERS,
        "num_heads": HEADS,
        "decoder_start_token_id": 1,
    }
    vision: dict[str, Any] = {
        "hidden_size": hidden,
        "intermediate_size": 4 * hidden,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "image_size": hidden // 4,
        "patch_size": 8,
    }
    text_of_two = {key: value for key, value in encoder.items() if key not in tokens} | {"eos_token_id": VOCABULARY - 1}

    return {
        "llama": Model("LlamaForCausalLM", "LlamaConfig", decoder, _text),
        "mistral": Model("MistralForCausalLM", "MistralConfig", decoder | {"sliding_window": WINDOW}, _text),
        "qwen3": Model("Qwen3ForCausalLM", "Qwen3Config", decoder, _text),
        "phi3": Model("Phi3ForCausalLM", "Phi3Config", decoder, _text),
        "gemma2": Model(
            "Gemma2ForCausalLM", "Gemma2Config", decoder | sliding, _text, sdpa_cannot='"sdpa" has no softcap'
        ),
        "gemma3": Model("Gemma3ForCausalLM", "Gemma3TextConfig", decoder | sliding, _text),
        "gpt_oss": Model(
            "GptOssForCausalLM",
            "GptOssConfig",
            decoder
            | sliding
            | {"num_local_experts": 4, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
            _text,
            sdpa_cannot='"sdpa" has no sinks',
        ),
        "gpt2": Model(
            "GPT2LMHeadModel",
            "GPT2Config",
            tokens | {"vocab_size": VOCABULARY, "n_embd": hidden, "n_layer": LAYERS, "n_head": HEADS},
            _text,
        ),
        "gpt_neox": Model("GPTNeoXForCausalLM", "GPTNeoXConfig", encoder, _text),
        "deepseek_v3": Model(
            "DeepseekV3ForCausalLM",
            "DeepseekV3Config",
            encoder
            | {"num_key_value_heads": HEADS, "kv_lora_rank": 128, "q_lora_rank": 256, "first_k_dense_replace": LAYERS},
            _text,
        ),
        "bert": Model("BertForMaskedLM", "BertConfig", encoder, _text),
        "roberta": Model("RobertaForMaskedLM", "RobertaConfig", encoder, _text),
        "modernbert": Model(
            "ModernBertForMaskedLM", "ModernBertConfig", encoder | {"cls_token_id": 1, "sep_token_id": 2}, _text
        ),
        "t5": Model("T5ForConditionalGeneration", "T5Config", t5, _text_and_target),
        "mt5": Model("MT5ForConditionalGeneration", "MT5Config", t5, _text_and_target),
        "vit": Model("ViTForImageClassification", "ViTConfig", vision, _image),
        "dinov2": Model("Dinov2Model", "Dinov2Config", vision, _image),
        "clip": Model(
            "CLIPModel", "CLIPConfig", {"text_config": text_of_two, "vision_config": vision}, _image_and_text
        ),
        "siglip": Model(
            "SiglipModel",
            "SiglipConfig",
            {"text_config": text_of_two | {"projection_size": hidden}, "vision_config": vision},
            _image_and_text,
        ),
        "whisper": Model(
            "WhisperForConditionalGeneration",
            "WhisperConfig",
            tokens
            | {
                "vocab_size": VOCABULARY,
                "d_model": hidden,
                "encoder_layers": LAYERS,
                "decoder_layers": LAYERS,
                "encoder_attention_heads": HEADS,
                "decoder_attention_heads": HEADS,
                "encoder_ffn_dim": 4 * hidden,
                "decoder_ffn_dim": 4 * hidden,
                "max_source_positions": 256,
                "decoder_start_token_id": 1,
            },
            _sound,
        ),
        "wav2vec2": Model(
            "Wav2Vec2ForCTC",
            "Wav2Vec2Config",
            {key: value for key, value in encoder.items() if key != "max_position_embeddings"}
            | {"apply_spec_augment": False, "conv_dim": (64,) * 7, "ctc_zero_infinity": True},
            _wave,
        ),
    }


# Those whose inputs are of one size, without padding.
_UNPADDED = (_image, _sound, _wave)


# ----------------------------------------------------------------------------------------------------------- the steps


def _build(implementation: str) -> Callable[[ModelCase, torch.dtype], Step]:
    def build(case: ModelCase, dtype: torch.dtype) -> Step:
        model, inputs = _model(case, implementation, dtype), _inputs(case, dtype)
        kept = (
            inputs.get("attention_mask")
            if "decoder_start_token_id" not in models(case.hidden)[case.model].sizes
            else None
        )

        def shown(output: Any) -> Tensor:
            """What the model computes, as one tensor; what it says about padding is nobody's concern."""
            if "text_embeds" in output:
                return torch.cat([output["text_embeds"], output["image_embeds"]])
            found = output["logits"] if "logits" in output else output["last_hidden_state"]
            fits = kept is not None and found.dim() == 3 and found.shape[:2] == kept.shape
            return found * kept[..., None] if fits and kept is not None else found

        def evaluate() -> tuple[Tensor, ...]:
            with torch.no_grad():
                return (shown(model(**inputs)),)

        def train() -> tuple[Tensor, ...]:
            model.zero_grad()
            output = model(**inputs)
            loss = output.loss if output.get("loss") is not None else shown(output)[..., ::2].sum()
            loss.backward()
            return tuple(p.grad for p in model.parameters() if p.grad is not None)

        return train if case.backward else evaluate

    return build


def _definition(case: ModelCase, dtype: torch.dtype) -> Step:
    step = _build("eager")(case, dtype)
    return lambda: _comparable(case, step())


def _comparable(case: ModelCase, results: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """All gradients as one vector: of some parameters, such as the biases of keys, the true gradient is 0, and nothing
    but rounding is left of it."""
    return (torch.cat([t.flatten() for t in results]),) if case.backward else results


def _allowance(case: ModelCase, result: Tensor) -> float:
    """A gradient of a parameter sums the tokens, as in :func:`benchmarks.families.module.allowance`."""
    return torch.finfo(torch.float32).eps * (case.batch * case.seqlen / 24) ** 0.5 if case.backward else 0.0


@functools.cache
def _registered() -> None:
    """Make the name known, once for all models."""
    import fastattn.integrations.transformers

    fastattn.integrations.transformers.register()


def _model(case: ModelCase, implementation: str, dtype: torch.dtype) -> Any:
    import transformers

    _registered()
    entry = models(case.hidden)[case.model]
    config = getattr(transformers, entry.configuration)(**entry.sizes)
    for name in vars(config):
        if "dropout" in name or "pdrop" in name or name == "layerdrop":
            setattr(config, name, 0.0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(case.seed)
        try:
            model = getattr(transformers, entry.architecture)._from_config(config, attn_implementation=implementation)
        except ValueError as error:
            raise Refused(str(error).partition(". ")[0]) from error
    if dtype == torch.float64 and hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # torch's product of groups knows no float64
    return model.to(case.device, dtype).train(case.backward)


def _inputs(case: ModelCase, dtype: torch.dtype) -> Inputs:
    inputs = models(case.hidden)[case.model].inputs(case)
    return {key: t.to(dtype) if t.is_floating_point() else t for key, t in inputs.items()}


def _applies(case: ModelCase) -> str | None:
    return None if importlib.util.find_spec("transformers") is not None else "transformers is not installed"


def _sdpa_applies(case: ModelCase) -> str | None:
    return _applies(case) or models(case.hidden)[case.model].sdpa_cannot


FAMILY = Family(
    "hugging_face",
    (
        Variant("fastattn", _build("fastattn"), _applies),
        Variant("sdpa", _build("sdpa"), _sdpa_applies),
        Variant("eager", _build("eager"), _applies),
    ),
    peer="sdpa",
    reference=_definition,
    comparable=_comparable,
    allowance=_allowance,
)


def quick_cases() -> list[ModelCase]:
    """None: the models alone take longer to build than a quick run may."""
    return []


def more_cases() -> list[ModelCase]:
    """Every model, and two that train on longer texts, where memory is what counts."""
    cases = [
        ModelCase("hugging_face", name, backward=backward, padded=model.inputs not in _UNPADDED)
        for name, model in models(ModelCase.hidden).items()
        for backward in (False, True)
    ]
    return [*cases, *(ModelCase("hugging_face", name, 1, 1024, backward=True) for name in ("t5", "gemma2"))]
