"""Every field of a row or a batch that could decide a loss is used, passed on to the model, or refused by name."""

import collections
import copy
import dataclasses
import types
import typing
import warnings

import numpy
import pytest
import torch
from torch import nn
from torch.nn import functional
from transformers import (
    BatchEncoding,
    BertConfig,
    BertForSequenceClassification,
    CLIPVisionConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LayoutLMConfig,
    LayoutLMForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MBartConfig,
    MBartForConditionalGeneration,
    OPTConfig,
    OPTForCausalLM,
    PLBartConfig,
    PLBartForConditionalGeneration,
    RobertaConfig,
    RobertaForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

import gradsketch as gs
from gradsketch import CausalLM, Classification, InputError, MaskedLM, Seq2SeqLM
from gradsketch.gradients.data import batch_length, batch_slice, to_device

IDS = [7, 11, 5, 30, 9, 22, 8, 13, 6]
SMALL = {"vocab_size": 41, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}


@pytest.fixture(scope="module")
def llama():
    torch.manual_seed(0)
    config = LlamaConfig(**SMALL, max_position_embeddings=32, bos_token_id=0, eos_token_id=0, pad_token_id=0)
    return LlamaForCausalLM(config).double().eval()


@pytest.fixture(scope="module")
def gpt2():
    torch.manual_seed(0)
    config = GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=41, n_positions=16, bos_token_id=0, eos_token_id=0)
    return GPT2LMHeadModel(config).double().eval()


def bert(**options):
    torch.manual_seed(0)
    return BertForSequenceClassification(BertConfig(**SMALL, num_labels=3, **options)).double().eval()


def answer_loss(model, ids, counted):
    """Mean cross-entropy of the tokens at these places, from the definition."""
    log_p = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
    return -torch.stack([log_p[t - 1, ids[t]] for t in counted]).mean()


def loss(task, model, *rows):
    return task.losses(model, task.collate(rows))


class TestMasksOfCountedTokens:
    @pytest.mark.parametrize("name", ["completion_mask", "assistant_masks", "loss_mask"])
    def test_only_the_answer_counts(self, llama, name):
        found = loss(CausalLM(), llama, {"input_ids": IDS, name: [0] * 5 + [1] * 4})
        torch.testing.assert_close(found[0], answer_loss(llama, IDS, range(5, 9)))

    def test_with_labels_and_another_mask_all_must_agree(self, llama):
        labels = [-100] * 6 + IDS[6:]
        row = {"input_ids": IDS, "labels": labels, "completion_mask": [0] * 5 + [1] * 4, "loss_mask": [1] * 8 + [0]}
        torch.testing.assert_close(loss(CausalLM(), llama, row)[0], answer_loss(llama, IDS, range(6, 8)))

    def test_cut_with_the_tokens(self, llama):
        row = {"input_ids": IDS, "completion_mask": torch.tensor([0] * 5 + [1] * 4)}
        found = loss(CausalLM(max_length=7), llama, row)
        torch.testing.assert_close(found[0], answer_loss(llama, IDS[:7], range(5, 7)))

    @pytest.mark.parametrize(
        ("mask", "words"),
        [
            ([0] * 9, "without a token"),
            ([0.5] * 9, "whole numbers"),
            ([0] * 5 + [2] * 4, "0 and 1 only"),
            ([1] * 8, "of 8 entries"),
        ],
    )
    def test_other_masks_are_refused(self, mask, words):
        with pytest.raises(InputError, match=words):
            CausalLM().collate([{"input_ids": IDS, "completion_mask": mask}])


class TestPackedRows:
    POSITIONS = (0, 1, 2, 3, 0, 1, 2, 3, 4)

    def apart(self, model):
        """The mean over both documents' counted tokens, each run alone."""
        first, second = answer_loss(model, IDS[:4], range(1, 4)), answer_loss(model, IDS[4:], range(1, 5))
        return (3 * first + 4 * second) / 7

    @pytest.mark.parametrize("labels", [{}, {"labels": [-100, *IDS[1:4], -100, *IDS[5:]]}, {"labels": None}])
    def test_documents_do_not_see_each_other(self, llama, labels):
        row = {"input_ids": IDS, "position_ids": self.POSITIONS, **labels}
        torch.testing.assert_close(loss(CausalLM(), llama, row)[0], self.apart(llama), rtol=1e-6, atol=0)

    def test_beside_shorter_rows_and_rows_of_one_document(self, llama):
        packed = {"input_ids": IDS, "position_ids": self.POSITIONS}
        short = {"input_ids": IDS[2:5], "position_ids": [0, 0, 1]}
        longer = {"input_ids": [*IDS, *IDS]}
        task = CausalLM()
        together = loss(task, llama, packed, short, longer)
        alone = torch.cat([loss(task, llama, row) for row in (packed, short, longer)])
        torch.testing.assert_close(together, alone, rtol=1e-6, atol=0)

    def test_one_document_keeps_its_mask(self, gpt2):
        rows = [{"input_ids": IDS, "position_ids": list(range(9))}, {"input_ids": IDS[:4]}]
        batch = CausalLM().collate(rows)
        assert batch["attention_mask"].sum(1).tolist() == [9, 4]
        torch.testing.assert_close(loss(CausalLM(), gpt2, rows[0]), loss(CausalLM(), gpt2, {"input_ids": IDS}))

    def test_a_mask_that_numbers_documents_is_refused(self):
        with pytest.raises(InputError, match="attention_mask of"):
            CausalLM().collate([{"input_ids": IDS, "attention_mask": [1] * 4 + [2] * 5}])


@pytest.mark.parametrize("name", ["weight", "loss_weights", "sample_weight", "token_weights"])
@pytest.mark.parametrize("task", [CausalLM(), MaskedLM(), Seq2SeqLM(), Classification()])
def test_weights_are_refused_by_name(task, name):
    row = {"input_ids": IDS, "labels": 1 if isinstance(task, Classification) else IDS, name: 0.5}
    with pytest.raises(InputError, match=f"{name}.*multiplies by it"):
        task.collate([row])


@pytest.mark.parametrize("name", ["loss_weights", "sample_weight", "token_weights", "example_weight"])
def test_weights_of_raw_rows_are_refused_by_name(name):
    rows = [
        (CausalLM(Chatty()), {"text": "how are you"}),
        (CausalLM(Chatty()), {"prompt": "how are", "answer": " you"}),
        (MaskedLM(Chatty()), {"text": "how are you"}),
        (Seq2SeqLM(Chatty()), {"source": "how", "target": "you"}),
        (Classification(Chatty()), {"text": "how", "label": 1}),
    ]
    for task, row in rows:
        with pytest.raises(InputError, match=f"a row with '{name}'"):
            task.encode({**row, name: 0.5})
    CausalLM(Chatty()).encode({"text": "how are you", "weight": 3.5})  # in kilograms


@pytest.mark.parametrize(("row", "words"), [
    ({"text": "how are you", "prompt": "how", "answer": " are"}, "text and prompt with answer"),
    ({"text": "how are you", "prompt": "how", "completion": " are"}, "text and prompt with completion"),
    ({"prompt": "how", "answer": " 42", "completion": " so 42"}, "answer and completion"),
])  # fmt: skip
def test_a_row_of_two_readings_is_refused(row, words):
    with pytest.raises(InputError, match=f"a row with {words}, either of which"):
        CausalLM(Chatty()).encode(row)


def test_a_row_of_one_reading_is_read():
    task, mapped = CausalLM(Chatty()), gs.mapped_rows
    row = {"text": "how are you", "prompt": "how", "answer": " are"}
    by_text, by_prompt = (mapped([row], columns={name: name})[0] for name in ("text", "prompt"))
    assert task.encode(by_text).sequences["labels"].tolist() == [-100, 5, 5, 5]
    assert task.encode(by_prompt).sequences["labels"].tolist() == [-100, -100, 5]
    task.encode({"prompt": "how", "answer": " are", "completion": " are"})
    task.encode({"text": "how are you", "prompt": "how", "answer": None})


def test_a_field_without_a_value_is_absent(gpt2):
    row = {"input_ids": IDS, "labels": None, "attention_mask": None, "completion_mask": None, "weight": None}
    torch.testing.assert_close(loss(CausalLM(), gpt2, row), loss(CausalLM(), gpt2, {"input_ids": IDS}))


class TestFieldsOfRows:
    def test_a_list_per_token_that_the_model_does_not_take(self, llama, tmp_path):
        rows = [{"input_ids": IDS}, {"input_ids": IDS, "surprise": list(range(9))}]
        with pytest.raises(InputError, match="'surprise', which LlamaForCausalLM does not take"):
            loss(CausalLM(), llama, rows[1])
        with pytest.raises(InputError, match=r"1 of 2 rows that cannot be used: example 1 .*'surprise'"):
            gs.build_index(tmp_path, llama, CausalLM(), rows, d=16)
        assert list(gs.build_index(tmp_path, llama, CausalLM(), rows, d=16, skip_bad=True).left_out) == [1]

    def test_facts_about_a_row_are_no_inputs(self, llama):
        row = {"input_ids": IDS, "source": "a.txt", "page": 7, "tags": ["x"] * 9, "offset_mapping": [(0, 1)] * 9}
        torch.testing.assert_close(loss(CausalLM(), llama, row), loss(CausalLM(), llama, {"input_ids": IDS}))

    def test_as_tokenizers_return_tensors(self, llama):
        row = {"input_ids": torch.tensor([IDS]), "labels": torch.tensor([IDS]), "attention_mask": torch.ones(1, 9)}
        torch.testing.assert_close(loss(CausalLM(), llama, row), loss(CausalLM(), llama, {"input_ids": IDS}))

    def test_layout(self):
        torch.manual_seed(0)
        model = (
            LayoutLMForSequenceClassification(LayoutLMConfig(**SMALL, max_2d_position_embeddings=50)).double().eval()
        )
        boxes = [[i, i + 1, i + 2, i + 3] for i in range(9)]
        rows = [{"input_ids": IDS, "bbox": boxes, "label": 1}, {"input_ids": IDS[:4], "bbox": boxes[5:], "label": 0}]
        found = loss(Classification(), model, *rows)
        for row, one in zip(rows, found, strict=True):
            ids, box = torch.tensor([row["input_ids"]]), torch.tensor([row["bbox"]])
            theirs = model(input_ids=ids, bbox=box, labels=torch.tensor([row["label"]])).loss
            torch.testing.assert_close(one, theirs.double(), rtol=1e-6, atol=0)

    def test_features_of_a_classifier(self):
        class Two(nn.Module):
            def __init__(self):
                super().__init__()
                self.layer = nn.Linear(5, 3)

            def forward(self, pixels, extra):
                return self.layer(torch.cat([pixels, extra], dim=1))

        torch.manual_seed(0)
        model, extra = Two(), [[0.1, 0.0], [0.1, 1.0]]
        rows = [{"pixels": torch.ones(3), "extra": values, "label": 1, "name": "n", "page": 3} for values in extra]
        logits = model(torch.ones(2, 3), torch.tensor(extra))
        expected = functional.cross_entropy(logits, torch.ones(2).long(), reduction="none")
        torch.testing.assert_close(loss(Classification(), model, *rows), expected)
        with pytest.raises(InputError, match="'more', which Two does not take"):
            loss(Classification(), model, {**rows[0], "more": [1, 2]})

    def test_the_one_input_of_another_name(self):
        model = nn.Sequential(nn.Embedding(41, 3), nn.Flatten(), nn.Linear(27, 3))
        batch = {"attention_mask": torch.ones(1, 9), "input_ids": torch.tensor([IDS]), "labels": torch.tensor([0])}
        assert Classification().losses(model, batch).shape == (1,)

    def test_two_inputs_where_the_model_names_neither(self):
        batch = {"x": torch.ones(2, 4), "y": torch.ones(2, 4), "labels": torch.tensor([0, 1])}
        with pytest.raises(InputError, match="'x', which Linear does not take"):
            Classification().losses(nn.Linear(4, 3), batch)

    @pytest.mark.filterwarnings("ignore:.*used in a way that cannot be captured")
    def test_pictures_of_a_vision_language_model(self, tmp_path):
        torch.manual_seed(0)
        vision = CLIPVisionConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
                                  image_size=8, patch_size=4)  # fmt: skip
        text = LlamaConfig(**SMALL, bos_token_id=0, eos_token_id=0, pad_token_id=0)
        config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=40, image_token_id=40,
                             image_seq_length=4)  # fmt: skip
        model = LlavaForConditionalGeneration(config).eval()
        ids = [IDS[0], 40, 40, 40, 40, *IDS[1:5]]
        rows = [{"input_ids": ids, "pixel_values": torch.randn(3, 8, 8)} for _ in range(4)]
        rows.append({"input_ids": ids, "pixel_values": rows[0]["pixel_values"].tolist()})
        found = loss(CausalLM(), model, *rows)
        for row, one in zip(rows[:4], found, strict=False):
            i = torch.tensor([ids])
            theirs = model(input_ids=i, pixel_values=row["pixel_values"][None], labels=i).loss
            torch.testing.assert_close(one, theirs, rtol=1e-4, atol=0)
        torch.testing.assert_close(found[4], found[0])
        index = gs.build_index(tmp_path, model, CausalLM(), rows[:4], d=64, progress=False)
        first, second = index.query(model, rows[2:3], k=2, score="cosine")[0]
        assert first.row == 2
        assert second.score < 0.999

    def test_rows_of_which_only_some_have_a_field(self, llama):
        with pytest.raises(InputError, match="only some have 'pixel_values'"):
            CausalLM().collate([{"input_ids": IDS, "pixel_values": torch.ones(3, 2, 2)}, {"input_ids": IDS}])

    def test_metadata_holds_no_inputs(self, llama, tmp_path):
        row = {"input_ids": IDS, "position_ids": list(range(9)), "completion_mask": [1] * 9, "page": 3, "tags": [1, 2]}
        index = gs.build_index(tmp_path, llama, CausalLM(), [row] * 2, d=16)
        assert set(index.stores[0].columns()) == {"page", "tags"}

    def test_numbers_of_another_kind(self):
        for ids in ([1.5, 2], [float("nan"), 2], [2**40, 1]):
            with pytest.raises(InputError, match="whole numbers"):
                CausalLM().collate([{"input_ids": ids}])


def test_a_model_without_a_table_of_tokens():
    """Canine hashes characters; transformers raises where it is asked for its embedding."""

    class Hashing(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(1, 3)

        def forward(self, input_ids):
            return self.layer(input_ids.float().mean(1, keepdim=True))

        def get_input_embeddings(self):
            raise NotImplementedError

    assert loss(Classification(), Hashing(), {"input_ids": IDS, "label": 1}).shape == (1,)


class TestMasksOfBatches:
    def test_of_four_dims_needs_labels(self, llama):
        ids = torch.tensor([IDS, IDS[::-1]])
        mask = torch.ones(2, 1, 9, 9, dtype=torch.bool).tril()
        with pytest.raises(InputError, match=r"\[2, 1, 9, 9\] without labels"):
            CausalLM().losses(llama, {"input_ids": ids, "attention_mask": mask})
        found = CausalLM().losses(llama, {"input_ids": ids, "attention_mask": mask, "labels": ids})
        torch.testing.assert_close(found, CausalLM().losses(llama, {"input_ids": ids}), rtol=1e-6, atol=0)

    @pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
    def test_padding_on_the_left(self, name, request):
        """Rotary and learned positions, and positions that the model counts from the mask."""
        if name == "opt":
            torch.manual_seed(0)
            config = OPTConfig(vocab_size=41, hidden_size=8, num_hidden_layers=1, ffn_dim=8, num_attention_heads=2,
                               max_position_embeddings=16, word_embed_proj_dim=8)  # fmt: skip
            model = OPTForCausalLM(config).double().eval()
        else:
            model = request.getfixturevalue(name)
        left = {
            "input_ids": torch.tensor([[0, 0, *IDS], [*IDS, 3, 4]]),
            "attention_mask": torch.tensor([[0, 0, *[1] * 9], [1] * 11]),
        }
        found = CausalLM().losses(model, left)
        alone = torch.cat([loss(CausalLM(), model, {"input_ids": ids}) for ids in (IDS, [*IDS, 3, 4])])
        torch.testing.assert_close(found, alone, rtol=1e-6, atol=0)

    def test_padding_on_the_left_elsewhere(self):
        ids, mask = torch.tensor([[0, 0, *IDS], [*IDS, 3, 4]]), torch.tensor([[0, 0, *[1] * 9], [1] * 11])
        model, labels = bert(), torch.tensor([1, 2])
        batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
        rows = [({"input_ids": IDS}, 1), ({"input_ids": [*IDS, 3, 4]}, 2)]
        found = Classification().losses(model, batch)
        torch.testing.assert_close(found, loss(Classification(), model, *rows), rtol=1e-6, atol=0)

    def test_labels_of_a_decoder_stay_where_they_are(self):
        torch.manual_seed(0)
        config = T5Config(vocab_size=41, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, decoder_start_token_id=0)
        model, task = T5ForConditionalGeneration(config).double().eval(), Seq2SeqLM()
        labels = torch.arange(11)[None] + 5
        batch = {
            "input_ids": torch.tensor([[0, 0, *IDS]]),
            "attention_mask": torch.tensor([[0, 0, *[1] * 9]]),
            "labels": labels,
        }
        row = {"input_ids": IDS, "labels": labels[0]}
        torch.testing.assert_close(task.losses(model, batch), loss(task, model, row), rtol=1e-6, atol=0)

    def test_a_token_after_a_hidden_one_does_not_count(self, llama):
        ids, mask = torch.tensor([IDS]), torch.ones(1, 9).long()
        mask[0, 4] = 0
        found = CausalLM().losses(llama, {"input_ids": ids, "attention_mask": mask})
        labels = ids.clone()
        labels[0, 4:6] = -100
        logits = llama(input_ids=ids, attention_mask=mask).logits
        expected = functional.cross_entropy(logits[0, :-1].double(), labels[0, 1:])
        torch.testing.assert_close(found[0], expected)


class Recurrent(nn.Module):
    """A classifier that reads whatever it is given."""

    def __init__(self):
        super().__init__()
        self.embedding, self.lstm, self.head = nn.Embedding(41, 6), nn.LSTM(6, 6, bidirectional=True), nn.Linear(12, 3)

    def forward(self, input_ids, lengths=None):
        return self.head(self.lstm(self.embedding(input_ids).transpose(0, 1))[0].mean(0))


class TestModelsWithoutAMask:
    ROWS = (({"input_ids": IDS}, 1), ({"input_ids": IDS[:4]}, 2))

    def test_padding_is_refused(self):
        torch.manual_seed(0)
        model, task = Recurrent(), Classification()
        with pytest.raises(InputError, match=r"padded batch for Recurrent.*\(but lengths\).*batch_tokens=1"):
            loss(task, model, *self.ROWS)
        assert loss(task, model, self.ROWS[0], self.ROWS[0]).shape == (2,)

    @pytest.mark.filterwarnings("ignore:.*used in a way that cannot be captured")
    def test_the_advice_works(self, tmp_path):
        torch.manual_seed(0)
        model, task, rows = Recurrent(), Classification(), list(self.ROWS)
        index = gs.build_index(tmp_path, model, task, rows, d=16, batch_tokens=1, progress=False, dtype="float32")
        alone = torch.cat([loss(task, model, row) for row in rows]).detach()
        torch.testing.assert_close(index.stores[0].shard(0, 2).numbers("loss"), alone)

    def test_a_causal_model_needs_none(self):
        model = nn.Sequential(nn.Embedding(41, 4), nn.Linear(4, 41))
        assert loss(CausalLM(), model, {"input_ids": IDS}, {"input_ids": IDS[:4]}).shape == (2,)
        hole = {"input_ids": torch.tensor([IDS]), "attention_mask": torch.tensor([[1, 0, *[1] * 7]])}
        with pytest.raises(InputError, match="padded batch"):
            CausalLM().losses(model, hole)


class TestPositions:
    def test_too_many_tokens_are_named(self, gpt2, tmp_path):
        rows = [{"input_ids": IDS}, {"input_ids": IDS * 2}]
        with pytest.raises(InputError, match=r"18 tokens for GPT2LMHeadModel, which has 16 positions.*max_length=16"):
            loss(CausalLM(), gpt2, *rows)
        with pytest.raises(InputError, match=r"example 1 \(18 tokens"):
            gs.build_index(tmp_path, gpt2, CausalLM(), rows, d=16)
        assert loss(CausalLM(max_length=16), gpt2, *rows).shape == (2,)

    @pytest.mark.parametrize(("model", "limit"), [
        (lambda: bert(max_position_embeddings=8), 8),
        (lambda: RobertaForSequenceClassification(RobertaConfig(**SMALL, max_position_embeddings=10)), 8),
    ])  # fmt: skip
    def test_the_limit_is_where_the_model_fails(self, model, limit):
        model, task = model(), Classification()
        loss(task, model, ({"input_ids": IDS[:limit]}, 0))
        with pytest.raises(InputError, match=f"has {limit} positions"):
            loss(task, model, ({"input_ids": IDS}, 0))
        with pytest.raises((IndexError, RuntimeError)):
            model(input_ids=torch.tensor([IDS]))

    def test_rotary_positions_have_no_end(self, llama):
        assert loss(CausalLM(), llama, {"input_ids": IDS * 5}).shape == (1,)


class Returning(nn.Module):
    def __init__(self, wrap):
        super().__init__()
        self.layer, self.wrap = nn.Linear(4, 3), wrap

    def forward(self, x):
        return self.wrap(self.layer(x))


@pytest.mark.parametrize(
    "wrap",
    [
        lambda o: {"logits": o},
        lambda o: collections.OrderedDict(logits=o),
        lambda o: (o, None),
        lambda o: [o],
        lambda o: (o.sum(), o),
        lambda o: (None, o),
        lambda o: types.SimpleNamespace(logits=o),
    ],
)
def test_every_form_of_output(wrap):
    torch.manual_seed(0)
    model, batch = Returning(wrap), (torch.randn(5, 4), torch.arange(5) % 3)
    expected = functional.cross_entropy(model.layer(batch[0]), batch[1], reduction="none")
    assert torch.equal(Classification().losses(model, batch), expected)


def test_an_output_without_logits():
    with pytest.raises(InputError, match="returned a dict without logits"):
        Classification().losses(Returning(lambda o: {"pred": o}), (torch.randn(2, 4), torch.tensor([0, 1])))


class TestDecoders:
    SMALL: typing.ClassVar = {"d_model": 8, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
             "decoder_attention_heads": 2, "encoder_ffn_dim": 8, "decoder_ffn_dim": 8, "vocab_size": 41,
             "max_position_embeddings": 32, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}  # fmt: skip
    ROWS = ({"input_ids": [5, 6, 7, 2, 9], "labels": [7, 8, 9, 2, 10]}, {"input_ids": [5, 9], "labels": [8, 2, 11]})

    @pytest.mark.parametrize("start", [{}, {"decoder_start_token_id": 2}])
    @pytest.mark.parametrize(
        ("kind", "config"),
        [(MBartForConditionalGeneration, MBartConfig), (PLBartForConditionalGeneration, PLBartConfig)],
    )
    def test_labels_move_as_the_model_moves_them(self, kind, config, start):
        torch.manual_seed(0)
        model = kind(config(**self.SMALL, **start)).double().eval()
        for row, one in zip(self.ROWS, loss(Seq2SeqLM(), model, *self.ROWS), strict=True):
            theirs = model(**{name: torch.tensor([values]) for name, values in row.items()}).loss
            torch.testing.assert_close(one, theirs.double(), rtol=1e-6, atol=0)

    def test_given_inputs_of_the_decoder_are_used(self):
        torch.manual_seed(0)
        model = MBartForConditionalGeneration(MBartConfig(**self.SMALL)).double().eval()
        rows = [{**row, "decoder_input_ids": row["labels"][::-1]} for row in self.ROWS]
        for row, one in zip(rows, loss(Seq2SeqLM(), model, *rows), strict=True):
            theirs = model(**{name: torch.tensor([values]) for name, values in row.items()}).loss
            torch.testing.assert_close(one, theirs.double(), rtol=1e-6, atol=0)
        with pytest.raises(InputError, match="decoder_input_ids of 2 entries beside labels of 5"):
            Seq2SeqLM().collate([{**self.ROWS[0], "decoder_input_ids": [1, 2]}])

    def test_speech(self):
        torch.manual_seed(0)
        small = {name: value for name, value in self.SMALL.items() if name != "max_position_embeddings"}
        config = WhisperConfig(**small, num_mel_bins=4, max_source_positions=8, max_target_positions=8,
                               decoder_start_token_id=3, suppress_tokens=None, begin_suppress_tokens=None)  # fmt: skip
        model = WhisperForConditionalGeneration(config).eval()
        rows = [
            {"input_features": numpy.random.rand(4, 16).astype("float32"), "labels": row["labels"]} for row in self.ROWS
        ]
        for row, one in zip(rows, loss(Seq2SeqLM(), model, *rows), strict=True):
            features, labels = torch.from_numpy(row["input_features"])[None], torch.tensor([row["labels"]])
            torch.testing.assert_close(one, model(input_features=features, labels=labels).loss, rtol=1e-5, atol=0)

    def test_too_many_labels(self):
        model = MBartForConditionalGeneration(MBartConfig(**self.SMALL))
        with pytest.raises(InputError, match=r"40 tokens for MBart.* has 32 positions"):
            loss(Seq2SeqLM(), model, {"input_ids": [5, 2], "labels": [7] * 40})

    def test_neither_source_nor_tokens(self):
        with pytest.raises(InputError, match="input_ids or another input"):
            Seq2SeqLM().collate([{"labels": [1, 2], "name": "a"}])


def test_embeddings_in_place_of_tokens(gpt2):
    embeddings = gpt2.transformer.wte(torch.tensor([IDS])).detach()
    found = CausalLM().losses(gpt2, {"inputs_embeds": embeddings, "labels": torch.tensor([IDS])})
    torch.testing.assert_close(found, loss(CausalLM(), gpt2, {"input_ids": IDS}))
    with pytest.raises(InputError, match="neither labels nor input_ids"):
        CausalLM().losses(gpt2, {"inputs_embeds": embeddings})


@pytest.mark.parametrize("labels", [torch.tensor([0.7, 1.9]), torch.rand(2, 3)])
def test_labels_that_are_no_classes(labels):
    with pytest.raises(InputError, match=r"labels of dtype torch\.float32"):
        Classification().losses(nn.Linear(4, 3), (torch.ones(2, 4), labels))


class Chatty:
    """A tokenizer that begins every text with the token <s>, and reads that word as the same token."""

    bos_token, bos_token_id = "<s>", 1

    def __call__(self, text, **options):
        words = text.replace("<s>", "<s> ").split()
        return {
            "input_ids": [1, *(1 if word == "<s>" else 2 + len(word) for word in words)][: options.get("max_length")]
        }


def test_a_first_token_that_the_text_brings_is_not_doubled():
    task = CausalLM(Chatty())
    rendered, plain = task.collate(["<s>how are you"]), task.collate(["how are you"])
    assert rendered["input_ids"].tolist() == plain["input_ids"].tolist() == [[1, 5, 5, 5]]
    pair = task.collate([("<s>how are", " you")])
    assert pair["labels"].tolist() == [[-100, -100, -100, 5]]


def test_a_text_that_the_tokenizer_rejects_is_a_bad_row(gpt2, tmp_path):
    class Strict(Chatty):
        def __call__(self, text, **options):
            text.encode()
            return super().__call__(text, **options)

    rows = ["fine words here", "a lone \ud800 surrogate"]
    with pytest.raises(InputError, match=r"example 1 .*cannot be read \(UnicodeEncodeError"):
        gs.build_index(tmp_path, gpt2, CausalLM(Strict()), rows, d=16)


@dataclasses.dataclass(frozen=True)
class Pair:
    x: torch.Tensor
    y: torch.Tensor
    name: str = "kept"


class TestTypesOfBatches:
    X, Y, WEIGHTS = (
        torch.randn(5, 4, generator=torch.Generator().manual_seed(0)),
        torch.arange(5) % 3,
        [0.5, 1.0, 2, 0, 3],
    )

    def sketched(self, losses, batch, method="auto"):
        torch.manual_seed(0)
        model = nn.Linear(4, 3)
        phi = gs.BlockSum(gs.Parameters(model), 15)
        return gs.sketch_gradients(model, losses, batch, phi, method=method)

    def plain(self):
        return self.sketched(lambda m, b: functional.cross_entropy(m(b[0]), b[1], reduction="none"), (self.X, self.Y))

    @pytest.mark.parametrize("method", ["auto", "loop"])
    @pytest.mark.parametrize(
        "batch", [BatchEncoding({"x": X, "y": Y}), Pair(X, Y), collections.namedtuple("NT", "x y")(X, Y)]
    )
    def test_are_kept(self, batch, method):
        def losses(model, batch):
            return functional.cross_entropy(model(batch.x), batch.y, reduction="none")

        torch.testing.assert_close(self.sketched(losses, batch, method), self.plain())
        assert type(batch_slice(batch, 0, 2)) is type(batch)
        assert batch_length(batch) == 5  # it was not changed itself

    @pytest.mark.parametrize("method", ["auto", "loop"])
    @pytest.mark.parametrize("weights", [WEIGHTS, tuple(WEIGHTS), numpy.array(WEIGHTS)])
    def test_lists_and_arrays_are_cut(self, weights, method):
        def losses(model, batch):
            weights = torch.as_tensor(numpy.asarray(batch["w"]), dtype=torch.float32)
            return functional.cross_entropy(model(batch["x"]), batch["y"], reduction="none") * weights

        found = self.sketched(losses, {"x": self.X, "y": self.Y, "w": weights}, method)
        torch.testing.assert_close(found, self.plain() * torch.tensor(self.WEIGHTS)[:, None])

    def test_others(self):
        batch = {"x": self.X, "ids": list("abcde"), "words": ["a", "b"], "none": None, "scale": 2.0}
        part = batch_slice(batch, 1, 3)
        assert (part["ids"], part["words"], part["none"], part["scale"]) == (["b", "c"], ["a", "b"], None, 2.0)
        assert batch["ids"] == list("abcde")
        for value in ([0.1, 0.2], numpy.ones(3), [[1, 2], [3]]):
            with pytest.raises(InputError, match=r"w of length \d in a batch of 5"):
                batch_slice({"x": self.X, "w": value}, 0, 1)

    def test_a_mapping_that_cannot_be_written(self):
        batch = types.MappingProxyType({"x": self.X})
        assert batch_slice(batch, 0, 2)["x"].shape == (2, 4)
        assert to_device(batch, "cpu")["x"].shape == (5, 4)

    def test_an_empty_batch_is_refused(self):
        with pytest.raises(InputError, match=r"first dims are \[0\]"):
            batch_length({"x": self.X[:0]})


def dynamic_rope():
    """A model whose forward pass writes other frequencies into a buffer where rows are longer than 8 tokens."""
    torch.manual_seed(0)
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}
    config = LlamaConfig(**SMALL, max_position_embeddings=8, rope_parameters=rope)
    return LlamaForCausalLM(config).eval()


def test_an_index_is_asked_by_the_model_that_built_it_though_forward_writes_buffers(tmp_path):
    model = dynamic_rope()
    rows = [{"input_ids": (IDS * 3)[start : start + 20]} for start in range(6)]
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    index = gs.build_index(tmp_path / "index", model, CausalLM(), rows, d=64)
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())
    hits = index.query(model, rows[2:4], k=1)
    assert [found.proponents[0].row for found in hits] == [2, 3]


@pytest.mark.parametrize("method", ["auto", "loop"])
@pytest.mark.parametrize(("lengths", "told"), [((20, 5), True), ((20, 20), False), ((8, 5), False)])
def test_outputs_that_depend_on_padding_are_told(lengths, told, method):
    """Short rows take the frequencies of the longest row of their batch, so no row of their own has this gradient."""
    model = dynamic_rope().double()
    for parameter in model.parameters():
        parameter.data.mul_(3)  # attention that is neither even nor all on one token
    batch = CausalLM().collate([{"input_ids": (IDS * 3)[:length]} for length in lengths])
    phi = gs.BlockSum(gs.Parameters(model), 64)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        gs.sketch_gradients(model, CausalLM(), batch, phi, method=method)
    assert sum("with its padding" in str(warning.message) for warning in caught) == told


class Shifted(torch.nn.Module):
    """A language model that also takes a number for each token, in a field of another shape than the ids."""

    def __init__(self):
        super().__init__()
        self.table = torch.nn.Embedding(41, 41)

    def forward(self, input_ids, attention_mask, shifts):
        return types.SimpleNamespace(logits=self.table(input_ids) + shifts.mT)


def test_a_field_whose_padding_nobody_knows_is_no_reason_to_refuse_a_batch():
    torch.manual_seed(0)
    batch = CausalLM().collate([{"input_ids": IDS}, {"input_ids": IDS[:4]}])
    batch["shifts"] = torch.randn(2, 1, batch["input_ids"].shape[1])
    model = Shifted()
    phi = gs.BlockSum(gs.Parameters(model), 64)
    assert gs.sketch_gradients(model, CausalLM(), batch, phi).shape == (2, 64)


class TestCollators:
    """Batches as the collators of training libraries make them."""

    ROWS = (IDS, IDS[:4], IDS[2:8])

    @pytest.mark.parametrize("side", ["left", "right"])
    def test_padding_with_a_multiple(self, llama, side):
        width = 16  # pad_to_multiple_of
        ids, labels, mask = (torch.full((3, width), fill) for fill in (0, -100, 0))
        for place, row in enumerate(self.ROWS):
            where = slice(width - len(row), None) if side == "left" else slice(len(row))
            ids[place, where], mask[place, where] = torch.tensor(row), 1
            labels[place, where] = torch.tensor(row)
        batch = BatchEncoding({"input_ids": ids, "attention_mask": mask, "labels": labels})
        phi = gs.BlockSum(gs.Parameters(llama), 64)
        got = gs.sketch_gradients(llama, CausalLM(), batch, phi)
        alone = [CausalLM().collate([{"input_ids": row}]) for row in self.ROWS]
        want = torch.cat([gs.sketch_gradients(llama, CausalLM(), one, phi) for one in alone])
        torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-10)
        assert type(batch) is BatchEncoding
        assert set(batch) == {"input_ids", "attention_mask", "labels"}

    def test_all_rows_in_one_without_padding(self, llama):
        ids = torch.tensor([[token for row in self.ROWS for token in row]])
        places = torch.tensor([[place for row in self.ROWS for place in range(len(row))]])
        batch = {"input_ids": ids, "labels": ids.clone(), "position_ids": places}
        (got,) = CausalLM(reduction="sum").losses(llama, batch)
        each = [len(row[1:]) * answer_loss(llama, row, range(1, len(row))) for row in self.ROWS]
        torch.testing.assert_close(got, sum(each))

    @pytest.mark.parametrize("name", ["completion_mask", "assistant_masks", "chosen_input_ids", "weights"])
    def test_a_field_that_would_decide_the_loss_is_refused(self, llama, name):
        batch = {**CausalLM().collate([{"input_ids": IDS}]), name: torch.ones(1, len(IDS), dtype=torch.long)}
        with pytest.raises(InputError, match=name):
            CausalLM().losses(llama, batch)


def test_virtual_tokens_in_front_are_named(gpt2):
    import peft

    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    model = peft.get_peft_model(copy.deepcopy(gpt2), config)
    with pytest.raises(InputError, match=r"logits for 4 more positions than there are labels.*virtual tokens"):
        loss(CausalLM(), model, {"input_ids": IDS})
