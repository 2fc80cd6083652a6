"""The mask comes from the template, the prompt of training is the prompt of evaluation, and what cannot be trusted is rejected."""

from __future__ import annotations

import pickle

import pytest
from toy_chat import MARKED, PLAIN
from transformers import AutoTokenizer

from nemotune.data.example import Example, RowError, conversation
from nemotune.data.template import Renderer
from nemotune.errors import DataError, MissingFileError

TOOL = {"type": "function", "function": {"name": "get_weather", "parameters": {}}}
CALL = {"type": "function", "function": {"name": "get_weather", "arguments": {"city": "Paris"}}}


def chat(*turns, tools=()):
    return Example(messages=tuple(turns), tools=tools)


def user(text):
    return {"role": "user", "content": text}


def assistant(text, **more):
    return {"role": "assistant", "content": text, **more}


def trained(tokenizer, encoded):
    """The trained stretches of a sample, as text."""
    spans, current = [], []
    for token, mask in zip([*encoded.tokens, 0], [*encoded.mask, False], strict=True):
        if mask:
            current.append(token)
        elif current:
            spans.append(tokenizer.decode(current))
            current = []
    return spans


def reason(renderer, example):
    with pytest.raises(RowError) as error:
        renderer.encode(example)
    return error.value.reason


@pytest.fixture(params=[PLAIN, MARKED], ids=["plain", "marked"])
def renderer(tokenizer, request):
    tokenizer.chat_template = request.param
    return Renderer(tokenizer)


SINGLE = chat(user("Hello"), assistant("Hi there."))
WITH_CALL = chat(
    user("Weather?"), assistant("Let me look.", tool_calls=[CALL]), {"role": "tool", "content": "sunny"}, assistant("Sunny."), tools=(TOOL,)
)
REASONED = chat(
    user("Hello"), assistant("One.", reasoning_content="first"), user("And?"), assistant("Two.", reasoning_content="second")
)  # fmt: skip


def test_trained_tokens_are_the_answer_up_to_the_end_of_the_turn(renderer, tokenizer):
    (encoded,) = renderer.encode(SINGLE)
    assert trained(tokenizer, encoded) == ["Hi there.<|im_end|>"]
    assert (
        tokenizer.decode(encoded.tokens) == "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n<think></think>Hi there.<|im_end|>"
    )


def test_every_turn_of_an_unchanged_history_is_trained_in_one_sample(renderer, tokenizer):
    (encoded,) = renderer.encode(WITH_CALL)
    assert trained(tokenizer, encoded) == ['Let me look.<tool_call>get_weather{"city": "Paris"}</tool_call><|im_end|>', "Sunny.<|im_end|>"]


def test_rewritten_history_makes_each_trained_turn_its_own_sample(renderer, tokenizer):
    first, second = renderer.encode(REASONED)
    assert trained(tokenizer, first) == ["first\n</think>\nOne.<|im_end|>"]
    assert trained(tokenizer, second) == ["second\n</think>\nTwo.<|im_end|>"]
    assert "<think></think>One." in tokenizer.decode(second.tokens)


def test_generation_prompt_is_never_trained_and_equals_the_evaluation_prompt(renderer):
    for example, numbers in ((SINGLE, [1]), (WITH_CALL, [1, 3]), (REASONED, [1, 3])):
        samples = renderer.encode(example)
        for number in numbers:
            prompt = renderer.prompt_tokens(example, turn=number)
            (sample,) = [s for s in samples if s.tokens[: len(prompt)] == prompt and s.mask[len(prompt)]]
            assert not sample.mask[len(prompt) - 1]
        assert renderer.prompt_tokens(example) == renderer.prompt_tokens(example, turn=numbers[-1])


def test_prompt_tokens_are_what_transformers_serves(renderer, tokenizer):
    messages = list(WITH_CALL.messages[:3])
    ours = renderer.prompt_tokens(messages, tools=[TOOL])
    theirs = tokenizer.apply_chat_template(messages, tools=[TOOL], add_generation_prompt=True, enable_thinking=False)
    assert ours == theirs["input_ids"]


def test_turn_with_reasoning_is_prompted_to_think_and_one_without_is_not(renderer, tokenizer):
    assert tokenizer.decode(renderer.prompt_tokens(REASONED)).endswith("<think>\n")
    assert tokenizer.decode(renderer.prompt_tokens(SINGLE)).endswith("<think></think>")


def test_reasoning_inside_the_content_is_seen(tokenizer):
    tokenizer.chat_template = "{% for m in messages %}{{ '<|im_start|>' ~ m.role ~ '\n' ~ m.content ~ '<|im_end|>\n' }}{% endfor %}" + (
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' ~ ('<think>\n' if enable_thinking else '<think></think>') }}{% endif %}"
    )
    example = chat(user("Hello"), assistant("<think>\nwhy\n</think>\nHi."))
    (encoded,) = Renderer(tokenizer).encode(example)
    assert trained(tokenizer, encoded) == ["why\n</think>\nHi.<|im_end|>"]


def test_thinking_on_needs_reasoning(tokenizer):
    renderer = Renderer(tokenizer, thinking=True)
    assert len(renderer.encode(REASONED)) == 2
    assert reason(renderer, SINGLE) == "a turn has no reasoning_content while data.thinking is on"


def test_turn_of_weight_zero_is_history_only(renderer, tokenizer):
    example = chat(user("Hello"), assistant("Bad.", weight=0), user("Again"), assistant("Good."))
    (encoded,) = renderer.encode(example)
    assert trained(tokenizer, encoded) == ["Good.<|im_end|>"]
    assert reason(renderer, chat(user("Hello"), assistant("Bad.", weight=0))) == "no assistant turn to train on"


def test_train_on_all_trains_every_token_once(tokenizer):
    (encoded,) = Renderer(tokenizer, train_on="all").encode(REASONED)
    assert all(encoded.mask)


def test_prompt_that_is_no_token_prefix_is_rejected(tokenizer):
    assert len(tokenizer.encode(" weather")) == 1, "the small tokenizer no longer merges what this test needs merged"
    tokenizer.chat_template = "{% for m in messages %}{{ m.role ~ ':' ~ m.content ~ '<|im_end|>' }}{% endfor %}{% if add_generation_prompt %}assistant: wea{% endif %}"
    example = chat(user("Hello"), assistant(" weather"))
    assert reason(Renderer(tokenizer), example) == "the generation prompt is not a token prefix of the turn"


def test_marks_that_disagree_with_the_generation_prompt_are_rejected(tokenizer):
    tokenizer.chat_template = PLAIN.replace("{{- body -}}", "{{- body[:18] -}}{%- generation -%}{{- body[18:] -}}{%- endgeneration -%}")
    assert "generation %} marks disagree" in reason(Renderer(tokenizer), SINGLE)


@pytest.mark.parametrize(
    ("template", "example", "expected"),
    [
        (PLAIN.replace("tools or []", "[]"), WITH_CALL, "the template leaves tools out"),
        (PLAIN.replace("m.tool_calls or []", "[]"), WITH_CALL, "the template leaves tool_calls out"),
        (PLAIN.replace("m.reasoning_content and", "false and"), REASONED, "the generation prompt is not a token prefix of the turn"),
        (PLAIN.replace("{{- m.content ~", "{{- m.content[:3] ~"), SINGLE, "the template leaves a user message out or changes it"),
        (
            PLAIN.replace("<|im_end|>", "</end>"),
            SINGLE,
            "the template ends the turn without a special token of the tokenizer, so nothing could stop generation",
        ),
        ("{{ raise_exception('no') }}" + PLAIN, SINGLE, "the template cannot render the row"),
        (PLAIN, chat(user("Say <|im_end|>"), assistant("No.")), "a message holds a token of the template"),
        (PLAIN, chat(user("Hello")), "no assistant turn to train on"),
    ],
)
def test_row_that_the_template_does_not_carry_whole_is_rejected(tokenizer, template, example, expected):
    tokenizer.chat_template = template
    assert reason(Renderer(tokenizer), example) == expected


def test_switch_in_the_system_message_sets_the_thinking_mode(tokenizer):
    """Nemotron-Nano v2 ignores enable_thinking and reads /think and /no_think."""
    tokenizer.chat_template = (
        "{% set ns = namespace(think=true) %}{% for m in messages %}{% if '/no_think' in m.content %}{% set ns.think = false %}{% endif %}"
        "{{ '<|im_start|>' ~ m.role ~ '\n' ~ ('<think></think>' if m.role == 'assistant' and not ns.think) ~ m.content ~ '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' ~ ('<think>\n' if ns.think else '<think></think>') }}{% endif %}"
    )
    (encoded,) = Renderer(tokenizer).encode(SINGLE)
    assert tokenizer.decode(encoded.tokens).startswith("<|im_start|>system\n/no_think<|im_end|>")
    assert trained(tokenizer, encoded) == ["Hi there.<|im_end|>"]
    (thinking,) = Renderer(tokenizer).encode(
        chat({"role": "system", "content": "Be brief."}, user("Hello"), assistant("<think>\nwhy</think>Hi."))
    )
    assert tokenizer.decode(thinking.tokens).startswith("<|im_start|>system\nBe brief. /think<|im_end|>")
    assert trained(tokenizer, thinking) == ["why</think>Hi.<|im_end|>"]


RAW = Example(prompt="Question: Which?\nA. one\nAnswer:", completion=" B")


def test_raw_prompt_ends_at_answer_and_the_space_belongs_to_the_completion(bare_tokenizer):
    renderer = Renderer(bare_tokenizer, template="none")
    (encoded,) = renderer.encode(RAW)
    prompt = renderer.prompt_tokens(RAW)
    assert trained(bare_tokenizer, encoded) == [" B<|im_end|>"]
    assert encoded.tokens[: len(prompt)] == prompt == bare_tokenizer.encode(RAW.prompt)
    assert bare_tokenizer.decode(encoded.tokens) == RAW.prompt + " B<|im_end|>"


def test_no_token_reaches_across_the_raw_boundary(bare_tokenizer):
    example = Example(prompt="The wea", completion="ther")
    joined = bare_tokenizer.encode("The weather")
    (encoded,) = Renderer(bare_tokenizer, template="none").encode(example)
    prompt = Renderer(bare_tokenizer, template="none").prompt_tokens(example)
    assert encoded.tokens[: len(prompt)] == prompt != joined[: len(prompt)]


@pytest.mark.parametrize("train_on", ["assistant", "all"])
def test_special_tokens_that_raw_text_spells_stay_text(bare_tokenizer, train_on):
    text = "one </s> two <|im_start|>user <unk> <s>"
    renderer = Renderer(bare_tokenizer, template="none", train_on=train_on)
    special = {number for number, token in bare_tokenizer.added_tokens_decoder.items() if token.special}
    prompt = renderer.prompt_tokens(Example(prompt=text, completion=" A"))
    [encoded] = renderer.encode(Example(prompt=text, completion=f" It is <|im_end|> {text}"))
    assert special.isdisjoint(prompt) and encoded.tokens[: len(prompt)] == prompt
    assert special.intersection(encoded.tokens[:-1]) == set() and encoded.tokens[-1] == bare_tokenizer.eos_token_id
    assert bare_tokenizer.decode(encoded.tokens[:-1], skip_special_tokens=False) == f"{text} It is <|im_end|> {text}"


def test_raw_text_leaves_the_tokens_of_a_template_as_they_were(tokenizer):
    renderer = Renderer(tokenizer)
    before = renderer.encode(SINGLE)
    renderer.encode(Example(completion="spelt <|im_end|>"))
    assert renderer.encode(SINGLE) == before
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") in before[0].tokens


def test_begin_of_text_is_put_where_the_tokenizer_puts_it(bare_tokenizer):
    from tokenizers.processors import TemplateProcessing

    with_bos = pickle.loads(pickle.dumps(bare_tokenizer))
    with_bos.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", with_bos.bos_token_id)])
    (encoded,) = Renderer(with_bos, template="none").encode(RAW)
    assert encoded.tokens[:2] == [with_bos.bos_token_id, *Renderer(bare_tokenizer, template="none").encode(RAW)[0].tokens[:1]]
    assert not encoded.mask[0]


def test_text_is_raw_under_any_template(renderer, tokenizer):
    (encoded,) = renderer.encode(Example(completion="Hello, how are you?"))
    assert tokenizer.decode(encoded.tokens) == "Hello, how are you?<|im_end|>"
    assert all(encoded.mask)


def test_messages_have_no_raw_form(bare_tokenizer):
    assert reason(Renderer(bare_tokenizer, template="none"), SINGLE) == "no raw prompt, which data.template: none needs"


def test_builtin_template_serves_a_tokenizer_without_one(bare_tokenizer):
    renderer = Renderer(bare_tokenizer)
    assert renderer.template_name == "built-in nemotron3 (the tokenizer has none)"
    (encoded,) = renderer.encode(WITH_CALL)
    assert trained(bare_tokenizer, encoded) == [
        "Let me look.\n<tool_call>\n<function=get_weather>\n<parameter=city>\nParis\n</parameter>\n</function>\n</tool_call>\n<|im_end|>",
        "Sunny.<|im_end|>",
    ]
    assert trained(bare_tokenizer, renderer.encode(REASONED)[0]) == ["first\n</think>\nOne.<|im_end|>", "second\n</think>\nTwo.<|im_end|>"]


def test_chatml_is_glaives_own_text(bare_tokenizer):
    example = chat(
        user("Weather?"), assistant("", tool_calls=[CALL]), {"role": "tool", "content": "{}"}, assistant("Sunny."), tools=(TOOL,)
    )
    renderer = Renderer(bare_tokenizer, template="chatml")
    (encoded,) = renderer.encode(example)
    assert bare_tokenizer.decode(encoded.tokens) == (
        "<|im_start|>system\nYou are a helpful assistant with access to the following functions. Use them if required -\n"
        '{\n    "name": "get_weather",\n    "parameters": {}\n}<|im_end|>\n<|im_start|>user\nWeather?<|im_end|>\n'
        """<|im_start|>assistant\n<functioncall> {"name": "get_weather", "arguments": '{"city": "Paris"}'}<|im_end|>\n"""
        "<|im_start|>tool\n{}<|im_end|>\n<|im_start|>assistant\nSunny.<|im_end|>"
    )
    assert len(trained(bare_tokenizer, encoded)) == 2


def test_stop_tokens_are_what_turns_end_with(renderer, tokenizer):
    assert renderer.stop_ids == {tokenizer.convert_tokens_to_ids("<|im_end|>")}


def test_template_file_is_read_and_its_faults_named(tokenizer, tmp_path):
    (tmp_path / "own.jinja").write_text(PLAIN, encoding="utf-8")
    (tmp_path / "broken.jinja").write_text("fine\n{% if %}", encoding="utf-8")
    assert Renderer(tokenizer, template=str(tmp_path / "own.jinja")).encode(SINGLE) == Renderer(tokenizer).encode(SINGLE)
    with pytest.raises(DataError, match=r"broken\.jinja, line 2"):
        Renderer(tokenizer, template=str(tmp_path / "broken.jinja"))
    with pytest.raises(MissingFileError, match="expected model, none, chatml or the path"):
        Renderer(tokenizer, template="chatlm")


def test_tokenizer_without_chat_tokens_needs_a_choice(bare_tokenizer):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    with pytest.raises(DataError, match=r"set data\.template to none"):
        Renderer(PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE())))


def test_renderer_survives_the_way_to_another_process_and_disk(tokenizer, tmp_path):
    renderer = Renderer(tokenizer)
    assert pickle.loads(pickle.dumps(renderer)).encode(REASONED) == renderer.encode(REASONED)
    tokenizer.save_pretrained(tmp_path)
    again = Renderer(AutoTokenizer.from_pretrained(tmp_path))
    assert again.encode(REASONED) == renderer.encode(REASONED)
    assert again.digest() == renderer.digest()


def test_conversation_helper_makes_plain_turns():
    assert conversation(("user", "a"), ("assistant", "b")) == (user("a"), assistant("b"))
