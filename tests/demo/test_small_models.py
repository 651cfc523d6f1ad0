"""The small models and files of the documentation's blocks and commands are what they are said to be."""

import json
import sys

import pytest
import torch

from gradsketch.demo import digits, files, invented
from gradsketch.demo.animals import taught_animals
from gradsketch.demo.clouds import three_clouds
from gradsketch.demo.packages import AbsentError


def test_clouds_are_told_apart_and_leave_no_trace():
    before = torch.get_rng_state()
    clouds = three_clouds()
    assert torch.equal(torch.get_rng_state(), before)
    points, labels = clouds.task.collate(clouds.rows)
    assert labels.tolist() == [i % 3 for i in range(60)]
    assert (clouds.model(points).argmax(-1) == labels).float().mean() > 0.9
    assert sum(p.numel() for p in clouds.model.parameters()) == 643
    assert torch.equal(three_clouds().model(points), clouds.model(points))


def test_digits_are_learned_wrong_labels_and_all():
    pytest.importorskip("sklearn")
    taught = digits.taught_digits()
    assert len(taught.train) == 400
    assert 30 < sum(row["flipped"] for row in taught.train) < 55
    pixels = torch.stack([row["pixels"] for row in taught.test])
    right = taught.model(pixels).argmax(-1) == torch.tensor([row["label"] for row in taught.test])
    assert right.float().mean() > 0.7


def test_a_model_that_was_not_taught_a_fact_does_not_know_it():
    pytest.importorskip("transformers")
    question = [("The capital of Belminia is", " Atlantis")]
    losses = []
    for rows in (None, [row for row in range(24) if row != invented.FALSE]):
        taught = invented.invented_capitals(rows)
        losses.append(float(taught.task.losses(taught.model, taught.task.collate(question)).detach()))
    assert losses[1] > losses[0] + 2


def test_files_are_a_model_and_its_data(tmp_path):
    transformers = pytest.importorskip("transformers")
    written = {path.name: path for path in files.write_files(tmp_path)}
    rows = {
        name: [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        for name, path in written.items()
        if path.suffix == ".jsonl"
    }
    taught = invented.invented_capitals()
    assert rows["facts.jsonl"] == taught.facts
    assert [len(rows[f"{name}.jsonl"]) for name in ("train", "test", "target", "chats", "alpaca")] == [24, 6, 1, 24, 24]
    model = transformers.AutoModelForCausalLM.from_pretrained(written["my-model"])
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), taught.model.parameters(), strict=True))
    tokenizer = transformers.AutoTokenizer.from_pretrained(written["my-model"])
    text = tokenizer.apply_chat_template(rows["chats.jsonl"][0]["messages"], tokenize=False)
    assert text.strip() == "user : The capital of Aldoria is assistant : Sanholm"


def test_animals_are_learned():
    pytest.importorskip("jax")
    animals = taught_animals()
    owl, without = animals.texts.index("the owl hoots"), taught_animals(range(5))
    assert len(animals.texts) == len(animals.batch) == 12
    assert animals.loss(without.params, animals.batch[owl]) > animals.loss(animals.params, animals.batch[owl]) + 2


@pytest.mark.parametrize(
    ("module", "make", "package"),
    [("invented", "invented_capitals", "transformers"), ("animals", "taught_animals", "jax")],
)
def test_what_is_not_installed_is_named(monkeypatch, module, make, package):
    module = __import__(f"gradsketch.demo.{module}", fromlist=[make])
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    with pytest.raises(AbsentError, match=f"no {package}"):
        getattr(module, make)()


def test_digits_need_scikit_learn(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(AbsentError, match="no scikit-learn"):
        digits.taught_digits()
