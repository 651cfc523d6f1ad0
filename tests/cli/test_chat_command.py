"""Chats at the command line: messages are indexed, asked about, and shown as turns."""

import json

import pytest

from gradsketch.cli.main import main

CHATML = (
    "{% for m in messages %}<|im_start|> {{ m['role'] }} {{ m['content'] }} <|im_end|> {% endfor %}"
    "{% if add_generation_prompt %}<|im_start|> assistant {% endif %}"
)
CHATS = [[("user", f"the capital of {x}"), ("assistant", f"it is {i}")] for i, x in enumerate("abcdefgh")]


def messages(chat):
    return [{"role": role, "content": content} for role, content in chat]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer, models, pre_tokenizers

    path = tmp_path_factory.mktemp("chat")
    special = ["[UNK]", "<|im_start|>", "<|im_end|>"]
    words = sorted({word for chat in CHATS for _, said in chat for word in said.split()} | {"user", "assistant"})
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate([*special, *words])}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]")
    made.add_special_tokens({"additional_special_tokens": special[1:]})
    made.chat_template = CHATML
    made.save_pretrained(path / "model")
    sizes = {"n_layer": 1, "n_head": 2, "n_embd": 16, "n_positions": 64, "vocab_size": len(made)}
    config = transformers.GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)
    transformers.GPT2LMHeadModel(config).save_pretrained(path / "model")
    (path / "chats.jsonl").write_text("".join(json.dumps({"messages": messages(chat)}) + "\n" for chat in CHATS))
    rows = [{"instruction": chat[0][1], "output": chat[1][1], "key": f"00{i}"} for i, chat in enumerate(CHATS)]
    (path / "alpaca.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def index(folder, name, data, *more):
    given = ["--model", str(folder / "model"), "--data", str(folder / data), "--d", "256"]
    return main(["index", str(folder / name), *given, *more])


def test_messages(folder, capsys, tmp_path):
    assert index(folder, "i", "chats.jsonl") == 0
    asked, page = json.dumps(messages(CHATS[3])), tmp_path / "why.html"
    more = ["--score", "cosine", "--k", "2", "--explain", "1", "--html", str(page), "--json"]
    capsys.readouterr()
    assert main(["query", str(folder / "i"), "--messages", asked, *more]) == 0
    hit = json.loads(capsys.readouterr().out)["queries"][0]["proponents"][0]
    assert (hit["row"], hit["text"]) == (3, "user: the capital of d\nassistant: it is 3")
    assert hit["score"] == pytest.approx(1, abs=1e-3)
    assert page.read_text().count('<b class="role"><bdi>user</bdi></b>') == 3  # the question and two hits
    (tmp_path / "asked.json").write_text(asked)
    assert main(["query", str(folder / "i"), "--messages", str(tmp_path / "asked.json"), "--k", "1"]) == 0


def test_a_format_and_columns_are_kept_for_questions(folder, capsys, tmp_path):
    assert index(folder, "bare", "alpaca.jsonl") == 1
    assert "--format alpaca" in capsys.readouterr().err
    assert index(folder, "mapped", "alpaca.jsonl", "--format", "alpaca", "--id-column", "key", "--turns", "last") == 0
    capsys.readouterr()
    given = ["--data", str(folder / "alpaca.jsonl"), "--k", "1", "--score", "cosine", "--json"]
    assert main(["query", str(folder / "mapped"), *given]) == 0
    found = json.loads(capsys.readouterr().out)["queries"]
    assert [query["proponents"][0]["id"] for query in found] == [f"00{i}" for i in range(8)]


def test_a_chat_asks_about_its_last_turn(folder, capsys):
    if not (folder / "i").exists():
        assert index(folder, "i", "chats.jsonl") == 0
    chat = messages([*CHATS[1], *CHATS[5]])
    capsys.readouterr()
    assert main(["query", str(folder / "i"), "--messages", json.dumps({"messages": chat, "tools": []}), "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)["queries"]
    alone = main(["query", str(folder / "i"), "--messages", json.dumps(chat), "--json"])
    assert alone == 0
    assert json.loads(capsys.readouterr().out)["queries"][0]["loss"] == found["loss"]
    both = json.dumps({"messages": chat}) + "\n"
    (folder / "both.jsonl").write_text(both)
    assert main(["query", str(folder / "i"), "--data", str(folder / "both.jsonl"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["queries"][0]["loss"] != found["loss"]  # of both of the answers
    assert found["example"]["completion"] == chat[-1:]
    assert found["text"].endswith("assistant: it is 5")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--messages", "[not json"], "--messages [not json"),
        (["--messages", "/nowhere.json"], "/nowhere.json"),
        (["--messages", "[]"], "--messages []"),
        (["--messages", "[7]"], "--messages [7]"),
        (["--messages", '[{"role": "user", "content": "the capital"}]'], "which end with a turn of 'user'"),
        (["--messages", '{"text": "the capital"}'], "Add what the model said"),
    ],
)
def test_questions_that_cannot_be_asked(folder, capsys, more, message):
    if not (folder / "i").exists():
        assert index(folder, "i", "chats.jsonl") == 0
    assert main(["query", str(folder / "i"), *more]) == 1
    told = capsys.readouterr().err
    assert message in told
    assert len(told.splitlines()) == 1
