"""Every kind of file that is read back: one bit flipped or its end cut off gives the right answer or one clear error.

Never a signal, never another number. Each probe runs in a process of its own, because a damaged file could end it.
"""

import os
import random
import sys
from pathlib import Path

import pytest
import torch

import gradsketch as gs
from attribution import toys
from gradsketch.attribution import moments
from gradsketch.cli import run_file
from gradsketch.cli.index import IndexOptions
from gradsketch.cli.loading import ModelOptions
from gradsketch.spectra.evolution import saved_spectra

sys.path.insert(0, str(Path(__file__).parent))
from dimension.problems import LOSS, ONE, Hidden, losses

PROBES = {False: 8, True: 170}  # a kind of file: by default, and slow
MODEL, LATER, TEXTS = toys.TinyLM(), toys.TinyLM(), toys.texts(24)
with torch.no_grad():
    LATER.head.weight += 0.1
STATES = [MODEL.state_dict(), LATER.state_dict()]


class Interrupting(gs.LinearMap):
    """A diagonal matrix that Ctrl-C interrupts at its n-th product."""

    is_self_adjoint, shape = True, (200, 200)

    def __init__(self, products=10**9):
        self.products = products

    def _apply(self, x):
        self.products -= 1
        if self.products < 0:
            raise KeyboardInterrupt
        return x * torch.linspace(-3, 9, 200).pow(3)

    _apply_adjoint = _apply


def asked(folder):
    index = gs.Index.open(folder, task=toys.language_task(), checkpoints=STATES)
    hits = index.query(MODEL, TEXTS[:2], k=24, opponents=2)
    values = index.self_influence("cosine")
    audits = index.audits
    return [
        [(h.row, h.id, h.score, h.text, h.loss, sorted(h.metadata.items())) for q in hits for h in q.proponents],
        values.ids,
        values.values.tolist(),
        (audits.batches, audits.largest_error),
    ]


def spectrum(file, products=10**9):
    return gs.spectrum(Interrupting(products), 4, resume=file, steps=40, method="full", progress=False).eigenvalues


def searched(folder, **options):
    given = {"target": 0.0, "d_min": 2, "d_max": 8, "check_every": 5, "resume": folder, "progress": False}
    found = gs.intrinsic_dimension(Hidden(60, 4), losses, ONE, LOSS, **given | options)
    return [[(c.step, c.d, c.value, c.loss) for c in s.checks] for s in found.searches]


def curve(file):
    points = gs.dimension_curve(Hidden(60, 4), losses, ONE, LOSS, [2, 4], steps=4, resume=file, progress=False).points
    return [(p.d, p.seed, p.value, p.loss) for p in points]


def subspace(folder):
    found = gs.Subspace.from_pretrained(Hidden(60, 4), folder)
    return found.w.tolist()


def run_options(file):
    return run_file.read(IndexOptions, "index", file, untouched=True)


def made(folder):
    """Make every kind of file; return by name the file and how it is read."""
    index = folder / "index"
    data = [{"text": text, "n": i, "tags": ["é", i]} for i, text in enumerate(TEXTS)]
    gs.build_index(index, MODEL, toys.language_task(), data, d=128, checkpoints=STATES, shard_rows=8, progress=False)
    asked(index)  # keeps moments
    run_file.write(IndexOptions("i", ModelOptions("m"), Path("data")), "index", index / "run.json")
    with pytest.raises(KeyboardInterrupt):
        spectrum(folder / "spectrum.run", 30)
    gs.spectrum_over({0: Interrupting()}, k=2, directory=folder / "steps", steps=40, method="full", progress=False)
    searched(folder / "search")
    curve(folder / "curve.json")
    with gs.Subspace(Hidden(60, 4), "*", gs.AFFD(60, 4)) as open_subspace:
        open_subspace.save_pretrained(folder / "subspace")
    state = next((folder / "search").glob("*.pt"))
    shard = "part-000000000008-000008.arrow"
    return {
        "shard": (index / "checkpoint-0" / shard, lambda: asked(index)),
        "shard of a second checkpoint": (index / "checkpoint-1" / shard, lambda: asked(index)),
        "index": (index / "index.json", lambda: asked(index)),
        "manifest": (index / "checkpoint-0/index.json", lambda: asked(index)),
        "audits": (next(index.glob("audits-*")), lambda: asked(index)),
        "moments": (next(index.glob("checkpoint-0/moments/*")), lambda: asked(index)),
        "run file": (index / "run.json", lambda: run_options(index / "run.json")),
        "spectrum": (folder / "spectrum.run", lambda: spectrum(folder / "spectrum.run")),
        "step": (next((folder / "steps").glob("*.json")), lambda: saved_spectra(folder / "steps").to_json()),
        "search": (state, lambda: searched(folder / "search")),
        "curve": (folder / "curve.json", lambda: curve(folder / "curve.json")),
        "subspace, how": (folder / "subspace/subspace.json", lambda: subspace(folder / "subspace")),
        "subspace": (folder / "subspace/subspace.pt", lambda: subspace(folder / "subspace")),
    }


NAMES = (
    "shard", "shard of a second checkpoint", "index", "manifest", "audits", "moments", "run file", "spectrum", "step",
    "search", "curve", "subspace, how", "subspace",
)  # fmt: skip


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(moments, "_WORTH_KEEPING", 0)
        yield made(tmp_path_factory.mktemp("files"))


def outcome(read, right):
    """Return, from a process of its own: "right", "refused", or what went wrong."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            try:
                said = "right" if read() == right else "ANOTHER ANSWER"
            except gs.GradsketchError as error:
                said = "refused" if "\n" not in str(error) else f"SEVERAL LINES {error}"
            except BaseException as error:
                said = f"RAW {type(error).__name__}: {error}"
            os.write(writer, said.encode()[:2000])
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as answer:
        said = answer.read()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return said if status == 0 and said else f"KILLED {status}"


def damages(sound, count, draw):
    """Yield damaged forms of a file: most of them with one bit flipped, some cut off."""
    for number in range(count):
        if number % 6 == 5:
            yield f"cut at {(place := draw.randrange(len(sound)))}", sound[:place]
        else:
            place, bit = draw.randrange(len(sound)), draw.randrange(8)
            changed = bytearray(sound)
            changed[place] ^= 1 << bit
            yield f"bit {bit} of byte {place}", bytes(changed)


@pytest.mark.parametrize("slow", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["sample", "all"])
@pytest.mark.parametrize("name", NAMES)
def test_damage_gives_the_right_answer_or_one_clear_error(files, name, slow):
    file, read = files[name]
    sound, right = file.read_bytes(), read()
    found = {}
    try:
        for place, damaged in damages(sound, PROBES[slow], random.Random(name)):
            file.write_bytes(damaged)
            found[place] = outcome(read, right)
            file.write_bytes(sound)
    finally:
        file.write_bytes(sound)
    assert {place: said for place, said in found.items() if said not in ("right", "refused")} == {}
    assert "refused" in found.values() or name == "moments"  # which are made anew
