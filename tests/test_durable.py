"""Files are whole or not there, damage is found, and another work's state is refused by name."""

import ast
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import gradsketch as gs
from gradsketch import durable
from report.sample import everyday

OLD = "what was there"
SRC = Path(gs.__file__).parent


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "file"
    path.write_text(OLD)
    return path


def alone(path, text=OLD):
    """Whether a folder holds this one file, with this text."""
    return [p.name for p in path.parent.iterdir()] == [path.name] and path.read_text() == text


# --- whole or not at all ---


@pytest.mark.parametrize("data", ["Zürich", "Zürich".encode(), memoryview("Zürich".encode())], ids=type)
def test_a_file_is_written_with_its_folder(data, tmp_path):
    assert durable.write_file(tmp_path / "a/b/file", data)
    assert alone(tmp_path / "a/b/file", "Zürich")


def test_a_file_is_replaced_unless_it_must_not(path):
    assert not durable.write_file(path, "new", replace=False)
    assert alone(path)
    assert durable.write_file(path, "new")
    assert alone(path, "new")


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_an_exception_leaves_what_was_there(path, error):
    def interrupted():
        with durable.written_whole(path) as temporary:
            temporary.write_text("half of it")
            raise error

    with pytest.raises(error):
        interrupted()
    assert alone(path)


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_failure_of_any_step_leaves_what_was_there(path, step, monkeypatch):
    def refuse(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(*{"fsync": (os, "fsync"), "replace": (Path, "replace")}[step], refuse)
    with pytest.raises(gs.StoreError, match=r"no room to write .*file"):
        durable.write_file(path, "new")
    assert alone(path)


def test_file_and_folder_are_flushed_in_this_order(path, monkeypatch):
    flushed = []
    monkeypatch.setattr(os, "fsync", lambda number: flushed.append(os.readlink(f"/proc/self/fd/{number}")))
    replace = Path.replace
    monkeypatch.setattr(Path, "replace", lambda *paths: flushed.append("renamed") or replace(*paths))
    durable.write_file(path, "new")
    assert ".tmp-" in flushed[0]
    assert flushed[1:] == ["renamed", str(path.parent)]


def test_a_link_stays_a_link(path, tmp_path):
    link = tmp_path / "link"
    link.symlink_to(path)
    durable.write_file(link, "new")
    assert link.is_symlink()
    assert path.read_text() == "new"


def test_a_device_is_not_replaced(tmp_path):
    program = (
        "from gradsketch import durable; durable.write_file('/dev/stdout', 'out'); durable.write_file('/dev/null', '')"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment())
    assert (done.returncode, done.stdout) == (0, "out"), done.stderr
    assert Path("/dev/null").is_char_device()


def environment():
    return os.environ | {"PYTHONPATH": str(Path(__file__).parents[1] / "src")}


def test_a_folder_in_the_place_is_told(tmp_path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(gs.StoreError, match=r"cannot write .*folder"):
        durable.write_file(tmp_path / "folder", "new")


def test_a_full_disk_is_told_also_for_tensors(path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        for write in (
            lambda: durable.write_tensors(path, torch.zeros(1000)),
            lambda: durable.write_file(path, "x" * 2000),
        ):
            with pytest.raises(gs.StoreError, match=r"write .*file"):
                write()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert alone(path)


# --- what the user gets ---


def writers():
    """Return, by name, what writes a file that the user asked for."""
    phi = gs.AFFD(64, 16)
    spectrum = gs.spectrum(phi.T @ phi, k=2, progress=False)
    over = gs.spectrum_over({0: phi.T @ phi}, k=2, progress=False)
    density = gs.density(phi.T @ phi, steps=4, progress=False)
    kept = {"spectrum": spectrum.to_json, "evolution": over.to_json, "density": density.to_json}
    drawn = {"spectrum figure": spectrum.plot, "evolution figure": over.plot, "density figure": density.plot}
    return kept | drawn | {"hits": everyday().to_json, "page": everyday().to_html}


@pytest.mark.parametrize("name", list(writers()))
def test_what_the_user_gets_is_whole_or_not_there(name, path, monkeypatch):
    path = path.rename(path.with_suffix(".svg"))
    write = writers()[name]
    with monkeypatch.context() as broken:
        broken.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(5, "Input/output error")))
        with pytest.raises(gs.StoreError, match="cannot write"):
            write(path)
    assert alone(path)
    with pytest.raises(gs.GradsketchError, match=r"^[^\n]*$"):
        write(Path("/proc/no/such") / path.name)  # a folder that nobody can make
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, hard))
    try:
        with pytest.raises(gs.StoreError, match=r"no room to write [^\n]*$"):
            write(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert alone(path)
    write(path.parent / "new folder" / path.name)
    assert (path.parent / "new folder" / path.name).stat().st_size > len(OLD)


# What writes a file, by the name it is called by; and modes in which ``open`` only reads.
WRITERS = {"write_text", "write_bytes", "savefig", "tofile", "to_csv", "to_pickle", "to_excel", "save_file", "copyfile"}
WRITERS |= {"copy2", "copytree", "rename", "touch", "symlink_to", "crc32", "NamedTemporaryFile", "mkstemp"}
SAVERS = {"torch", "np", "numpy", "json", "pickle", "yaml", "image", "shutil"}  # save, dump, move and copy of these
READING = ("r", "rb", "rt")


NO_FILES = (
    "gzip",
    "tarfile",
    "zipfile",
    "os",
    "webbrowser",
    "Image",
    "Index",
    "Store",
    "cls",
)  # whose open writes none


def writes(call):
    """Whether a call writes a file, as far as its text tells."""
    name = getattr(call.func, "attr", getattr(call.func, "id", ""))
    of = getattr(getattr(call.func, "value", None), "id", "")
    if name == "open" and of not in NO_FILES:
        place = 0 if isinstance(call.func, ast.Attribute) else 1
        modes = [*call.args[place : place + 1], *(k.value for k in call.keywords if k.arg == "mode")]
        return any(not (isinstance(m, ast.Constant) and m.value in READING) for m in modes)
    buffer = call.args and isinstance(call.args[0], ast.Name) and call.args[0].id == "buffer"
    return (name in WRITERS and not buffer) or (name in ("save", "dump", "move", "copy") and of in SAVERS)


def test_no_module_writes_files_by_hand():
    allowed = {
        "durable.py",
        "evaluation/cost.py",  # a file of the kernel's
        "store/export.py",  # inside written_whole
        "attribution/select.py",  # likewise
        "reading/lines.py",  # a temporary file without a name, of what was packed
        "reading/sources.py",  # likewise, of what came by a pipe
        "store/shard.py",  # checksums of parts of a shard, as docs/format.md has them
        "demo/digits.py",  # the checksum that PNG has
        "demo/packages.py",  # a folder that is renamed when it is complete
    }
    trees = {str(p.relative_to(SRC)): ast.walk(ast.parse(p.read_text())) for p in SRC.rglob("*.py")}
    found = {name for name, nodes in trees.items() if any(isinstance(n, ast.Call) and writes(n) for n in nodes)}
    assert found == allowed


BY_HAND = """
p.write_text(x); open(p, 'w'); p.open('wb'); open(p, mode='a'); open(p, how); torch.save(x, p)
figure.savefig(path); json.dump(x, f); np.save(p, x); shutil.move(a, b); frame.to_csv(p)
"""


@pytest.mark.parametrize("line", ast.parse(BY_HAND).body, ids=ast.unparse)
def test_a_hand_that_writes_is_seen(line):
    assert writes(line.value)


# --- state ---


CONTENT = {"facts": {"a": 1}, "w": torch.arange(300.0), "loss": float("nan"), "none": None}


def test_tensors_come_back_and_torch_reads_them_too(tmp_path):
    durable.write_tensors(tmp_path / "state.pt", CONTENT)
    for read in (durable.read_tensors, torch.load):
        again = read(tmp_path / "state.pt")
        assert torch.equal(again["w"], CONTENT["w"])
        assert again["facts"] == CONTENT["facts"]


def test_a_record_comes_back_however_it_is_laid_out(tmp_path):
    record = {"text": "Zürich \ud800", "numbers": [0.1, 1e300, -0.0, float("inf")], "none": None, "pair": (1, 2)}
    durable.write_record(tmp_path / "r.json", record)
    assert durable.read_record(tmp_path / "r.json") == {**record, "pair": [1, 2]}
    text = json.dumps(json.loads((tmp_path / "r.json").read_text()))
    (tmp_path / "r.json").write_text(text)
    assert durable.read_record(tmp_path / "r.json")["text"] == record["text"]


def test_every_damaged_byte_of_tensors_is_found(tmp_path):
    path = tmp_path / "state.pt"
    durable.write_tensors(path, CONTENT)
    sound = path.read_bytes()
    places = range(0, len(sound), 7)
    for place in places:
        path.write_bytes(sound[:place] + bytes([sound[place] ^ 1]) + sound[place + 1 :])
        with pytest.raises(gs.StoreError, match=r"is damaged"):
            durable.read_tensors(path)
    for length in (0, 1, 100, len(sound) // 2, len(sound) - 1):
        path.write_bytes(sound[:length])
        with pytest.raises(gs.StoreError, match=r"is damaged"):
            durable.read_tensors(path)


def test_damage_to_a_record_is_found_or_changes_nothing(tmp_path):
    path, record = tmp_path / "r.json", {"facts": {"a": 1}, "values": [0.25, 3], "name": "x y"}
    durable.write_record(path, record)
    sound, found = path.read_bytes(), 0
    for place, byte in enumerate(sound):
        for bit in range(8):
            path.write_bytes(sound[:place] + bytes([byte ^ 1 << bit]) + sound[place + 1 :])
            try:
                assert durable.read_record(path) == record
            except gs.StoreError:
                found += 1
    assert found > 6 * len(sound)  # the others fall into white space


@pytest.mark.parametrize("text", ["", "[]", "3", "null", '{"a": 1}', "[" * 100_000], ids=lambda text: text[:8])
def test_what_is_no_record_is_told(text, path):
    path.write_text(text)
    with pytest.raises(gs.StoreError, match=r"file is damaged.*delete it to start again"):
        durable.read_record(path)


def test_other_facts_are_named_with_both_ways_on():
    with pytest.raises(gs.FingerprintError) as caught:
        durable.require_same({"k": 3, "new": 1, "same": (1, 2)}, {"k": 2, "old": 0, "same": [1, 2]}, "run.pt")
    assert str(caught.value) == (
        "k is now 3; old is now null; new is now 1. Wanted: what run.pt was made with: k 2; old 0; new null. "
        "Choose another path for this work, or delete run.pt to start again."
    )
    with pytest.raises(gs.FingerprintError, match=r'^model is now {"weights": "a"}\. .*: model {"weights": "b"}\.'):
        durable.require_same(*({"model": {"class": "Net", "weights": w}} for w in "ab"), "run.pt")
    durable.require_same({"pair": (1, 2)}, {"pair": [1, 2]}, "run.pt")
    with pytest.raises(gs.StoreError, match=r"run\.pt is damaged"):
        durable.require_same({}, None, "run.pt")
