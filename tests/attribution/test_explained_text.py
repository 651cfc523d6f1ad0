"""Pieces of an explained hit join to its text under every family of tokenizers; scores stand at predictions."""

import pytest
import torch

import gradsketch as gs
from gradsketch.attribution.predictions import _all_at_once, _one_by_one, prediction_products
from gradsketch.gradients.tasks.pieces import Piece, decoded, of_text

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers  # noqa: E402

TEXTS = [
    "The capital of Moldova is Chișinău.",
    "日本の首都は東京です。",
    "عاصمةُ مصر هي القاهرة",
    "I love 🗼 and 👩‍👩‍👧 and 🇷🇴🇯🇵 and 👍🏽 emoji",
    "Don't stop, running quickly!",
    "  two  spaces\nand a line  ",
    "ﬁne e\u0301te\u0301 ½",
]


def trained(core, trainer):
    core.train_from_iterator(TEXTS * 9, trainer)
    return core


def byte_level():
    core = Tokenizer(models.BPE())
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<s>", "<pad>"], initial_alphabet=alphabet)
    core.train_from_iterator(["the capital of is and a line stop running"] * 9, trainer)
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return core


def metaspace():
    core = Tokenizer(models.Unigram())
    core.pre_tokenizer, core.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    core.normalizer = normalizers.NFKC()
    special = ["<s>", "<pad>", "<unk>"]
    core = trained(core, trainers.UnigramTrainer(vocab_size=150, special_tokens=special, unk_token="<unk>"))
    core.post_processor = processors.TemplateProcessing(
        single="$A <s>", pair="$A <s> $B <s>", special_tokens=[("<s>", 0)]
    )
    return core


def llama_2():
    """SentencePiece with bytes for what it does not know, and no word for most letters."""
    words = ["<s>", "<pad>", "<unk>", *(f"<0x{i:02X}>" for i in range(256)), "▁", *"Thecapitlofsnd"]
    core = Tokenizer(models.BPE({w: i for i, w in enumerate(words)}, [], unk_token="<unk>", byte_fallback=True))
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return core


def word_piece():
    core = Tokenizer(models.WordPiece(unk_token="<unk>"))
    core.pre_tokenizer, core.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
    core.normalizer = normalizers.BertNormalizer(lowercase=True)
    special = ["<s>", "<pad>", "<unk>", "<mask>"]
    core = trained(core, trainers.WordPieceTrainer(vocab_size=120, special_tokens=special))
    core.post_processor = processors.TemplateProcessing(
        single="<s> $A <s>", pair="<s> $A <s> $B <s>", special_tokens=[("<s>", 0)]
    )
    return core


def word_level():
    core = Tokenizer(models.WordLevel(unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    return trained(core, trainers.WordLevelTrainer(special_tokens=["<s>", "<pad>", "<unk>"]))


FAMILIES = (byte_level, metaspace, llama_2, word_piece, word_level)


def fast(core):
    known = core.get_vocab()
    names = {"unk_token": "<unk>", "mask_token": "<mask>", "eos_token": "<s>", "pad_token": "<pad>"}
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, **{name: word for name, word in names.items() if word in known}
    )


class Slow:
    """A tokenizer that knows no offsets."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def __call__(self, *texts, **options):
        return {"input_ids": self.tokenizer(*texts, **options)["input_ids"]}

    def decode(self, ids):
        return self.tokenizer.decode(ids)

    def get_vocab(self):
        return self.tokenizer.get_vocab()


def causal(core):
    torch.manual_seed(0)
    size = core.get_vocab_size()
    config = transformers.GPT2Config(vocab_size=size, n_embd=16, n_layer=1, n_head=2, n_positions=160)
    config.bos_token_id = config.eos_token_id = 0
    return transformers.GPT2LMHeadModel(config).eval()


def explained(folder, model, task, rows, parameters="*", **options):
    index = gs.build_index(folder, model, task, rows, d=64, parameters=parameters, progress=False)
    hits = index.query(model, rows[:1], k=len(rows))
    return {hit.row: hit for hit in index.explain(model, hits, top=len(rows), **options)[0]}


def joined(hit):
    return "".join(token.token for token in hit.tokens)


@pytest.mark.parametrize("make", FAMILIES)
@pytest.mark.parametrize("wrap", [fast, lambda core: Slow(fast(core))])
def test_pieces_join_to_the_text(tmp_path, make, wrap):
    core = make()
    found = explained(tmp_path, causal(core), gs.CausalLM(wrap(core)), TEXTS)
    for row, text in enumerate(TEXTS):
        assert found[row].text == joined(found[row]) == text
        total = sum(token.value for token in found[row].tokens) + found[row].beyond_tokens
        assert total == pytest.approx(found[row].score, abs=1e-6)


@pytest.mark.parametrize("make", FAMILIES)
def test_a_text_that_is_cut_is_shown_whole(tmp_path, make):
    core = make()
    found = explained(tmp_path, causal(core), gs.CausalLM(fast(core), max_length=4), TEXTS)
    assert [joined(found[row]) for row in range(len(TEXTS))] == TEXTS
    assert found[0].tokens[-1].value == 0


def test_tokens_inside_one_character_share_it():
    pieces = of_text(fast(byte_level()), "a 🗼é👍🏽.", limit=None)
    assert [piece.text for piece in pieces] == ["", "a", " ", "🗼", "é", "👍🏽", "."]
    assert [piece.tokens for piece in pieces] == [1, 1, 1, 4, 2, 8, 1]


def test_special_tokens_have_no_text():
    assert of_text(fast(word_piece()), "a", limit=None) == [Piece("", 1), Piece("a", 1), Piece("", 1)]
    assert of_text(fast(metaspace()), "a", "i", limit=None)[-3:] == [Piece("", 1), Piece("i", 2), Piece("", 1)]


@pytest.mark.parametrize("make", [byte_level, llama_2])
def test_tokenised_rows_without_a_text_are_decoded_in_company(make):
    tokenizer = fast(make())
    for text in TEXTS[:6]:
        pieces = decoded(tokenizer, tokenizer(text)["input_ids"])
        assert "".join(piece.text for piece in pieces).strip() == text.strip()
        assert sum(piece.tokens for piece in pieces) == len(tokenizer(text)["input_ids"])


def test_without_a_tokenizer_ids_are_shown(tmp_path):
    rows = [{"input_ids": [1, 2, 3]}, {"input_ids": [4, 5, 6, 7]}]
    found = explained(tmp_path, causal(byte_level()), gs.CausalLM(), rows, data=rows)
    assert [token.token for token in found[1].tokens] == ["4", "5", "6", "7"]


def test_a_source_and_its_target(tmp_path):
    core = metaspace()
    config = transformers.T5Config(
        vocab_size=core.get_vocab_size(), d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2
    )
    config.decoder_start_token_id = config.pad_token_id = 1
    torch.manual_seed(0)
    model = transformers.T5ForConditionalGeneration(config).eval()
    rows = list(zip(TEXTS, reversed(TEXTS), strict=True))
    rows = [{"source": source, "target": target} for source, target in rows]
    found = explained(tmp_path, model, gs.Seq2SeqLM(fast(core)), rows, parameters="*DenseReluDense*")
    for row, example in enumerate(rows):
        assert joined(found[row]) == found[row].text == f"{example['source']} → {example['target']}"
        assert any(token.value for token in found[row].tokens)


@pytest.mark.parametrize("pair", [False, True])
def test_classes_and_hidden_words(tmp_path, pair):
    core = word_piece()
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=core.get_vocab_size(), hidden_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    rows = [{"text": text, "label": i % 2} for i, text in enumerate(TEXTS)]
    if pair:
        rows = [{**row, "text_pair": text} for row, text in zip(rows, reversed(TEXTS), strict=True)]
    model = transformers.BertForSequenceClassification(config).eval()
    found = explained(tmp_path / "classes", model, gs.Classification(fast(core)), rows)
    assert [joined(found[i]) for i in range(len(rows))] == [found[i].text for i in range(len(rows))]
    assert all(row["text"] in found[i].text and row.get("text_pair", "") in found[i].text for i, row in enumerate(rows))
    assert any(token.value for token in found[0].tokens)
    model = transformers.BertForMaskedLM(config).eval()
    found = explained(tmp_path / "words", model, gs.MaskedLM(fast(core)), TEXTS)
    assert [joined(found[i]) for i in range(len(TEXTS))] == TEXTS


def test_a_score_stands_at_the_token_that_is_predicted(tmp_path):
    """The oracle: the gradient of that one prediction's loss."""
    core = byte_level()
    model, task = causal(core).double(), gs.CausalLM(fast(core))
    example = {"prompt": "The capital of Japan is", "answer": " Chișinău."}
    batch = task.collate([example])
    names, parameters = zip(*model.named_parameters(), strict=True)
    torch.manual_seed(1)
    direction = {name: torch.randn_like(p) for name, p in zip(names, parameters, strict=True)}
    parts = prediction_products(model, task, batch, direction)
    counted = (batch["labels"][0] != -100).nonzero().flatten().tolist()
    for place in range(batch["labels"].shape[1]):
        if place not in counted:
            assert parts[place] == 0
            continue
        alone = torch.full_like(batch["labels"], -100)
        alone[0, place] = batch["labels"][0, place]
        loss = task.losses(model, {**batch, "labels": alone}).sum() / len(counted)
        gradient = torch.autograd.grad(loss, parameters, allow_unused=True)
        pairs = zip(gradient, direction.values(), strict=True)
        assert float(parts[place]) == pytest.approx(sum(float((g * v).sum()) for g, v in pairs if g is not None))
    whole = torch.autograd.grad(task.losses(model, batch).sum(), parameters)
    product = sum(float((g * v).sum()) for g, v in zip(whole, direction.values(), strict=True))
    assert float(parts.sum()) == pytest.approx(product)


class LosesTerms(torch.autograd.Function):
    """x², whose hand-written backward loses half of its graph without a word."""

    @staticmethod
    def forward(context, x):
        context.save_for_backward(x)
        return x.square()

    @staticmethod
    def backward(context, gradient):
        (x,) = context.saved_tensors
        return x * gradient + x * gradient.detach()


class Once(LosesTerms):
    backward = staticmethod(torch.autograd.function.once_differentiable(LosesTerms.backward))


@pytest.mark.parametrize("function", [LosesTerms, Once])
def test_what_cannot_be_differentiated_twice_goes_token_by_token(function):
    x = torch.arange(1.0, 5.0, requires_grad=True)
    losses = function.apply(x) * torch.tensor([1.0, 0.0, 1.0, 1.0])
    term = (losses, [x], [torch.ones(4)])
    assert _all_at_once(*term) is None
    torch.testing.assert_close(_one_by_one(*term), torch.tensor([2.0, 0.0, 6.0, 8.0]))


class Weighted(gs.CausalLM):
    """Another loss, which is no sum over predictions."""

    def losses(self, model, batch):
        return super().losses(model, batch).square()


def test_another_loss_is_not_split_like_the_old_one(tmp_path):
    core = byte_level()
    model, task = causal(core), Weighted(fast(core))
    batch = task.collate([TEXTS[0]])
    assert prediction_products(model, task, batch, dict(model.named_parameters())) is None
    found = explained(tmp_path, model, task, TEXTS[:2])
    assert joined(found[0]) == TEXTS[0]
    assert found[0].beyond_tokens == pytest.approx(0, abs=1e-3)
