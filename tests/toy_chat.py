"""A small tokenizer with Nemotron-3's special tokens and a small template with its habits: what the data tests render with."""

from __future__ import annotations

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

SPECIAL = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
MARKS = ["<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"]  # tokens, but not special ones
CORPUS = [
    "Question: Which of the following is true? A. one B. two C. three D. four Answer: B",
    "system user assistant The weather in Paris is sunny. Let me look that up for you. Hello, how are you? I am well.",
    '<function=get_weather> <parameter=city> {"name": "get_weather", "arguments": {"city": "Paris"}}',
]

# Nemotron-3 in small: thinking marks, a generation prompt for each mode, reasoning of earlier turns dropped once a later user turn arrives.
TEMPLATE = """
{%- set thinking = enable_thinking if enable_thinking is defined else true -%}
{%- set ns = namespace(last=-1) -%}
{%- for m in messages -%}{%- if m.role == 'user' -%}{%- set ns.last = loop.index0 -%}{%- endif -%}{%- endfor -%}
{%- for tool in tools or [] -%}{{- '<tool>' ~ tool.function | tojson ~ '</tool>\\n' -}}{%- endfor -%}
{%- for m in messages -%}
{{- '<|im_start|>' ~ m.role ~ '\\n' -}}
{%- if m.role == 'assistant' -%}
{%- if m.reasoning_content and loop.index0 > ns.last -%}
{%- set body = '<think>\\n' ~ m.reasoning_content ~ '\\n</think>\\n' ~ m.content -%}
{%- else -%}
{%- set body = '<think></think>' ~ m.content -%}
{%- endif -%}
GENERATION_OPEN
{{- body -}}
{%- for call in m.tool_calls or [] -%}{{- '<tool_call>' ~ call.function.name ~ call.function.arguments | tojson ~ '</tool_call>' -}}{%- endfor -%}
{{- '<|im_end|>\\n' -}}
GENERATION_CLOSE
{%- else -%}
{{- m.content ~ '<|im_end|>\\n' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' ~ ('<think>\\n' if thinking else '<think></think>') -}}{%- endif -%}
"""
PLAIN = TEMPLATE.replace("GENERATION_OPEN\n", "").replace("GENERATION_CLOSE\n", "")
MARKED = TEMPLATE.replace("GENERATION_OPEN", "{%- generation -%}").replace("GENERATION_CLOSE", "{%- endgeneration -%}")


def toy_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE without a chat template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=420, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(CORPUS * 4, trainer)
    tokenizer.add_tokens([AddedToken(mark, normalized=False) for mark in MARKS])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="<|im_end|>", unk_token="<unk>")
