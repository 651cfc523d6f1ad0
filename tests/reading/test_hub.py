"""Data sets of the hub: which names mean one, what datasets is asked for, and one line in seconds without a network."""

import socket
import sys
import time
import types

import pytest

import gradsketch as gs
from gradsketch.attribution.examples import as_examples
from gradsketch.reading import connection, read_examples

constants = pytest.importorskip("huggingface_hub.constants")


class Loaded(list):
    """What datasets hands over, as far as it is used."""

    def __init__(self, texts):
        super().__init__(texts)
        self.format = {"type": None}

    def __getitem__(self, i):
        return {"text": super().__getitem__(i)}


@pytest.fixture
def datasets(monkeypatch):
    """A library of the name datasets that notes what it is asked for."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    asked = []
    fake = types.ModuleType("datasets")
    fake.config = types.ModuleType("datasets.config")
    fake.config.HF_HUB_OFFLINE = False
    monkeypatch.setitem(sys.modules, "datasets.config", fake.config)
    fake.splits = ["train"]

    def load_dataset(*where, **options):
        asked.append((where, options, fake.config.HF_HUB_OFFLINE))
        return Loaded(["a", "b"])

    fake.get_dataset_split_names = lambda *where, **options: fake.splits
    fake.load_dataset = load_dataset
    fake.asked = asked
    monkeypatch.setitem(sys.modules, "datasets", fake)
    monkeypatch.setattr(connection, "hub_reached", lambda: True)
    return fake


@pytest.mark.parametrize(
    ("place", "where", "revision"),
    [
        ("owner/name", ("owner/name",), None),
        ("squad", ("squad",), None),
        ("hf://datasets/owner/name", ("owner/name",), None),
        ("hf://owner/name-v1.5@main", ("owner/name-v1.5",), "main"),
        ("owner/name:sst2@abc", ("owner/name", "sst2"), "abc"),
    ],
)
def test_names_of_the_hub(datasets, tmp_path, monkeypatch, place, where, revision):
    monkeypatch.chdir(tmp_path)
    rows = read_examples(place)
    assert datasets.asked == [(where, {"split": "train", "revision": revision}, False)]
    assert list(rows) == [{"text": "a"}, {"text": "b"}]
    assert rows.path == place
    assert rows.where(1) == f"{place}, row 2"


def test_a_file_or_folder_of_that_name_goes_before_the_hub(datasets, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "squad").mkdir()
    (tmp_path / "squad" / "a.jsonl").write_text('"mine"\n')
    assert list(read_examples("squad")) == [{"text": "mine"}]
    for place in ("none.jsonl", "./none", "owner/name.csv.gz", "data/*.parquet", "a/b/c", "what.docx"):
        with pytest.raises(gs.InputError, match=r"does not exist|matches no file"):
            read_examples(place)
    assert not datasets.asked


def test_split_and_revision(datasets):
    read_examples("owner/name", split="test", revision="v2")
    assert datasets.asked.pop()[1] == {"split": "test", "revision": "v2"}
    with pytest.raises(gs.InputError, match="one revision"):
        read_examples("owner/name@v1", revision="v2")
    datasets.splits = ["train", "test"]
    with pytest.raises(gs.InputError, match=r"has the splits train, test.*--split train"):
        read_examples("owner/name")
    assert not datasets.asked


def test_files_of_the_hub_are_one_line_without_a_network():
    began = time.perf_counter()
    with pytest.raises(gs.InputError, match="no connection to the hub"):
        read_examples("hf://datasets/owner/name/data/*.parquet")
    assert time.perf_counter() - began < 4


def test_what_datasets_raises_is_one_line(datasets):
    def refuse(*_, **__):
        raise ValueError("Config name is missing.\nPlease pick one among: ['a', 'b']")

    datasets.get_dataset_split_names = refuse
    with pytest.raises(gs.InputError, match=r"owner/name cannot be loaded \(Config name is missing\)"):
        read_examples("owner/name")


def test_without_a_network_what_this_disk_has_is_taken(datasets, monkeypatch):
    monkeypatch.setattr(connection, "hub_reached", lambda: False)
    read_examples("owner/name")
    assert datasets.asked.pop()[2] is True
    assert (False, constants.is_offline_mode()) == (datasets.config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE)
    with pytest.raises(gs.InputError, match="a revision cannot be checked"):
        read_examples("owner/name", revision="v1")


def test_without_datasets_the_package_is_named(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(gs.InputError, match=r"pip install 'gradsketch\[data\]'"):
        read_examples("mistyped/folder")


def test_whether_a_server_answers(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert connection.reached(f"http://127.0.0.1:{port}")
        monkeypatch.setenv("https_proxy", f"http://127.0.0.1:{port}")
        assert connection.reached("https://no.such.host.invalid")  # by the proxy, which can look it up
    assert not connection.reached(f"http://127.0.0.1:{port}")
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{port}")
    assert not connection.hub_reached()
    with socket.create_server(("127.0.0.1", port)):
        assert connection.hub_reached()
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        assert not connection.hub_reached()


def test_a_name_server_that_does_not_answer_is_waited_for_two_seconds(monkeypatch):
    monkeypatch.setattr(connection, "_SECONDS", 0.1)
    monkeypatch.setattr("socket.create_connection", lambda *_: waits())

    def waits():
        time.sleep(5)
        raise OSError

    began = time.perf_counter()
    assert not connection.reached("https://example.com")
    assert time.perf_counter() - began < 2


def test_no_network_is_one_line_in_seconds(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(pytest.importorskip("datasets").config, "HF_HUB_OFFLINE", False)
    began = time.perf_counter()
    with pytest.raises(gs.InputError, match="the hub is out of reach, and this disk does not have it"):
        read_examples("nobody/nothing")
    assert time.perf_counter() - began < 8


def test_data_sets_of_the_library(tmp_path):
    datasets = pytest.importorskip("datasets")
    records = [{"text": f"row {i}", "tags": ["a"] * (i % 3), "n": None if i == 4 else i} for i in range(10)]
    data = datasets.Dataset.from_list(records)
    rows = as_examples(data)
    assert list(rows) == records == rows.read_range(0, 10)
    assert as_examples(data.with_format("numpy", columns=["n"]))[3]["n"] == 3
    datasets.DatasetDict({"train": data, "test": data.select([3])}).save_to_disk(
        tmp_path / "saved", num_shards={"train": 3, "test": 1}
    )
    assert list(read_examples(tmp_path / "saved", split="train")) == records
    assert list(read_examples(tmp_path / "saved" / "test")) == [records[3]]
    with pytest.raises(gs.InputError, match="Pass one part"):
        as_examples(datasets.load_from_disk(str(tmp_path / "saved")))
    with pytest.raises(gs.InputError, match="IterableDataset"):
        as_examples(data.to_iterable_dataset())
