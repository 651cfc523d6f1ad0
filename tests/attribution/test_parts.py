"""Data is read part by part: nothing before its turn comes, and nothing that another process will read."""

import pytest
import torch
import toys

import gradsketch as gs
from gradsketch.errors import FingerprintError, InputError, StoreError

D, ROWS, SHARD = 64, 40, 8


class Recorded(list):
    """Data that remembers which of its rows were read, and stops the run where it is told to."""

    def __init__(self, rows, stop=None):
        super().__init__(rows)
        self.read, self.stop = [], stop

    def __getitem__(self, place):
        if place == self.stop and place not in (0, len(self) - 1):
            raise KeyboardInterrupt
        self.read.append(place)
        return super().__getitem__(place)


def build(path, data, **options):
    given = {"d": D, "shard_rows": SHARD, "dtype": "float32", "progress": False} | options
    return gs.build_index(path, toys.TinyLM(), toys.language_task(), data, **given)


def sketches(index):
    return torch.cat([shard.decoded() for shard in index.stores[0]])


def finished(path):
    return sorted(file.name for file in path.glob("checkpoint-0/*.arrow"))


def test_a_shard_is_written_before_the_next_is_read(tmp_path):
    data = Recorded(toys.texts(ROWS), stop=SHARD)
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path, data)
    assert set(data.read) == {*range(SHARD), ROWS - 1}  # the last tells this data from other data
    assert len(finished(tmp_path)) == 1


def test_a_process_reads_its_own_shards(tmp_path):
    data = [Recorded(toys.texts(ROWS)) for _ in range(2)]
    for number in range(2):
        build(tmp_path / "a", data[number], worker=(number, 2))
    assert sorted({*data[0].read} - {ROWS - 1}) == [*range(0, 8), *range(16, 24), *range(32, 39)]
    compared = range(8)  # rows that the other has done, whose losses show whether the model is the same
    assert sorted({*data[1].read} - {*compared, ROWS - 1}) == [*range(8, 16), *range(24, 32)]
    assert torch.equal(sketches(gs.Index.open(tmp_path / "a")), sketches(build(tmp_path / "b", toys.texts(ROWS))))


def test_a_bad_row_stops_the_run_at_its_shard_and_goes_on_once_it_is_repaired(tmp_path):
    rows = toys.texts(ROWS)
    with pytest.raises(InputError, match=r"1 of 8 rows .*example 20 \(an empty text\)"):
        build(tmp_path / "a", [*rows[:20], "", *rows[21:]])
    assert len(finished(tmp_path / "a")) == 2
    index = build(tmp_path / "a", rows)
    assert torch.equal(sketches(index), sketches(build(tmp_path / "b", rows)))


def test_rows_that_change_after_they_were_indexed_are_refused(tmp_path):
    rows = toys.texts(ROWS)
    build(tmp_path, rows)
    for place in (1, 17, 38):
        with pytest.raises(FingerprintError, match=rf"other data: rows {place // SHARD * SHARD} to .* differ"):
            build(tmp_path, [*rows[:place], "changed", *rows[place + 1 :]])
    # Also where the shard is of no process but this one's.
    with pytest.raises(FingerprintError, match="rows 16 to 23"):
        build(tmp_path, [*rows[:17], "changed", *rows[18:]], worker=(0, 2))


def test_a_bad_row_counts_as_the_same_data_while_it_stays_as_it_is(tmp_path):
    rows = toys.texts(ROWS)
    bad = [*rows[:3], "", *rows[4:]]
    assert list(build(tmp_path, bad, skip_bad=True).left_out) == [3]
    assert list(build(tmp_path, bad, skip_bad=True).left_out) == [3]
    with pytest.raises(FingerprintError, match="rows 0 to 7"):
        build(tmp_path, rows, skip_bad=True)


def test_data_of_which_nothing_can_be_used(tmp_path):
    with pytest.raises(InputError, match="8 of 8 rows"):
        build(tmp_path / "a", [""] * ROWS, skip_bad=True)
    assert not (tmp_path / "a").exists()


def test_explained_rows_are_those_of_the_data_where_some_are_left_out(tmp_path):
    """A row's number is its place, so that the data's own rows can be explained."""
    ids = [toys.Characters()(text)["input_ids"] for text in toys.texts(4)]
    data = [{"input_ids": []}, *({"input_ids": row} for row in ids)]
    index = build(tmp_path, data, skip_bad=True)
    model = toys.TinyLM()
    hits = index.query(model, data[3:4], k=1, score="cosine")
    assert hits[0][0].row == 3
    explained = index.explain(model, hits, data=data)[0][0]
    assert sum(t.value for t in explained.tokens) + explained.beyond_tokens == pytest.approx(1, abs=1e-3)


def test_a_shard_of_an_older_format_is_not_mixed_with_new_ones(tmp_path):
    build(tmp_path, toys.texts(ROWS))
    file = tmp_path / "checkpoint-0/index.json"
    file.write_text(file.read_text().replace('"version": 2', '"version": 1'))
    with pytest.raises(StoreError, match="format version 1"):
        build(tmp_path, toys.texts(ROWS))


def test_bad_rows_are_told_as_they_are_met(tmp_path, capsys):
    rows = toys.texts(ROWS)
    for place in (3, 4, 5, 20, 21, 22, 33):
        rows[place] = ""
    build(tmp_path, rows, skip_bad=True, progress=True)
    told = [line for line in capsys.readouterr().err.splitlines() if "left out" in line]
    assert [line.split("example ")[1].split(":")[0] for line in told] == ["3", "4", "5", "20", "21"]
    build(tmp_path, rows, skip_bad=True, progress=False)
    assert "left out" not in capsys.readouterr().err


class Plain(gs.Task):
    """Takes rows as they are."""

    def collate(self, examples):
        return torch.tensor([[float(number) for number in row["text"].split()] for row in examples])

    def losses(self, model, batch):
        return model(batch).square().sum(-1)


class Damaged(Recorded):
    """Data whose row 5 cannot be read."""

    def __getitem__(self, place):
        if place == 5:
            raise OSError("damaged")
        return super().__getitem__(place)


def test_of_large_rows_that_a_task_takes_as_they_are_few_are_held(tmp_path, monkeypatch):
    """A part of 16,384 pictures of 50 kB was 820 MB; the data is read twice instead, and the sketches are the same."""
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2)
    rows = [{"text": f"{i} 1 {i % 7}"} for i in range(ROWS)]
    held, again = (Damaged(rows) for _ in range(2))
    kept = build_with(tmp_path / "held", model, held)
    monkeypatch.setattr("gradsketch.attribution.parts._RAW_BYTES", 60)
    read_twice = build_with(tmp_path / "again", model, again)
    assert torch.equal(sketches(kept).nan_to_num(), sketches(read_twice).nan_to_num())
    assert held.read.count(20) < again.read.count(20)


def build_with(path, model, data):
    options = {"d": 8, "shard_rows": 16, "dtype": "float32", "progress": False, "skip_bad": True}
    return gs.build_index(path, model, Plain(), data, **options)
