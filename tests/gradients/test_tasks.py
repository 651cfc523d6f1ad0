"""Tasks: losses against Hugging Face's own, raw examples, padding, and every mismatch named."""

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

from gradsketch import CausalLM, Classification, Function, InputError, MaskedLM, Seq2SeqLM

TEXTS = ["The capital of France is Paris.", "The capital of Japan is Tokyo.", "Über den Wolken 🎈 ist es still."]


@pytest.fixture(scope="module")
def tokenizer():
    """A byte-level BPE tokenizer, trained on three sentences, as GPT-2's."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    special = ["<s>", "</s>", "<pad>", "<mask>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=special, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(TEXTS * 5, trainer)
    names = dict(zip(("bos_token", "eos_token", "pad_token", "mask_token"), special, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


class Slow:
    """A tokenizer without offsets: one token a character, an end token, and "ab" merged to one token."""

    all_special_ids = (0,)

    def __call__(self, text, **options):
        ids = [*map(ord, text.replace("ab", "ψ")), 0]
        return {"input_ids": ids[: options.get("max_length")]}


@pytest.fixture(scope="module")
def gpt2():
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=320, n_positions=32)).double().eval()


def counted(tokenizer, batch, row):
    """Text of the tokens that count in a row."""
    labels = batch["labels"][row].clone()
    labels[0] = -100
    return tokenizer.decode(labels[labels != -100])


class TestCausalLM:
    def test_equals_hugging_face(self, gpt2, tokenizer):
        batch = CausalLM(tokenizer).collate(TEXTS[:1])
        theirs = gpt2(input_ids=batch["input_ids"], labels=batch["input_ids"]).loss
        assert torch.allclose(CausalLM().losses(gpt2, batch), theirs.double()[None], rtol=1e-6)

    def test_float64_stays_and_half_is_widened(self, gpt2, tokenizer):
        batch = CausalLM(tokenizer).collate(TEXTS[:1])
        assert CausalLM().losses(gpt2, batch).dtype == torch.float64
        half = GPT2LMHeadModel(gpt2.config).bfloat16()
        assert CausalLM().losses(half, batch).dtype == torch.float32

    def test_sum_is_mean_times_counted_tokens(self, gpt2, tokenizer):
        task = CausalLM(tokenizer, reduction="sum")
        batch = task.collate(TEXTS)
        counts = (batch["labels"][:, 1:] != -100).sum(-1)
        assert torch.allclose(task.losses(gpt2, batch), CausalLM().losses(gpt2, batch) * counts)

    def test_sum_is_the_log_probability_of_the_answer(self, gpt2, tokenizer):
        prompt, answer = "The capital of France is", " Paris."
        loss = CausalLM(tokenizer, reduction="sum").losses(gpt2, CausalLM(tokenizer).collate([(prompt, answer)]))
        ids = torch.tensor([tokenizer(prompt + answer)["input_ids"]])
        first = len(tokenizer(prompt)["input_ids"])
        log_p = gpt2(input_ids=ids).logits.log_softmax(-1)[0]
        assert torch.allclose(loss[0], -sum(log_p[t - 1, ids[0, t]] for t in range(first, ids.shape[1])))

    @pytest.mark.parametrize(
        ("prompt", "answer", "text"),
        [
            ("The capital of France is", " Paris.", " Paris."),
            ("The capital of France is ", "Paris.", " Paris."),  # the blank belongs to the answer's token
            ("The capital of Fra", "nce", " France"),  # a token that spans the boundary counts
            ("Über den Wolken ", "🎈", " 🎈"),
            ("", "The capital", " capital"),
        ],
    )
    def test_counts_the_answers_tokens_only(self, tokenizer, prompt, answer, text):
        forms = [(prompt, answer), {"prompt": prompt, "answer": answer}, {"prompt": prompt, "completion": answer}]
        batch = CausalLM(tokenizer).collate(forms)
        assert [counted(tokenizer, batch, row) for row in range(3)] == [text] * 3

    @pytest.mark.parametrize(("prompt", "answer", "count"), [("xy", "z", 2), ("xa", "b", 2), ("ab", "ab", 2)])
    def test_boundary_without_offsets(self, prompt, answer, count):
        labels = CausalLM(Slow()).collate([(prompt, answer)])["labels"]
        assert int((labels != -100).sum()) == count  # the answer's token and the end token

    def test_what_a_tokenizer_without_offsets_cuts_on_the_left_is_refused(self):
        slow = Slow()
        slow.truncation_side = "left"
        assert int((CausalLM(slow, max_length=9).collate([("xyz", "uvw")])["labels"] != -100).sum()) == 4
        with pytest.raises(InputError, match=r'cut on the left.*truncation_side = "right"'):
            CausalLM(slow, max_length=5).collate([("xyz", "uvw")])

    def test_texts_in_dicts(self, tokenizer):
        a, b = CausalLM(tokenizer).collate(TEXTS), CausalLM(tokenizer).collate([{"text": t, "id": 3} for t in TEXTS])
        assert all(torch.equal(a[name], b[name]) for name in a)

    def test_padding_and_batch_mates_change_nothing(self, gpt2, tokenizer):
        task = CausalLM(tokenizer)
        alone = torch.cat([task.losses(gpt2, task.collate([text])) for text in TEXTS])
        assert torch.allclose(task.losses(gpt2, task.collate(TEXTS)), alone, rtol=1e-12)

    def test_padded_rows_are_trimmed_on_both_sides(self, tokenizer):
        plain = {"input_ids": [5, 6, 7]}
        left = {"input_ids": torch.tensor([2, 2, 5, 6, 7]), "attention_mask": torch.tensor([0, 0, 1, 1, 1])}
        right = {"input_ids": [[5, 6, 7, 2]], "attention_mask": [[1, 1, 1, 0]]}
        batch = CausalLM().collate([plain, left, right])
        assert batch["input_ids"].tolist() == [[5, 6, 7]] * 3
        assert batch["labels"].tolist() == [[5, 6, 7]] * 3

    def test_padding_that_is_labelled_does_not_count(self, gpt2):
        ids = torch.tensor([[5, 6, 7, 2, 2]])
        mask = torch.tensor([[1, 1, 1, 0, 0]])
        padded = CausalLM().losses(gpt2, {"input_ids": ids, "attention_mask": mask, "labels": ids})
        assert torch.allclose(padded, CausalLM().losses(gpt2, {"input_ids": ids[:, :3]}))

    def test_nothing_counted_is_zero(self, gpt2):
        ids = torch.tensor([[5, 6, 7]])
        assert CausalLM().losses(gpt2, {"input_ids": ids, "labels": torch.full_like(ids, -100)}).tolist() == [0.0]

    def test_truncation(self, tokenizer):
        assert CausalLM(tokenizer, max_length=4).collate(TEXTS)["input_ids"].shape == (3, 4)
        assert CausalLM(max_length=4).collate([{"input_ids": list(range(9))}])["input_ids"].shape == (1, 4)

    def test_length_is_what_collate_pads_to(self, tokenizer):
        task = CausalLM(tokenizer)
        assert [task.length(text) for text in TEXTS] == task.collate(TEXTS)["attention_mask"].sum(-1).tolist()

    def test_takes_a_plain_module(self):
        model = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 10))
        assert CausalLM().losses(model, CausalLM().collate([{"input_ids": [1, 2, 3]}])).shape == (1,)

    @pytest.mark.parametrize(
        ("example", "words"),
        [
            ("", "an empty text"),
            (("Where?", ""), "an empty answer"),
            ("A", "leaves no token to predict"),
            (("a b c d e f g h", " Paris"), "leaves no token to predict"),
            ({"question": "?"}, "keys question"),
            (7, "type int"),
            ({"input_ids": [[1, 2], [3, 4]]}, "several sequences"),
            ({"input_ids": [1, 2], "labels": [1]}, "labels of 1 entries beside input_ids of 2"),
            ({"input_ids": [1, 2], "attention_mask": [0, 0]}, "without a token"),
        ],
    )
    def test_bad_examples(self, tokenizer, example, words):
        with pytest.raises(InputError, match=f"example 1 of the batch.*{words}"):
            CausalLM(tokenizer, max_length=8).collate(["The capital", example])

    def test_bad_options(self):
        with pytest.raises(InputError, match="max_length=1"):
            CausalLM(max_length=1)
        with pytest.raises(InputError, match="no tokenizer"):
            CausalLM().collate(["some text"])

    def test_mismatched_models(self, gpt2):
        with pytest.raises(InputError, match="example 0 of the batch holds the token 320"):
            CausalLM().losses(gpt2, {"input_ids": torch.tensor([[1, 320]])})
        with pytest.raises(InputError, match="the label 400"):
            CausalLM().losses(gpt2, {"input_ids": torch.tensor([[1, 3]]), "labels": torch.tensor([[1, 400]])})
        model = nn.Sequential(nn.Embedding(9, 4), nn.Flatten(), nn.Linear(20, 7))
        with pytest.raises(InputError, match=r"shape \[2, 7\] for labels of shape \[2, 5\]"):
            CausalLM().losses(model, {"input_ids": torch.ones(2, 5).long()})

    def test_options_name_what_decides_the_loss(self, tokenizer):
        assert CausalLM(tokenizer).options() != CausalLM(Slow()).options()
        assert CausalLM(tokenizer).options() != CausalLM(tokenizer, reduction="sum").options()
        assert CausalLM(tokenizer).options() == CausalLM(tokenizer).options()


class TestSeq2SeqLM:
    CASES = (
        (
            T5ForConditionalGeneration,
            T5Config(
                d_model=8,
                d_ff=8,
                d_kv=4,
                num_layers=1,
                num_heads=2,
                vocab_size=320,
                decoder_start_token_id=0,
            ),
        ),
        (
            BartForConditionalGeneration,
            BartConfig(
                d_model=8,
                encoder_layers=1,
                decoder_layers=1,
                encoder_attention_heads=2,
                decoder_attention_heads=2,
                encoder_ffn_dim=8,
                decoder_ffn_dim=8,
                vocab_size=320,
                max_position_embeddings=64,
            ),
        ),
    )

    @pytest.mark.parametrize(("kind", "config"), CASES)
    def test_equals_hugging_face(self, kind, config, tokenizer):
        torch.manual_seed(0)
        model, task = kind(config).double().eval(), Seq2SeqLM(tokenizer)
        pairs = [("The capital of France", "Paris."), {"source": "Wolken", "target": "The capital of Japan"}]
        losses = task.losses(model, task.collate(pairs))
        for pair, loss in zip(pairs, losses, strict=True):
            alone = task.collate([pair])
            theirs = model(input_ids=alone["input_ids"], labels=alone["labels"]).loss
            assert torch.allclose(loss, theirs.double(), rtol=1e-6)

    def test_tokenised_and_length(self, tokenizer):
        task = Seq2SeqLM(tokenizer)
        example = {"input_ids": [5, 6, 7], "labels": [8, 9]}
        assert task.collate([example])["labels"].tolist() == [[8, 9]]
        assert task.length(example) == 5

    def test_bad_examples(self, tokenizer):
        task = Seq2SeqLM(tokenizer)
        for example, words in (
            (("", "a"), "empty source"),
            (("a", ""), "empty target"),
            ({"source": "a"}, "keys source"),
        ):
            with pytest.raises(InputError, match=words):
                task.collate([example])

    def test_no_start_token(self):
        with pytest.raises(InputError, match="decoder_start_token_id"):
            Seq2SeqLM().losses(
                nn.Embedding(9, 9), {"input_ids": torch.ones(1, 2).long(), "labels": torch.ones(1, 2).long()}
            )


@pytest.fixture(scope="module")
def masked_bert():
    torch.manual_seed(0)
    config = BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, vocab_size=320)
    return BertForMaskedLM(config).double().eval()


class TestMaskedLM:
    def test_equals_hugging_face(self, masked_bert, tokenizer):
        task = MaskedLM(tokenizer, probability=0.5)
        losses = task.losses(masked_bert, task.collate(TEXTS))
        for text, loss in zip(TEXTS, losses, strict=True):
            assert torch.allclose(loss, masked_bert(**task.collate([text])).loss.double(), rtol=1e-6)

    def test_an_example_is_masked_alike_in_every_batch(self, tokenizer):
        task = MaskedLM(tokenizer)
        together, alone = task.collate(TEXTS), MaskedLM(tokenizer).collate(TEXTS[1:2])
        length = alone["labels"].shape[1]
        assert torch.equal(together["labels"][1, :length], alone["labels"][0])
        assert torch.equal(together["input_ids"][1, :length], alone["input_ids"][0])
        assert not torch.equal(MaskedLM(tokenizer, seed=1).collate(TEXTS)["labels"], together["labels"])

    def test_shares(self, tokenizer):
        """4000 tokens: each share within 5 standard deviations (false alarm below 1e-5)."""
        ids = [10 + i % 300 for i in range(4000)]
        batch = MaskedLM(tokenizer, probability=0.3).collate([{"input_ids": ids}])
        hidden = batch["labels"][0] != -100
        assert abs(hidden.double().mean() - 0.3) < 5 * (0.3 * 0.7 / 4000) ** 0.5
        shown = batch["input_ids"][0][hidden]
        assert abs((shown == tokenizer.mask_token_id).double().mean() - 0.8) < 5 * (0.8 * 0.2 / 1100) ** 0.5
        assert abs((shown == batch["labels"][0][hidden]).double().mean() - 0.1) < 5 * (0.1 * 0.9 / 1100) ** 0.5

    def test_hides_at_least_one_token_and_never_a_special_one(self, tokenizer):
        batch = MaskedLM(tokenizer, probability=1e-6).collate([{"input_ids": [0, 50, 60, 1]}])
        assert (batch["labels"] != -100).sum() == 1
        batch = MaskedLM(tokenizer, probability=1.0).collate([{"input_ids": [0, 50, 60, 1]}])
        assert batch["labels"].tolist() == [[-100, 50, 60, -100]]

    def test_given_labels_stay(self):
        batch = MaskedLM().collate([{"input_ids": [3, 4], "labels": [-100, 9]}])
        assert batch["labels"].tolist() == [[-100, 9]]

    def test_bad_input(self, tokenizer):
        for task, example, words in (
            (MaskedLM(), {"input_ids": [1, 2]}, "mask token"),
            (MaskedLM(tokenizer), "", "empty text"),
            (MaskedLM(tokenizer), {"input_ids": [0, 1]}, "special tokens only"),
            (MaskedLM(tokenizer), ("a", "b"), "type tuple"),
        ):
            with pytest.raises(InputError, match=words):
                task.collate([example])
        with pytest.raises(InputError, match="probability=0"):
            MaskedLM(tokenizer, probability=0.0)


@pytest.fixture(scope="module")
def bert():
    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, vocab_size=320, num_labels=3
    )
    return BertForSequenceClassification(config).double().eval()


class TestClassification:
    def test_texts_equal_hugging_face(self, bert, tokenizer):
        task = Classification(tokenizer, classes=["no", "maybe", "yes"])
        examples = [(TEXTS[0], "yes"), ((TEXTS[1], TEXTS[2]), 1), {"text": TEXTS[2], "label": "no"}]
        examples.append({"text": TEXTS[1], "text_pair": TEXTS[2], "label": 2})
        losses = task.losses(bert, task.collate(examples))
        for example, loss in zip(examples, losses, strict=True):
            assert torch.allclose(loss, bert(**task.collate([example])).loss.double(), rtol=1e-6)

    def test_images(self):
        config = ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, image_size=8,
                           patch_size=4, num_labels=3)  # fmt: skip
        model, task = ViTForImageClassification(config).eval(), Classification()
        image = torch.randn(3, 8, 8)
        by_dict = task.losses(model, task.collate([{"pixel_values": image, "label": 1, "name": "a.png"}] * 2))
        by_tuple = task.losses(model, task.collate([(image, 1)] * 2))
        assert torch.equal(by_dict, by_tuple)
        assert torch.allclose(by_tuple[0], model(image[None], labels=torch.tensor([1])).loss)

    def test_image_processor(self):
        class Processor:
            image_processor_type = "Halves"

            def __call__(self, image, return_tensors):
                assert return_tensors == "pt"
                return {"pixel_values": torch.as_tensor(image)[None] / 2}

        batch = Classification(Processor()).collate([([[2.0, 4.0]], 0), {"image": [[6.0, 8.0]], "label": 1}])
        assert batch["pixel_values"].tolist() == [[[1.0, 2.0]], [[3.0, 4.0]]]

    def test_tensors_and_arrays(self):
        numpy = pytest.importorskip("numpy")
        model, task = nn.Linear(4, 3), Classification()
        batch = task.collate([(numpy.ones(4, numpy.float32), numpy.int64(2)), (torch.zeros(4), torch.tensor(0))])
        expected = nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")
        assert torch.equal(task.losses(model, batch), expected)

    def test_padding_and_batch_mates_change_nothing(self, bert, tokenizer):
        task = Classification(tokenizer)
        examples = [(text, i) for i, text in enumerate(TEXTS)]
        alone = torch.cat([task.losses(bert, task.collate([e])) for e in examples])
        assert torch.allclose(task.losses(bert, task.collate(examples)), alone, rtol=1e-12)
        assert [task.length(e) for e in examples] == task.collate(examples)["attention_mask"].sum(-1).tolist()

    @pytest.mark.parametrize(
        ("example", "words"),
        [
            (("", 0), "empty text"),
            (("text", "ham"), "the label 'ham'.*classes="),
            (("text", -1), "the label -1"),
            (("text", 0.5), "the label 0.5"),
            (("text", torch.tensor([1, 2])), "the label tensor"),
            ((None, 1), "cannot be read"),
            ({"text": "a"}, "keys text"),
            ({"label": 1, "id": 3}, "keys label, id"),
            (7, "type int"),
        ],
    )
    def test_bad_examples(self, tokenizer, example, words):
        with pytest.raises(InputError, match=words):
            Classification(tokenizer).collate([example])

    def test_bad_batches_and_models(self):
        task = Classification()
        with pytest.raises(InputError, match=r"the label 3.*from 0 to 2"):
            task.losses(nn.Linear(4, 3), (torch.ones(2, 4), torch.tensor([0, 3])))
        with pytest.raises(InputError, match="of 1 class"):
            task.losses(nn.Linear(4, 1), (torch.ones(2, 4), torch.tensor([0, 0])))
        with pytest.raises(InputError, match=r"shape \[2, 5, 3\] for labels of shape \[2\]"):
            task.losses(nn.Linear(4, 3), (torch.ones(2, 5, 4), torch.tensor([0, 0])))
        with pytest.raises(InputError, match="with labels"):
            task.losses(nn.Linear(4, 3), {"x": torch.ones(2, 4)})
        with pytest.raises(InputError, match=r"the label 'eggs'.*one of ham, spam"):
            Classification(classes=["ham", "spam"]).collate([(torch.ones(2), "eggs")])


class TestFunction:
    def test_any_function(self):
        model = nn.Linear(3, 1)
        assert Function(lambda m, x: m(x).squeeze(-1)).losses(model, torch.ones(5, 3)).shape == (5,)

    @pytest.mark.parametrize("loss", [lambda m, x: m(x).mean(), lambda m, x: m(x), lambda m, x: x.sum(-1).long()])
    def test_refuses_what_is_not_one_loss_an_example(self, loss):
        with pytest.raises(InputError, match="the loss function returned"):
            Function(loss).losses(nn.Linear(3, 1), torch.ones(5, 3))


def test_tasks_work_inside_vmap(gpt2, tokenizer):
    """A batch can be cut along dim 0 of each tensor, and losses can be mapped over the cuts."""
    gpt2.set_attn_implementation("eager")  # Hugging Face's mask for sdpa looks at values
    task = CausalLM(tokenizer)
    batch = task.collate(TEXTS)
    parameters = {name: p.detach() for name, p in gpt2.named_parameters()}

    def loss(parameters, example):
        one = {name: value[None] for name, value in example.items()}
        return task.losses(_bound(gpt2, parameters), one)[0]

    gradients = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, batch)
    task.losses(gpt2, batch)[1].backward()
    weight = gpt2.transformer.h[0].mlp.c_fc.weight
    assert torch.allclose(gradients["transformer.h.0.mlp.c_fc.weight"][1], weight.grad)
    gpt2.zero_grad()


def _bound(model, parameters):
    class Bound(nn.Module):
        config = model.config

        def forward(self, **inputs):
            return torch.func.functional_call(model, parameters, (), inputs)

    return Bound()


def test_labels_are_not_written_to_by_a_model_that_moves_them_in_place():
    class Moves(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(9, 9)

        def prepare_decoder_input_ids_from_labels(self, labels):
            return labels.masked_fill_(labels == -100, 1).roll(1, -1)

        def forward(self, input_ids, decoder_input_ids):
            return self.embed(decoder_input_ids) + self.embed(input_ids).mean(1, keepdim=True)

    labels = torch.tensor([[3, 4, -100], [5, 6, 7]])
    batch = {"input_ids": torch.tensor([[1, 2], [3, 4]]), "labels": labels.clone()}
    Seq2SeqLM().losses(Moves(), batch)
    assert torch.equal(batch["labels"], labels)
