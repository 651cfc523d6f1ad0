"""Folders, globs, saved data sets and object stores: which files are the data, in which order, and what is refused."""

import json

import pyarrow as pa
import pyarrow.fs
import pyarrow.parquet
import pytest

from gradsketch import InputError
from gradsketch.reading import read_examples


@pytest.fixture
def put(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def written(name, *texts, as_lines=True):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".parquet":
            pyarrow.parquet.write_table(pa.table({"text": list(texts)}), path)
        elif path.suffix == ".jsonl":
            path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        else:
            path.write_text("\n".join(texts))

    return written


def texts(*arguments, **options):
    return [row["text"] for row in read_examples(*arguments, **options)]


@pytest.fixture
def clone(put):
    """What git clone makes of a data set of the hub."""
    put("hub/README.md", "---", "license: mit", "---", "# My data set")
    put("hub/LICENSE.txt", "words")
    put("hub/dataset_infos.json", "{}")
    put("hub/.git/objects/pack.jsonl", "no")
    put("hub/data/train-00000-of-00002.parquet", "a", "b")
    put("hub/data/train-00001-of-00002.parquet", "c")
    return put


def test_a_clone_of_a_hub_data_set_is_read_as_its_data(clone):
    assert texts("hub") == texts("hub/data") == texts("hub", split="train") == ["a", "b", "c"]
    assert read_examples("hub").where(2) == "hub/data/train-00001-of-00002.parquet, row 1"


def test_splits_are_not_mixed(clone):
    clone("hub/data/test-00000-of-00001.parquet", "t")
    clone("hub/data/dev.parquet", "d")
    with pytest.raises(InputError, match=r"of validation and of test and of train.*--split validation"):
        read_examples("hub")
    assert texts("hub", split="train") == ["a", "b", "c"]
    assert texts("hub", split="validation") == texts("hub", split="dev") == ["d"]
    assert texts("hub/data/t*.parquet") == ["t", "a", "b", "c"]  # a glob means what it says
    assert texts("hub/**/*.parquet", split="test") == ["t"]
    with pytest.raises(InputError, match=r"no split 'extra'.*one of validation, test, train"):
        read_examples("hub", split="extra")
    clone("folders/train/0.jsonl", "a")
    clone("folders/eval/0.jsonl", "b")
    assert texts("folders", split="test") == ["b"]


def test_files_come_in_the_order_of_their_names(put):
    for number in (10, 2, 1):
        put(f"sh/part-{number:02}.jsonl", f"{number}a", f"{number}b")
    put("sh/deeper/part-00.jsonl.ignored", "x")
    put("sh/empty.jsonl")
    assert texts("sh") == texts("sh/*.jsonl") == texts("sh/**/part-*") == ["1a", "1b", "2a", "2b", "10a", "10b"]
    rows = read_examples("sh")
    assert rows.read_range(1, 4) == [{"text": "1b"}, {"text": "2a"}, {"text": "2b"}]
    assert [rows[i]["text"] for i in (5, 0, 3)] == ["10b", "1a", "2b"]


def test_a_bad_row_of_a_shard_is_named_and_hides_no_other(put):
    put("sh/part-0.jsonl", "a")
    put("sh/part-1.jsonl", "b")
    with open("sh/part-1.jsonl", "a") as file:
        file.write('\n{bad\n"c"\n')
    found = read_examples("sh").read_range(0, 4)
    assert str(found.pop(2)).startswith("sh/part-1.jsonl, line 3: ")
    assert [row["text"] for row in found] == ["a", "b", "c"]
    with pytest.raises(InputError, match=r"sh/part-1\.jsonl, line 3"):
        list(read_examples("sh"))


def test_folders_named_after_columns(put):
    put("spark/_SUCCESS")
    put("spark/year=2020/lang=d%20e/part-0.parquet", "a", "b")
    put("spark/year=2021/lang=en/part-0.parquet", "c")
    rows = read_examples("spark")
    assert list(rows)[1:] == [
        {"year": "2020", "lang": "d e", "text": "b"},
        {"year": "2021", "lang": "en", "text": "c"},
    ]
    assert rows[2]["year"] == "2021"
    assert rows.where(2) == "spark/year=2021/lang=en/part-0.parquet, row 1"


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ("notes.txt", r"JSON lines \(\S*part-0\.jsonl, 2 in all\) and text \(\S*notes\.txt, 1 in all\)"),
        ("more.parquet", r"Parquet \(\S*more.parquet, 1 in all\) and JSON lines"),
        ("sub/more.json", r"JSON lines .* and JSON \("),
    ],
)
def test_two_kinds_are_refused_by_name(put, other, words):
    put("sh/part-0.jsonl", "a")
    put("sh/part-1.jsonl.gz", "b")
    put(f"sh/{other}", "b")
    for place in ("sh", "sh/**/*"):
        with pytest.raises(InputError, match=rf"two kinds of data: {words}"):
            read_examples(place)


def test_texts(put):
    put("only/README.md", "about")
    with pytest.raises(InputError, match=r"holds no example but README\.md"):
        read_examples("only")
    put("pages/README.md", "about")
    put("pages/b/test.md", "b")
    assert texts("pages") == ["b", "about"] or texts("pages") == ["about", "b"]
    put("mails/README.md", "about")
    put("mails/train.txt", "a", "b")
    put("mails/test.txt", "c")
    assert texts("mails") == texts("mails/*.txt") == ["c", "a\nb"]
    assert [row["path"] for row in read_examples("mails")] == ["test.txt", "train.txt"]


def test_what_is_not_there_is_told(put, tmp_path):
    put("lfs/a.parquet")
    (tmp_path / "lfs/a.parquet").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    with pytest.raises(InputError, match=r"lfs/a\.parquet is a pointer of git-lfs.*git lfs pull"):
        read_examples("lfs")
    put("links/b.jsonl", "b")
    (tmp_path / "links/a.jsonl").symlink_to("nowhere")
    with pytest.raises(InputError, match=r"links/a\.jsonl is a link to nothing"):
        read_examples("links")
    for place, words in (("no*.jsonl", "matches no file"), ("no.jsonl", "does not exist"), ("a/b/c", "does not exist")):
        with pytest.raises(InputError, match=words):
            read_examples(place)
    with pytest.raises(InputError, match="a revision"):
        read_examples("links/b.jsonl", revision="main")
    with pytest.raises(InputError, match="no split 'train'"):
        read_examples("links/b.jsonl", split="train")


def _save(folder, *shards):
    """What ``Dataset.save_to_disk`` writes."""
    folder.mkdir(parents=True)
    names = [f"data-{k:05}-of-{len(shards):05}.arrow" for k in range(len(shards))]
    for name, shard in zip(names, shards, strict=True):
        table = pa.table({"text": shard})
        with pa.OSFile(str(folder / name), "wb") as file, pa.ipc.new_stream(file, table.schema) as stream:
            stream.write_table(table, max_chunksize=1)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names]}))
    (folder / "dataset_info.json").write_text("{}")


def test_saved_data_sets(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    _save(tmp_path / "one", ["a", "b"], ["c"])
    assert texts("one") == ["a", "b", "c"]
    assert read_examples("one").where(2) == "one/data-00001-of-00002.arrow, row 1"
    _save(tmp_path / "both/train", ["a"])
    _save(tmp_path / "both/test", ["t"])
    (tmp_path / "both/dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    assert texts("both", split="test") == texts("both/test") == ["t"]
    with pytest.raises(InputError, match=r"splits train, test.*--split train"):
        read_examples("both")
    with pytest.raises(InputError, match=r"no split 'dev'.*one of train, test"):
        read_examples("both", split="dev")
    (tmp_path / "one/data-00000-of-00002.arrow").unlink()
    with pytest.raises(InputError, match="without its file data-00000"):
        read_examples("one")


def test_object_stores(clone, tmp_path, monkeypatch):
    """A bucket is a folder of a file system; here one on this disk in its place."""
    inside = pyarrow.fs.SubTreeFileSystem(str(tmp_path), pyarrow.fs.LocalFileSystem())
    monkeypatch.setattr(
        "gradsketch.reading.sources.pyarrow.fs.FileSystem", type("F", (), {"from_uri": lambda uri: (inside, uri[5:])})
    )
    clone("bucket.jsonl", "x", "y")
    assert (
        texts("s3://hub") == texts("s3://hub/data/train*.parquet") == texts("s3://hub/**/*.parquet") == ["a", "b", "c"]
    )
    assert texts("s3://bucket.jsonl") == ["x", "y"]
    assert read_examples("s3://hub").where(0) == "hub/data/train-00000-of-00002.parquet, row 1"
    for place in ("s3://none", "s3://hub/data/no*.parquet"):
        with pytest.raises(InputError, match="does not exist"):
            read_examples(place)


def test_other_file_systems_by_fsspec(monkeypatch):
    fsspec = pytest.importorskip("fsspec")
    memory = fsspec.filesystem("memory")
    for number in range(2):
        memory.pipe(f"/shelf/{number}.jsonl", b'{"text": "%d"}\n' % number)
    assert texts("memory://shelf") == texts("memory://shelf/*.jsonl") == ["0", "1"]
    assert texts("memory://shelf/1.jsonl") == ["1"]
    with pytest.raises(InputError, match=r"weird://x/y\.jsonl cannot be opened"):
        read_examples("weird://x/y.jsonl")


def test_links_to_folders_are_followed_once(put, tmp_path):
    put("data/a.jsonl", "here")
    put("elsewhere/b.jsonl", "linked")
    for name, target in {"other": "elsewhere", "again": "data", "above": "."}.items():
        (tmp_path / "data" / name).symlink_to(tmp_path / target)
    (tmp_path / "elsewhere" / "back").symlink_to(tmp_path / "data")
    assert texts(tmp_path / "data") == ["here", "linked"]


def test_rows_of_a_glob_do_not_depend_on_how_its_place_is_typed(put, tmp_path, monkeypatch):
    put("run=7/dev/data/year=2020/a.jsonl", "a")
    monkeypatch.chdir(tmp_path / "run=7" / "dev")
    for place in ("data/*/*.jsonl", str(tmp_path / "run=7/dev/data/*/*.jsonl"), "data", "data/year=2020/*.jsonl"):
        assert list(read_examples(place)) == [{"year": "2020", "text": "a"}]
    with pytest.raises(InputError, match="no split"):
        read_examples(str(tmp_path / "run=7/dev/data/*/*.jsonl"), split="validation")


def test_a_data_set_saved_with_a_list_of_its_rows_is_refused(tmp_path):
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_dict({"text": ["a", "b", "c"]}).save_to_disk(tmp_path / "saved")
    state = json.loads((tmp_path / "saved" / "state.json").read_text())
    state["_indices_data_files"] = [{"filename": "indices.arrow"}]
    (tmp_path / "saved" / "state.json").write_text(json.dumps(state))
    with pytest.raises(InputError, match="a list of the rows that count"):
        read_examples(tmp_path / "saved")
