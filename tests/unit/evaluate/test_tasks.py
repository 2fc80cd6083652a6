"""Each task asks with the training prompt and scores the answer: a model that knows the rows by heart is perfect, a lost one is not."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from toy_model import Parrot, ToyModel
from transformers import PreTrainedTokenizerFast

from nemotune.data.example import Example
from nemotune.data.formats import chat, glaive, medmcqa, squad
from nemotune.data.split import Document
from nemotune.data.template import Renderer
from nemotune.errors import DataError
from nemotune.evaluate import TASKS, summarize
from nemotune.evaluate.candidate import Candidate
from nemotune.evaluate.likelihood import Query, log_probs
from nemotune.evaluate.rows import HeldOut

PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}}
WEATHER = {"type": "function", "function": {"name": "get_weather", "parameters": PARAMETERS}}
CHATS = [
    {
        "messages": [
            {"role": "user", "content": "Weather in Oslo, three days?"},
            {
                "role": "assistant",
                "content": "",
                "tool_calls": [{"function": {"name": "get_weather", "arguments": {"city": "Oslo", "days": 3}}}],
            },
            {"role": "tool", "content": "rain"},
            {"role": "assistant", "content": "It rains."},
        ],
        "tools": [WEATHER],
    },
    {"messages": [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi, what city?"}], "tools": [WEATHER]},
]
GLAIVE = {
    "system": "SYSTEM: You are a helpful assistant with access to the following functions. Use them if required -\n"
    + json.dumps(WEATHER["function"]),
    "chat": 'USER: Weather in Oslo?\n\n\nASSISTANT: <functioncall> {"name": "get_weather", "arguments": \'{"city": "Oslo"}\'} <|endoftext|>\n\n\n',
}
QUESTIONS = [
    {"question": "Where is the liver?", "opa": "Arm", "opb": "Leg", "opc": "Abdomen", "opd": "Head", "cop": 2, "subject_name": "Anatomy"},
    {"question": "Which is a vitamin?", "opa": "C", "opb": "Fe", "opc": "O2", "opd": "Na", "cop": 0, "subject_name": "Biochemistry"},
]
SQUAD = [{"context": "Oslo is in Norway.", "question": "Where is Oslo?", "answers": {"text": ["Norway", "in Norway"]}}]


def tokenizer(eos_token="<|im_end|>"):
    """Bytes as tokens, and Nemotron-3's marks: `Answer:` and ` A` are several tokens each."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={letter: number for number, letter in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    backend.add_special_tokens(["<|im_start|>", "<|im_end|>", "</s>"])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=eos_token)


def held_out(rows_of, rows, renderer):
    converted = [rows_of.convert(row) for row in rows]
    examples = [Example(**{**vars(example), "meta": {"row": number, **example.meta}}) for number, example in enumerate(converted)]
    documents = [
        Document(np.array(encoded.tokens, dtype=np.int32), np.array(encoded.mask), number)
        for number, example in enumerate(examples)
        for encoded in renderer.encode(example)
    ]
    return HeldOut(examples, documents)


def ask(task, rows_of, rows, *, template="model", knows_them=True):
    """The summary and rows of a task, for a model that knows all the rows by heart or none."""
    renderer = Renderer(tokenizer(), template=template)
    held = held_out(rows_of, rows, renderer)
    documents = [document.tokens.tolist() for document in held.documents] if knows_them else []
    model = Parrot(documents, vocab_size=len(renderer.tokenizer), eos_token_id=(renderer.tokenizer.eos_token_id,))
    scored = TASKS[task](Candidate(model, renderer), held)
    return {name: entry["value"] for name, entry in summarize(scored)[task].items()}, scored


@pytest.mark.parametrize(
    ("task", "rows_of", "rows", "template", "metric"),
    [
        ("multiple_choice", medmcqa, QUESTIONS, "none", "accuracy"),
        ("multiple_choice", medmcqa, QUESTIONS, "model", "accuracy"),
        ("tool_calls", chat, CHATS, "model", "exact"),
        ("tool_calls", chat, CHATS, "chatml", "exact"),
        ("tool_calls", glaive, [GLAIVE], "model", "exact"),
        ("tool_calls", glaive, [GLAIVE], "chatml", "exact"),
        ("span_qa", squad, SQUAD, "none", "exact_match"),
        ("span_qa", squad, SQUAD, "model", "exact_match"),
    ],
)
def test_a_model_that_knows_the_rows_is_perfect_and_a_lost_one_is_not(task, rows_of, rows, template, metric):
    perfect, _ = ask(task, rows_of, rows, template=template)
    assert perfect == dict.fromkeys(perfect, pytest.approx(1.0, abs=1e-6))
    lost, _ = ask(task, rows_of, rows, template=template, knows_them=False)
    assert lost[metric] < 1


def test_tool_calls_asks_every_assistant_turn():
    _, scored = ask("tool_calls", chat, CHATS)
    assert [(row.row, row.part, row.groups["turn"]) for row in scored] == [(0, 1, "calls"), (0, 3, "answers"), (1, 1, "answers")]
    assert scored[0].expected == '{"name": "get_weather", "arguments": {"city": "Oslo", "days": 3}}'
    assert scored[1].expected == scored[1].prediction == "It rains."
    assert "get_weather" in scored[2].prompt and scored[2].prompt.endswith("<think></think>")


def test_multiple_choice_gives_each_letter_its_share_of_the_product_of_its_tokens():
    """The general path, letters of several tokens, against a model asked letter by letter."""
    renderer = Renderer(tokenizer(), template="none")
    held = held_out(medmcqa, QUESTIONS, renderer)
    model = ToyModel(vocab_size=len(renderer.tokenizer))
    scored = TASKS["multiple_choice"](Candidate(model, renderer), held)
    for example, row in zip(held.examples, scored, strict=True):
        prompt = renderer.prompt_tokens(example)
        likelihoods = []
        for letter in "ABCD":
            tokens = [*prompt, *renderer.tokenizer.encode(f" {letter}", add_special_tokens=False)]
            logits = model.logits(model(torch.tensor(tokens), torch.tensor([0, len(tokens)])))
            chosen = logits.log_softmax(-1)[:-1].gather(1, torch.tensor(tokens)[1:, None])[len(prompt) - 1 :]
            assert len(chosen) == 2
            likelihoods.append(chosen.sum().item())
        shares = torch.tensor(likelihoods).softmax(0)
        assert row.scores["answer_probability"] == pytest.approx(shares["ABCD".index(row.expected)].item(), rel=1e-5)
        assert row.prediction[0] == "ABCD"[int(shares.argmax())]
        assert row.groups == {"subject": example.meta["subject"]}


def test_single_letters_take_one_forward_of_the_prompt():
    renderer = Renderer(tokenizer(), template="model")
    held = held_out(medmcqa, QUESTIONS, renderer)
    model = ToyModel(vocab_size=len(renderer.tokenizer))
    TASKS["multiple_choice"](Candidate(model, renderer), held)
    assert model.calls == [sum(len(renderer.prompt_tokens(example)) for example in held.examples)]


def test_perplexity_is_the_token_weighted_loss_of_the_documents():
    renderer = Renderer(tokenizer())
    held = held_out(chat, CHATS, renderer)
    model = ToyModel(vocab_size=len(renderer.tokenizer))
    summary = {
        name: entry["value"] for name, entry in summarize(TASKS["perplexity"](Candidate(model, renderer), held))["perplexity"].items()
    }
    total, count = 0.0, 0
    for document in held.documents:
        tokens = torch.tensor(document.tokens, dtype=torch.long)
        losses = -model.logits(model(tokens, torch.tensor([0, len(tokens)]))).log_softmax(-1)[:-1].gather(1, tokens[1:, None])[:, 0]
        supervised = torch.tensor(document.mask[1:])
        total, count = total + losses[supervised].double().sum().item(), count + int(supervised.sum())
    assert summary["loss"] == pytest.approx(total / count, rel=1e-6)
    assert summary["perplexity"] == pytest.approx(math.exp(total / count), rel=1e-5)


@pytest.mark.parametrize("eos_token", ["</s>", "<|im_end|>"])
def test_what_ends_an_answer_is_not_part_of_it(eos_token):
    renderer = Renderer(tokenizer(eos_token), template="none")
    said = renderer.tokenizer.encode("ab", add_special_tokens=False)
    endings = {
        "stop": [renderer.tokenizer.eos_token_id],
        "spelt, then stop": [*renderer.tokenizer.encode("<|im_end|>"), renderer.tokenizer.eos_token_id],
    }
    for ending in endings.values():
        model = Parrot([[1, *said, *ending]], vocab_size=len(renderer.tokenizer), eos_token_id=())
        assert Candidate(model, renderer).answers([[1]], max_new_tokens=9, what="test") == ["ab"]


def test_span_qa_reads_the_first_line_only():
    renderer = Renderer(tokenizer(), template="none")
    held = held_out(squad, SQUAD, renderer)
    prompt = renderer.prompt_tokens(held.examples[0])
    rambling = prompt + renderer.tokenizer.encode(" Norway\nQuestion: Where", add_special_tokens=False)
    model = Parrot([rambling], vocab_size=len(renderer.tokenizer), eos_token_id=(), lost=5)
    (row,) = TASKS["span_qa"](Candidate(model, renderer), held)
    assert row.prediction == "Norway" and row.scores == {"exact_match": 1.0, "f1": 1.0}


@pytest.mark.parametrize(
    ("task", "rows_of", "rows", "message"),
    [
        ("multiple_choice", squad, SQUAD, "needs rows with options"),
        ("span_qa", medmcqa, QUESTIONS, "needs rows with answers"),
        ("tool_calls", squad, SQUAD, "needs conversations with tools"),
    ],
)
def test_rows_that_a_task_cannot_ask_are_an_error(task, rows_of, rows, message):
    with pytest.raises(DataError, match=rf"evaluate\.tasks: {task} {message}"):
        ask(task, rows_of, rows)


def test_thinking_that_leaves_no_place_for_a_letter_is_an_error():
    renderer = Renderer(tokenizer(), thinking=True)
    examples = [Example(**{**vars(medmcqa.convert(row)), "meta": {**medmcqa.convert(row).meta, "row": 0}}) for row in QUESTIONS]
    with pytest.raises(DataError, match=r"multiple_choice scores a letter right after the prompt.*set data\.thinking=false"):
        TASKS["multiple_choice"](Candidate(ToyModel(vocab_size=len(renderer.tokenizer)), renderer), HeldOut(examples, []))


@pytest.mark.parametrize("tokens_per_batch", [1, 7, 1000])
@pytest.mark.parametrize("chunk_positions", [1, 3, 256])
def test_log_probs_do_not_depend_on_the_batch(tokens_per_batch, chunk_positions):
    model = ToyModel()
    queries = [Query([5, 3, 1], [0, 2, 2], [3, 7, 8]), Query([9], [0], [1]), Query([1, 2, 3, 4, 5, 6], [5], [2])]
    answers = log_probs(model, queries, tokens_per_batch=tokens_per_batch, chunk_positions=chunk_positions)
    assert [len(answer) for answer in answers] == [3, 1, 1]
    for query, answer in zip(queries, answers, strict=True):
        logits = model.logits(model(torch.tensor(query.tokens), torch.tensor([0, len(query.tokens)])))
        expected = logits.log_softmax(-1)[query.positions, query.targets].detach().numpy()
        np.testing.assert_allclose(answer, expected, rtol=1e-5)
