"""What an index on disk is taken for: repaired where damaged, refused where foreign, one snapshot for each question."""

import errno
import json
import shutil

import pytest
import torch
import toys

import gradsketch as gs
from gradsketch.attribution.build import Build, build_index
from gradsketch.attribution.description import Description
from gradsketch.attribution.index import Index
from gradsketch.attribution.verify import verify_index
from gradsketch.durable import failed, record_text
from gradsketch.errors import DamageError, FingerprintError, GradsketchWarning, InputError, StoreError
from gradsketch.store.folder import LocalFolder, open_folder

D, ROWS = 96, 32
SHARD = "checkpoint-0/part-000000000008-000008.arrow"


def build(path, data=None, *, model=None, task=None, **options):
    given = {"d": D, "shard_rows": 8, "progress": False, "dtype": "float32"} | options
    return build_index(path, model or toys.TinyLM(), task or toys.language_task(), data or toys.texts(ROWS), **given)


def scores(path):
    index = Index.open(path, task=toys.language_task())
    return [(h.row, h.score) for h in index.query(toys.TinyLM(), toys.texts(2)[:1], k=ROWS)[0]]


def flip(file, place=None):
    data = bytearray(file.read_bytes())
    data[len(data) // 2 if place is None else place] ^= 4
    file.write_bytes(data)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    path = tmp_path_factory.mktemp("whole")
    build(path)
    return path


@pytest.fixture
def folder(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "index")


DAMAGES = {
    "a flipped bit": flip,
    "an empty file": lambda file: file.write_bytes(b""),
    "a cut file": lambda file: file.write_bytes(file.read_bytes()[: file.stat().st_size // 2]),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_shard_is_refused_and_made_again(folder, whole, damage):
    DAMAGES[damage](folder / SHARD)
    with pytest.raises(StoreError, match=r"000008\.arrow is damaged .*Run the command that built the index again"):
        scores(folder)
    assert not verify_index(open_folder(folder)).sound
    build(folder)
    assert (folder / SHARD).read_bytes() == (whole / SHARD).read_bytes()
    assert verify_index(open_folder(folder)).sound
    assert scores(folder) == scores(whole)


def test_a_plan_counts_damaged_rows(folder):
    flip(folder / SHARD)
    plan = Build(
        folder, toys.TinyLM(), toys.language_task(), toys.texts(ROWS), d=D, shard_rows=8, dtype="float32"
    ).plan(timed=False)
    assert plan.missing == 8


@pytest.mark.parametrize("name", ["index.json", "checkpoint-0/index.json"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_description_is_made_again_where_rows_prove_it(folder, whole, name, damage):
    DAMAGES[damage](folder / name)
    with pytest.raises(StoreError, match=r"index\.json"):
        scores(folder)
    build(folder)
    assert (folder / name).read_bytes() == (whole / name).read_bytes()
    for file in folder.rglob("*.arrow"):
        file.unlink()
    (folder / name).write_text('{"somebody": "else"}')
    with pytest.raises(DamageError):
        build(folder)
    assert (folder / name).read_text() == '{"somebody": "else"}'


def test_a_foreign_shard_is_refused_by_all(folder):
    """One of another grid, and one of this index's names that another index wrote."""
    shutil.copy(folder / SHARD, folder / "checkpoint-0/part-000000000007-000008.arrow")
    for use in (scores, build):
        with pytest.raises(StoreError, match="belongs to another index: move it away"):
            use(folder)
    found = verify_index(open_folder(folder))
    assert not found.sound
    assert "another index: move it away" in str(found)
    (folder / "checkpoint-0/part-000000000007-000008.arrow").unlink()
    build(folder.parent / "other", seed=1)
    shutil.copy(folder.parent / "other" / SHARD, folder / SHARD)
    for use in (scores, build):
        with pytest.raises(FingerprintError, match="fingerprint"):
            use(folder)
    assert not verify_index(open_folder(folder)).sound


def test_a_finished_index_that_cannot_be_written_is_opened(folder, monkeypatch):
    def refuse(*_, **__):
        raise failed("write", "it", OSError(errno.EROFS, "Read-only file system"))

    monkeypatch.setattr("gradsketch.store.folder.write_file", refuse)
    before = scores(folder)
    assert len(build(folder)) == ROWS
    assert scores(folder) == before
    (folder / SHARD).unlink()
    with pytest.raises(StoreError, match="no permission"):
        build(folder)


@pytest.mark.parametrize("name", ["../victim", "/tmp/victim", "checkpoint-1", "."])
def test_a_folder_outside_the_index_is_refused(folder, name):
    body = json.loads((folder / "index.json").read_text())
    body.pop("crc32")
    body["checkpoints"][0]["folder"] = name
    (folder / "index.json").write_text(record_text(body))
    with pytest.raises(DamageError):
        Description.read(LocalFolder(folder))


def test_another_version_is_told_apart_from_damage(folder):
    body = json.loads((folder / "index.json").read_text())
    for change in ({"version": 3}, {"format": "gradsketch-store"}):
        for text in (record_text({**body, **change} | {"crc32": None}), json.dumps({**body, **change})):
            record = json.loads(text)
            record.pop("crc32")
            for written in (record_text(record), json.dumps(record)):
                (folder / "index.json").write_text(written)
                with pytest.raises(StoreError, match="is of format"):
                    Description.read(LocalFolder(folder))


def test_all_files_are_verified(folder):
    audits = next(folder.glob("audits-*"))
    flip(audits)
    found = verify_index(open_folder(folder))
    assert not found.sound
    assert audits.name in found.beside[0]
    with pytest.raises(DamageError, match="audits"):
        Index.open(folder).audits  # noqa: B018


# --- one snapshot ---


class Growing:
    """A data set of one question during whose reading a builder writes the missing shards."""

    def __init__(self, folder):
        self.folder, self.question = folder, toys.texts(1)[0]

    def __len__(self):
        return 1

    def __getitem__(self, place):
        build(self.folder)
        return self.question


@pytest.mark.filterwarnings("ignore::gradsketch.errors.GradsketchWarning")
@pytest.mark.parametrize("score", ["ridge", "cosine"])
def test_a_question_sees_the_rows_that_were_there_when_it_began(folder, score):
    (folder / SHARD).unlink()
    index = Index.open(folder, task=toys.language_task())
    question = toys.texts(1)
    before = [(h.row, h.score) for h in index.query(toys.TinyLM(), question, k=ROWS, score=score)[0]]
    during = [(h.row, h.score) for h in index.query(toys.TinyLM(), Growing(folder), k=ROWS, score=score)[0]]
    assert during == before
    after = [(h.row, h.score) for h in index.query(toys.TinyLM(), question, k=ROWS, score=score)[0]]
    assert len(before) == ROWS - 8
    assert len(after) == ROWS
    assert after == scores(folder) or score != "ridge"


def test_rows_written_between_the_passes_do_not_count(folder, monkeypatch):
    """They come in after the preconditioner was made: a listing read twice would give mixed shapes."""
    (folder / SHARD).unlink()
    from gradsketch.attribution import scoring

    fit = scoring.fit_preconditioner

    def fit_and_build(*arguments, **options):
        made = fit(*arguments, **options)
        build(folder)
        return made

    index = Index.open(folder, task=toys.language_task())
    with pytest.warns(GradsketchWarning, match="24 of 32 rows"):
        right = [h.score for h in index.query(toys.TinyLM(), toys.texts(1), k=ROWS)[0]]
    monkeypatch.setattr(scoring, "fit_preconditioner", fit_and_build)
    index = Index.open(folder, task=toys.language_task())
    with pytest.warns(GradsketchWarning, match="24 of 32 rows"):
        assert [h.score for h in index.query(toys.TinyLM(), toys.texts(1), k=ROWS)[0]] == right


@pytest.mark.filterwarnings("ignore::gradsketch.errors.GradsketchWarning")
def test_rows_that_one_checkpoint_lacks_do_not_count(tmp_path):
    states = [toys.TinyLM().state_dict(), later().state_dict()]
    index = build(tmp_path, checkpoints=states)
    (tmp_path / "checkpoint-1/part-000000000008-000008.arrow").unlink()
    hits = index.query(toys.TinyLM(), toys.texts(1), k=ROWS)[0]
    assert sorted(h.row for h in hits) == [*range(8), *range(16, ROWS)]


# --- what decides the numbers ---


def later():
    model = toys.TinyLM()
    with torch.no_grad():
        model.head.weight += 0.1
    return model


def test_another_loss_function_of_the_same_name_is_refused(tmp_path):
    def loss_of(power):
        def loss(model, batch):
            return (model(batch["x"]) ** power).sum(1)

        return loss

    data, model = {"x": toys.vectors(8)["x"]}, toys.classifier()
    index = build(tmp_path, data, model=model, task=loss_of(2), d=40)
    with pytest.raises(FingerprintError, match="code"):
        build(tmp_path, data, model=model, task=loss_of(4), d=40)
    with pytest.raises(FingerprintError, match="code"):
        Index.open(tmp_path, task=loss_of(4)).query(model, data)
    assert len(index.query(model, data)) == 8
    assert len(Index.open(tmp_path, task=loss_of(2)).query(model, data)) == 8


class Leading(toys.Characters):
    """Another first token, and the same vocabulary."""

    def __call__(self, text, **options):
        return {"input_ids": [1, *super().__call__(text, **options)["input_ids"]]}


Leading.__name__ = "Characters"


def test_another_tokenisation_of_one_vocabulary_is_refused(folder):
    with pytest.raises(FingerprintError, match="vocabulary"):
        Index.open(folder, task=gs.CausalLM(Leading())).query(toys.TinyLM(), "the number")


@pytest.mark.parametrize("change", ["normaliser", "prefix space", "first token"])
def test_tokenizers_of_one_vocabulary_are_told_apart(change):
    tokenizers = pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")
    from gradsketch.gradients.tasks.tokens import vocabulary

    def made(*, lower=False, prefix=False, first=False):
        words = {chr(i): i - 31 for i in range(32, 127)} | {"<s>": 0, "Ġ": 96, "Ċ": 97, "ĉ": 98}
        core = tokenizers.Tokenizer(tokenizers.models.BPE(words, [], unk_token="<s>"))
        core.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=prefix)
        if lower:
            core.normalizer = tokenizers.normalizers.Lowercase()
        if first:
            core.post_processor = tokenizers.processors.TemplateProcessing("<s> $A", None, [("<s>", 0)])
        return transformers.PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>")

    plain = made()
    other = made(lower=change == "normaliser", prefix=change == "prefix space", first=change == "first token")
    assert vocabulary(plain) == vocabulary(made()) != vocabulary(other)
    plain("a" * 50, truncation=True, max_length=4)  # a setting that a call leaves behind
    assert vocabulary(plain) == vocabulary(made())


def test_the_version_of_an_inner_kind_is_in_the_fingerprint(monkeypatch):
    sketch = gs.BlockSum({"w": (30, 20)}, 16, kind="affd")
    before = sketch.fingerprint
    monkeypatch.setattr(gs.AFFD, "version", gs.AFFD.version + 1)
    assert sketch.fingerprint != before


def test_checkpoints_that_are_the_same_tensors_are_noticed(tmp_path):
    model = toys.TinyLM()
    with pytest.raises(InputError, match=r"'checkpoint-0' and 'checkpoint-1', which are the same tensors"):
        build(tmp_path / "a", checkpoints=[model.state_dict(), model.state_dict()])
    copies = [{n: t.clone() for n, t in model.state_dict().items()} for _ in range(2)]
    with pytest.warns(GradsketchWarning, match="hold the same weights"):
        build(tmp_path / "b", checkpoints=copies)


# --- bad rows ---


def test_what_cannot_be_stored_is_a_bad_row(tmp_path):
    deep = "[" * 5000 + "]" * 5000
    lines = ['{"text": "one"}', '{"text": "two", "name": "\\ud800"}', '{"text": "a\\udfff"}', '{"text": "x", "n": %s}']
    lines = [*lines[:3], lines[3] % deep, '{"text": "last", "\\ud800": 1}', '{"text": "three", "id": "\\ud800"}']
    file = tmp_path / "data.jsonl"
    file.write_text("\n".join(lines))
    with pytest.raises(InputError, match=r"5 of 6 rows .*data\.jsonl, line 2 .*line 3.*line 4 .*line 5.*line 6"):
        build(tmp_path / "a", file)
    assert list(build(tmp_path / "b", file, skip_bad=True).left_out) == [1, 2, 3, 4, 5]


def test_what_a_tokenizer_raises_is_a_bad_row(tmp_path):
    class Picky(toys.Characters):
        def __call__(self, text, **options):
            if "5" in text:
                raise IndexError("list index out of range")
            return super().__call__(text, **options)

    task = gs.CausalLM(Picky())
    with pytest.raises(InputError, match=r"1 of 8 rows .*example 5 .*IndexError"):
        build(tmp_path / "a", toys.texts(8), task=task)
    index = build(tmp_path / "b", toys.texts(8), task=task, skip_bad=True)
    with pytest.raises(InputError, match=r"query 1: .*IndexError"):
        index.query(toys.TinyLM(), ["the number", "5"])


def test_only_bad_rows_are_no_index(tmp_path):
    with pytest.raises(InputError, match=r"2 of 2 rows .*Drop it\.$"):
        build(tmp_path / "i", ["", " "[:0]], skip_bad=True)


def test_a_row_that_is_not_finite_is_named_as_a_person_finds_it(tmp_path):
    file = tmp_path / "data.jsonl"
    file.write_text("\n".join(json.dumps({"x": [float(i), 1.0], "y": 0}) for i in range(20)))

    def loss(model, batch):
        output = model(torch.stack(batch["x"], 1).float()).sum(1)
        return torch.where(batch["x"][0] == 13, torch.nan, 1.0) * output

    options = {"model": torch.nn.Linear(2, 2), "task": loss, "d": 4}
    with pytest.raises(gs.NonFiniteError, match=r"data\.jsonl, line 14: its loss is nan.*skip_bad=True"):
        build(tmp_path / "a", file, **options)
    values = build(tmp_path / "b", file, skip_bad=True, **options).self_influence("dot")
    assert 13 not in [row for row, _, _ in values.top(100)]
    assert len(values.top(100)) == 19


def test_memory_that_runs_out_while_a_shard_is_made_is_told(tmp_path, monkeypatch):
    def out_of_memory(*_, **__):
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")

    monkeypatch.setattr("gradsketch.store.store.encode_shard", out_of_memory)
    with pytest.raises(InputError, match=r"a shard of 8 rows of d = 96 does not fit .*smaller shard_rows"):
        build(tmp_path / "i")


def test_weights_that_change_during_a_build_are_refused_before_their_rows_are_written(tmp_path):
    model, task, data = toys.classifier(), toys.vector_task(), toys.vectors(40)

    def trained_meanwhile(rows):
        if any(torch.equal(row["x"], data["x"][20]) for row in rows):
            next(model.parameters()).data.mul_(1.5)  # past the version counter, as fused optimisers do
        return task.collate(rows)

    function = gs.Function(task.losses, collate=trained_meanwhile)
    options = {"d": 16, "shard_rows": 8, "batch_tokens": 4, "progress": False}
    with pytest.raises(FingerprintError, match=r"weights that changed while rows .* were sketched"):
        gs.build_index(tmp_path, model, function, data, **options)
    assert len(list((tmp_path / "checkpoint-0").glob("*.arrow"))) == 2


class Tempered(torch.nn.Module):
    """What it computes depends on a number that is no tensor."""

    def __init__(self, temperature):
        super().__init__()
        self.inner, self.temperature = toys.classifier(), temperature

    def forward(self, x):
        return self.inner(x) / self.temperature


@pytest.mark.parametrize("worker", [(0, 2), (1, 2), (0, 1)], ids=["half-done", "the-other-half", "done"])
def test_a_model_that_computes_something_else_does_not_go_on_with_an_index(tmp_path, worker):
    task, data = toys.vector_task(), toys.vectors(40)
    options = {"d": 16, "shard_rows": 8, "progress": False}
    gs.build_index(tmp_path, Tempered(1.0), task, data, worker=worker, **options)
    there = sorted((tmp_path / "checkpoint-0").iterdir())
    with pytest.raises(FingerprintError, match=r"a loss of .* with which it stands in .*adapters and their scales"):
        gs.build_index(tmp_path, Tempered(1.5), task, data, **options)
    assert sorted((tmp_path / "checkpoint-0").iterdir()) == there  # nothing of another function was written
    assert len(gs.build_index(tmp_path, Tempered(1.0), task, data, **options)) == 40


def test_other_data_is_refused_before_anything_is_written(tmp_path):
    build(tmp_path)
    (tmp_path / "checkpoint-0/part-000000000000-000008.arrow").unlink()
    there = sorted((tmp_path / "checkpoint-0").iterdir())
    data = toys.texts(ROWS)
    data[12] += " or so"
    with pytest.raises(FingerprintError, match="rows 8 to 15"):
        build(tmp_path, data)
    assert sorted((tmp_path / "checkpoint-0").iterdir()) == there


class TemperedLM(toys.TinyLM):
    temperature = 1.0

    def forward(self, input_ids):
        return super().forward(input_ids) / self.temperature


def test_a_question_to_a_model_that_computes_something_else_says_so(tmp_path):
    index, model = build(tmp_path, model=TemperedLM()), TemperedLM()
    index.query(model, toys.texts(1))
    model.temperature = 0.02
    with pytest.warns(GradsketchWarning, match="the loss of its row 0 is .*, not .* temperature"):
        index.query(model, toys.texts(1))
