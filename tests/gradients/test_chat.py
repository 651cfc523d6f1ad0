"""Conversations under a tokenizer's chat template: its very tokens, and those of the assistant's turns that count."""

import json

import pytest
import torch

import gradsketch as gs
from gradsketch.errors import InputError
from gradsketch.gradients.tasks.conversations import conversation_of, transcript
from unchecked import errors_of

transformers = pytest.importorskip("transformers")

SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"]
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
    "{% else %} {{ m['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
)
MARKED = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}{% generation %}"
    "{{ m['content'] }}<|im_end|>{% endgeneration %}{% else %}{{ m['content'] }}<|im_end|>{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Thinking stays in the last turn alone, as Qwen3's template has it.
FORGETFUL = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' and not loop.last %}"
    "{{ m['content'].split('</think>')[-1] }}{% else %}{{ m['content'] }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TOOLS = (
    "{% if tools %}<|im_start|>system\n{% for t in tools %}{{ t['function']['name'] }} {% endfor %}<|im_end|>\n"
    "{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] or '' }}{% for c in m['tool_calls'] or [] %}"
    "<call>{{ c['function']['name'] }}</call>{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEMPLATES = {"chatml": CHATML, "llama": LLAMA, "marked": MARKED}
MESSAGES = [
    {"role": "user", "content": "What is the capital of Ruritania?"},
    {"role": "assistant", "content": "Strelsau, älter als Zenda 🗼."},
    {"role": "user", "content": "And of Zubrowka?"},
    {"role": "assistant", "content": "Lutz."},
]


@pytest.fixture(scope="module")
def bare_tokenizer():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    core = Tokenizer(models.BPE())
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator([m["content"] for m in MESSAGES], trainer)
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return core


@pytest.fixture
def tokenizer(bare_tokenizer):
    made = transformers.PreTrainedTokenizerFast(tokenizer_object=bare_tokenizer, bos_token="<s>", eos_token="</s>")
    made.add_special_tokens({"additional_special_tokens": SPECIAL[2:]})
    made.chat_template = CHATML
    return made


def counted(task, row):
    """Return the texts of the stretches of tokens that count, and all ids."""
    encoded = task.encode(row)
    ids, labels = (encoded.sequences[name].tolist() for name in ("input_ids", "labels"))
    assert all(label in (-100, i) for i, label in zip(ids, labels, strict=True))
    stretches, now = [], []
    for i, label in [*zip(ids, labels, strict=True), (0, -100)]:
        if label != -100:
            now.append(i)
        elif now:
            stretches.append(task.tokenizer.decode(now))
            now = []
    return stretches, ids


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_tokens_of_the_template_and_what_the_assistant_says(tokenizer, name):
    tokenizer.chat_template = TEMPLATES[name]
    found, ids = counted(gs.CausalLM(tokenizer), {"messages": MESSAGES})
    end = "</s>" if name == "llama" else "<|im_end|>"
    said = [f"{turn['content']}{end}" for turn in MESSAGES[1::2]]
    assert [text.strip() if name == "llama" else text for text in found] == said
    expected = tokenizer.apply_chat_template(MESSAGES, tokenize=True)
    assert ids == list(expected if isinstance(expected, list) else expected["input_ids"])
    assert ids.count(0) == (name == "llama")  # one <s> where the template writes it, and none where it does not
    last, _ = counted(gs.CausalLM(tokenizer, turns="last"), {"messages": MESSAGES})
    assert last == found[-1:]


def test_prompt_and_completion_as_turns(tokenizer):
    task = gs.CausalLM(tokenizer)
    whole = task.encode({"messages": MESSAGES}).sequences["input_ids"].tolist()
    for answer in ("completion", "answer"):
        found, ids = counted(task, {"prompt": MESSAGES[:3], answer: MESSAGES[3:]})
        assert found == ["Lutz.<|im_end|>"]
        assert ids == whole


def test_a_turn_that_the_template_changes_later(tokenizer):
    tokenizer.chat_template = FORGETFUL
    thinking = [dict(turn) for turn in MESSAGES]
    thinking[1]["content"] = "<think>old names</think>Strelsau."
    thinking[3]["content"] = "<think>new names</think>Lutz."
    found, _ = counted(gs.CausalLM(tokenizer, turns="last"), {"messages": thinking})
    assert found == ["<think>new names</think>Lutz.<|im_end|>"]
    found, _ = counted(gs.CausalLM(tokenizer), {"messages": thinking})
    assert found == ["Strelsau.<|im_end|>", "<think>new names</think>Lutz.<|im_end|>"]  # what the model is shown


def test_a_turn_that_stands_nowhere_provably_is_refused(tokenizer):
    tokenizer.chat_template = CHATML.replace("<|im_end|>", "{{ '<|im_end|>' if loop.last else '' }}")
    with pytest.raises(InputError, match=r"turn 2 of a conversation.*--turns last"):
        gs.CausalLM(tokenizer).encode({"messages": MESSAGES})
    assert counted(gs.CausalLM(tokenizer, turns="last"), {"messages": MESSAGES})[0] == ["Lutz.<|im_end|>"]


def test_tools(tokenizer):
    tokenizer.chat_template = TOOLS
    tools = [{"type": "function", "function": {"name": "lookup", "parameters": {}}}]
    turns = [
        MESSAGES[0],
        {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "lookup", "arguments": {}}}]},
        {"role": "tool", "content": "Strelsau"},
        {"role": "assistant", "content": "Strelsau.", "tool_calls": None},
    ]
    for given in (tools, json.dumps(tools)):
        found, ids = counted(gs.CausalLM(tokenizer), {"messages": turns, "tools": given})
        assert found == ["<call>lookup</call><|im_end|>", "Strelsau.<|im_end|>"]
        assert tokenizer.decode(ids).startswith("<|im_start|>system\nlookup ")


def test_parts_of_text(tokenizer):
    parts = [{"type": "text", "text": "And of "}, {"type": "text", "text": "Zubrowka?"}]
    turns = [{"role": "user", "content": parts}, MESSAGES[3]]
    task = gs.CausalLM(tokenizer)
    plain = [{"role": "user", "content": "And of Zubrowka?"}, MESSAGES[3]]
    assert counted(task, {"messages": turns}) == counted(task, {"messages": plain})
    with pytest.raises(InputError, match="turn 1 of messages with a part of type image"):
        task.encode({"messages": [{"role": "user", "content": [{"type": "image"}]}, MESSAGES[3]]})


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": []}, "messages with no turn"),
        ({"messages": "Hi"}, "messages with str"),
        ({"messages": MESSAGES[:1]}, "a turn of the assistant"),
        ({"messages": [{"content": "Hi"}]}, "turn 1 of messages with the fields content"),
        ({"messages": [{"from": "human", "value": "Hi"}]}, "--format sharegpt"),
        ({"messages": [{"role": "user", "content": 7}, MESSAGES[1]]}, "content of type int"),
        ({"messages": MESSAGES, "text": "Hi"}, "a row with messages and text"),
        ({"messages": MESSAGES, "tools": "no JSON"}, "tools 'no JSON'"),
        ({"prompt": MESSAGES[:1], "completion": "Lutz"}, "a prompt of turns without a completion of turns"),
        ({"conversations": [{"from": "human", "value": "Hi"}]}, "looks like the format sharegpt"),
        ({"instruction": "Say hi", "output": "Hi"}, "looks like the format alpaca"),
    ],
)
def test_rows_that_are_refused(tokenizer, row, message):
    with pytest.raises(InputError, match=message):
        gs.CausalLM(tokenizer).encode(row)


def test_what_a_tokenizer_lacks(tokenizer):
    tokenizer.chat_template = None
    with pytest.raises(InputError, match="no chat template"):
        gs.CausalLM(tokenizer).encode({"messages": MESSAGES})
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(InputError, match=r"the chat template refuses .*roles must alternate"):
        gs.CausalLM(tokenizer).encode({"messages": MESSAGES})
    tokenizer.chat_template = CHATML
    with pytest.raises(InputError, match="without a token of the assistant that counts"):
        gs.CausalLM(tokenizer, max_length=10).encode({"messages": MESSAGES})
    [told] = errors_of(["gs.CausalLM(turns='first')"])
    assert told.startswith("InputError: turns='first'")


def test_the_template_and_the_turns_are_part_of_the_task(tokenizer):
    first = gs.CausalLM(tokenizer).options()
    assert gs.CausalLM(tokenizer, turns="last").options() != first
    tokenizer.chat_template = MARKED
    assert gs.CausalLM(tokenizer).options() != first


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_conversation_is_cut_on_the_side_of_the_tokenizer(tokenizer, name):
    tokenizer.chat_template, row = TEMPLATES[name], {"messages": MESSAGES}
    whole = {key: value.tolist() for key, value in gs.CausalLM(tokenizer).encode(row).sequences.items()}
    digests = []
    for side, kept in (("right", slice(40)), ("left", slice(-40, None))):
        tokenizer.truncation_side = side
        task = gs.CausalLM(tokenizer, max_length=40)
        digests.append(task.options())
        cut = task.encode(row).sequences
        assert cut["input_ids"].tolist() == whole["input_ids"][kept] != whole["input_ids"]
        assert cut["labels"].tolist()[1:] == whole["labels"][kept][1:]
        assert sum(piece.tokens for piece in task.pieces(row)) == 40
        assert "".join(piece.text for piece in task.pieces(row)) == transcript(MESSAGES)[0]
        assert (task.pieces(row)[0].tokens == 0) == (side == "left")
    assert digests[0] != digests[1]


def test_pieces_join_to_the_transcript(tokenizer):
    task = gs.CausalLM(tokenizer)
    for name, template in TEMPLATES.items():
        tokenizer.chat_template = template
        text, turns = transcript(conversation_of({"messages": MESSAGES}).messages)
        pieces = task.pieces({"messages": MESSAGES})
        assert "".join(piece.text for piece in pieces) == text, name
        assert [text[t.start : t.start + len(t.text)] for t in turns] == [m["content"] for m in MESSAGES]
        assert sum(piece.tokens for piece in pieces) == len(task.encode({"messages": MESSAGES}).sequences["input_ids"])


class TestMappedRows:
    def test_columns(self):
        rows = [{"q": "Why?", "a": " So.", "key": 7, "text": "a note"}]
        columns = {"prompt": "q", "answer": "a", "id": "key"}
        assert gs.mapped_rows(rows, columns=columns)[0] == {
            "prompt": "Why?", "answer": " So.", "id": 7, "text_column": "a note",
        }  # fmt: skip

    def test_formats(self):
        alpaca = gs.mapped_rows([{"instruction": "Add.", "input": "1 2", "output": "3", "n": 1}], format="alpaca")[0]
        assert alpaca == {
            "n": 1,
            "messages": [{"role": "user", "content": "Add.\n\n1 2"}, {"role": "assistant", "content": "3"}],
        }
        turns = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]
        sharegpt = gs.mapped_rows([{"conversations": turns, "system": "Be brief."}], format="sharegpt")[0]
        assert [turn["role"] for turn in sharegpt["messages"]] == ["system", "user", "assistant"]

    @pytest.mark.parametrize(
        ("rows", "options", "message"),
        [
            ([{"q": "a"}], {"columns": {"text": "body"}}, "no column 'body', which was to be the text.*one of q"),
            ([{"q": "a"}], {"columns": {"title": "q"}}, "columns with 'title'"),
            ([{"q": "a"}], {"format": "xml"}, "format with 'xml'"),
            ([{"q": "a", "text": "b"}], {"columns": {"text": "q"}}, "the columns q and text"),
            ([{"q": 7}], {"columns": {"text": "q"}}, "the text 7, a number"),
            ([{"instruction": "a"}], {"format": "alpaca"}, "output as a text"),
            ([{"conversations": [{"from": "bot", "value": "a"}]}], {"format": "sharegpt"}, "a turn from 'bot'"),
        ],
    )
    def test_what_is_refused(self, rows, options, message):
        with pytest.raises(InputError, match=message):
            list(gs.mapped_rows(rows, **options))

    def test_a_bad_row_is_one_row_of_an_index(self, tmp_path, tokenizer):
        data = tmp_path / "chat.jsonl"
        rows = [{"instruction": "Say hi", "output": f"Hi {i}"} for i in range(6)]
        rows[2] = {"instruction": "Say hi"}
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        config = transformers.GPT2Config(
            n_layer=1, n_head=2, n_embd=16, n_positions=128, vocab_size=len(tokenizer), bos_token_id=0, eos_token_id=1
        )
        torch.manual_seed(0)
        model, task = transformers.GPT2LMHeadModel(config).eval(), gs.CausalLM(tokenizer)
        mapped = gs.mapped_rows(data, format="alpaca")
        with pytest.raises(InputError, match=r"1 of 6 rows .*chat\.jsonl, line 3"):
            gs.build_index(tmp_path / "a", model, task, mapped, d=64, progress=False)
        index = gs.build_index(tmp_path / "b", model, task, mapped, d=64, skip_bad=True, progress=False)
        assert list(index.left_out) == [2]
        hits = index.query(model, [mapped[4]], k=1, score="cosine")
        assert hits[0][0].row == 4
        assert hits[0][0].text == "user: Say hi\nassistant: Hi 4"
        explained = index.explain(model, hits, top=1)[0][0]
        assert "".join(token.token for token in explained.tokens) == explained.text
        assert sum(t.value for t in explained.tokens) + explained.beyond_tokens == pytest.approx(
            explained.score, rel=1e-3
        )
        page = hits.to_html(tmp_path / "why.html").read_text(encoding="utf-8")
        assert page.count('<b class="role"><bdi>assistant</bdi></b>') == 2  # of the question, and of the hit
        assert "user: Say hi" not in page.split("<main")[1]


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize(("field", "yes", "no"), [("weight", 1, 0), ("train", True, False), ("training", True, False)])
def test_a_turn_of_no_weight_does_not_count(tokenizer, name, field, yes, no):
    tokenizer.chat_template = TEMPLATES[name]
    task, plain = gs.CausalLM(tokenizer), [dict(turn) for turn in MESSAGES]
    both, ids = counted(task, {"messages": plain})
    for first, second, expected in ((no, yes, both[1:]), (yes, no, both[:1]), (None, None, both)):
        weighed = [dict(turn) for turn in MESSAGES]
        weighed[0][field], weighed[1][field], weighed[3][field] = no, first, second
        assert counted(task, {"messages": weighed}) == (expected, ids)
    with pytest.raises(InputError, match="all the weight 0"):
        task.encode({"messages": [plain[0], {**plain[1], field: no}]})
    with pytest.raises(InputError, match=f"turn 2 of a conversation with {field} 0.5"):
        task.encode({"messages": [plain[0], {**plain[1], field: 0.5}]})


def test_weights_of_sharegpt_count(tokenizer):
    turns = [{"from": "human" if i % 2 == 0 else "gpt", "value": t["content"]} for i, t in enumerate(MESSAGES)]
    turns[1]["weight"], turns[3]["weight"] = 0, 1
    (row,) = gs.mapped_rows([{"conversations": turns}], format="sharegpt")
    assert counted(gs.CausalLM(tokenizer), row)[0] == ["Lutz.<|im_end|>"]


# Some of the first templates of Llama 3 and of Vicuna, which write the prompt for generation whether asked for or not.
ALWAYS = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n\n{{ m['content'] | trim }}<|im_end|>{% endfor %}"
    "{{ '<|im_start|>assistant\n\n' }}",
    "{% for m in messages %}{{ m['role'] | upper }}: {{ m['content'] }}\n{% endfor %}ASSISTANT: ",
    "{% for m in messages %}{{ m['role'] | upper }}: {{ m['content'] }}</s>\n{% endfor %}ASSISTANT:",
)


@pytest.mark.parametrize("template", ALWAYS)
@pytest.mark.parametrize("turns", ["all", "last"])
def test_a_prompt_for_generation_that_is_always_written_is_no_answer(tokenizer, template, turns):
    tokenizer.chat_template = template
    for messages in (MESSAGES, MESSAGES[:2]):
        with pytest.raises(InputError, match="of a conversation, which the chat template writes otherwise"):
            gs.CausalLM(tokenizer, turns=turns).encode({"messages": messages})


def test_turns_that_end_alike_are_none_of_these(tokenizer):
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }} ### End\n{% endfor %}"
    found, _ = counted(gs.CausalLM(tokenizer), {"messages": MESSAGES})
    assert [text.strip() for text in found] == [f"{turn['content']} ### End" for turn in MESSAGES[1::2]]
