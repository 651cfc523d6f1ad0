"""CSV and TSV: texts stay texts, no row is lost, and a quote that swallows lines is named where it opened."""

import csv
import random
import string

import pyarrow as pa
import pyarrow.csv
import pytest

from gradsketch import GradsketchWarning, InputError
from gradsketch.reading import read_examples


@pytest.fixture
def write(tmp_path):
    def written(name, content):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return written


def test_a_quote_in_tsv_is_a_letter_and_no_row_is_lost(write):
    lines = ['1\tHe said "no" and left\tx', '2\t"Quoted start without an end\ty', "3\tplain\tz", '5\t5" pipe\tv']
    rows = read_examples(write("q.tsv", "\n".join(["id\ttext\tlabel", *lines, ""])))
    assert ["\t".join(row.values()) for row in rows] == lines
    assert rows.where(2) == "q.tsv, line 4"


def test_a_tsv_whose_header_is_quoted_is_quoted(tmp_path):
    table = pa.table({"text": ['a "b"', "two\nlines\tand a tab"], "label": [1, 2]})
    pyarrow.csv.write_csv(table, tmp_path / "a.tsv", pyarrow.csv.WriteOptions(delimiter="\t"))
    assert list(read_examples(tmp_path / "a.tsv")) == table.to_pylist()


def test_a_field_of_tsv_that_looks_quoted_is_told(write):
    path = write("a.tsv", 'text\tl\nplain\t1\n"He said ""no"""\t2\n')
    with pytest.warns(GradsketchWarning, match=r"a\.tsv, line 3: a field that looks quoted"):
        rows = read_examples(path)
    assert rows[1]["text"] == '"He said ""no"""'


@pytest.mark.parametrize(
    ("body", "line"),
    [
        ('1,fine,a\n2,"never closed,b\n3,plain,c\n', 3),
        ('1,fine,a\n2,"open,b\n3,"closed by the next quote",c\n', 3),
        ('1,fine,a\n2,"open,b\n3,he said "hi",c\n', 3),
        ('1,fine,a\n2,"open,b\n3,closed at the end of a field"\n4,plain,d\n', 3),
        ('1,"two\nlines",a\n\n2,"open,b\n3,plain,c\n', 5),
        ('1,"' + "x\n" * 3, 2),
    ],
)
@pytest.mark.parametrize("filler", [0, 100_000])  # the quote may open in another piece of the file
def test_a_quote_that_swallows_lines_is_refused_where_it_opened(write, body, line, filler):
    path = write("q.csv", "id,text,label\n" + "7,words of a row,z\n" * filler + body)
    with pytest.raises(InputError, match=rf"q\.csv, line {line + filler}: a quote opens"):
        read_examples(path)


def test_a_quote_without_an_end_does_not_take_the_memory(write, monkeypatch):
    monkeypatch.setattr("gradsketch.reading.delimited.LONGEST_RECORD", 1000)
    path = write("q.csv", 'text\n"' + "x\n" * 2_000_000 + '"\n')
    with pytest.raises(InputError, match=r"q\.csv, line 2"):
        read_examples(path)
    with pytest.raises(InputError, match="line 3 is longer than 1,000 bytes"):
        read_examples(write("long.csv", "text\na\n" + "x" * 3_000_000))


def test_only_numbers_that_are_written_as_numbers_are_numbers(write):
    head = "id,zip,version,big,plus,count,share,mixed,missing,nothing,sci,nan,text,doc_id"
    one = "1,02139,1.10,12345678901234567890,+1,7,0.5,1,,,1e5,NaN,1,4"
    two = "2,10115,1.1,12345678901234567891,2,-7,-0.25,2.5,3,,2,1.0,2,5"
    first, second = read_examples(write("a.csv", f"{head}\n{one}\n{two}\n"))
    as_text = {"id", "zip", "version", "big", "plus", "sci", "nan", "text", "nothing", "doc_id"}
    written = dict(zip(head.split(","), one.split(","), strict=True))
    assert {name: first[name] for name in as_text} == {name: written[name] for name in as_text}
    assert (first["count"], second["count"], type(first["count"])) == (7, -7, int)
    assert (first["share"], second["share"]) == (0.5, -0.25)
    assert (first["mixed"], second["mixed"]) == (1.0, 2.5)
    assert (first["missing"], second["missing"]) == (None, 3)


def test_a_column_is_of_numbers_only_where_it_is_in_all_of_the_file_and_all_files(write, tmp_path):
    late = write("late.csv", "zip,text\n" + "10115,a\n" * 300_000 + "02139,b\n")
    assert {row["zip"] for row in read_examples(late)[:300]} == {"10115"}
    write("part-0.csv", "zip,text,n\n10115,a,1\n")
    write("part-1.csv", "zip,text,n\n02139,b,0.5\n")
    late.unlink()
    assert list(read_examples(tmp_path)) == [
        {"zip": "10115", "text": "a", "n": 1.0},
        {"zip": "02139", "text": "b", "n": 0.5},
    ]


def test_odd_files(write):
    bom = b'\xef\xbb\xbf"text","label"\r\n"bom and crlf","a"\r\nb,""\r\n'
    assert list(read_examples(write("bom.csv", bom))) == [
        {"text": "bom and crlf", "label": "a"},
        {"text": "b", "label": ""},
    ]
    assert list(read_examples(write("semi.csv", "text;label\na, b;1\n"))) == [{"text": "a, b", "label": 1}]
    words = write("words.csv", "\ntext,label\n\nNA,null\n   \nnone,None")
    assert list(read_examples(words)) == [{"text": "NA", "label": "null"}, {"text": "none", "label": "None"}]
    assert read_examples(words).where(1) == "words.csv, line 6"
    assert list(read_examples(write("index.csv", ",text\n0,a\n"))) == [{"column 1": 0, "text": "a"}]
    for name, content, words in (
        ("twice.csv", "text,text\na,b\n", "two columns called 'text'"),
        ("mac.csv", "text\ra\rb\r", "carriage returns alone"),
        ("wide.csv", "text\na\n".encode("utf-16"), "UTF-16"),
    ):
        with pytest.raises(InputError, match=words):
            read_examples(write(name, content))


@pytest.mark.parametrize(
    ("row", "words"),
    [(b"x\xff,1", "UTF8"), (b"a\rb,1", "Expected 2 columns|carriage return"), (b"1,2,3", "got 3")],
)
def test_a_bad_row_of_csv_is_named_alone(write, row, words):
    rows = read_examples(write("a.csv", b"text,n\n" + b"good,1\n" * 40 + row + b"\n" + b"good,2\n" * 40))
    found = rows.read_range(0, len(rows))
    assert [i for i, each in enumerate(found) if isinstance(each, InputError)] == [40]
    assert found[39] == {"text": "good", "n": 1}
    with pytest.raises(InputError, match=rf"a\.csv, line 42: .*({words})"):
        rows[40]


def test_what_pythons_writer_writes_comes_back(tmp_path, monkeypatch):
    """Fields of quotes, commas, line ends and letters, as a spreadsheet would write them, in many pieces."""
    monkeypatch.setattr("gradsketch.reading.sources.PIECE", 20_000)
    draw = random.Random(0)
    letters = string.ascii_letters + '",;\t é🎈\n' * 3
    records = [["".join(draw.choices(letters, k=draw.randrange(60))) for _ in range(3)] for _ in range(5000)]
    with (tmp_path / "a.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([["a", "b", "c"], *records])
    rows = read_examples(tmp_path / "a.csv")
    assert [list(row.values()) for row in rows] == [record for record in records if any(map(str.strip, record))]
    assert list(rows[-1].values()) == records[-1]
