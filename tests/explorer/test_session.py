"""What the page asks, against the index itself."""

import threading
from dataclasses import replace

import pytest
import torch

from explorer import desk
from gradsketch.as_found import evaluating
from gradsketch.attribution.build import build_index
from gradsketch.attribution.filters import row_filter
from gradsketch.attribution.index import Index
from gradsketch.errors import InputError
from gradsketch.explorer.forms import Question
from gradsketch.explorer.rows import RowTable
from gradsketch.explorer.session import Ask, Neighbours
from gradsketch.store import Manifest, Rows, Store

PROMPT = Question("the number 7", " squared is 49")
OTHER = Question("the number 9", " squared is 81")
EXAMPLES = [{"prompt": q.prompt, "answer": q.answer} for q in (PROMPT, OTHER)]


@pytest.fixture(scope="module")
def session(folder):
    return desk.session(folder)


@pytest.fixture
def own(folder):
    """A session that no other test has asked."""
    return desk.session(folder)


@pytest.fixture(scope="module")
def index(folder):
    return Index.open(folder, task=desk.task())


@pytest.fixture(scope="module")
def sketched(index):
    return index.sketch(desk.talker(), EXAMPLES)


def listed(hits):
    return [[(h.rank, h.row, h.id, h.score) for h in (*query.proponents, *query.opponents)] for query in hits]


@pytest.mark.parametrize("score", ["ridge", "influence", "cosine", "dot"])
@pytest.mark.parametrize("where", [{}, {"source": ["s1"], "year": [1991, 1994]}], ids=["all", "some"])
def test_answers_are_those_of_the_index(session, index, sketched, score, where):
    asked = Ask((PROMPT, OTHER), score=score, damping=0.3, k=4, opponents=3, where=where)
    direct = index.query(None, sketched, score=score, damping=0.3, k=4, opponents=3, where=where or None)
    found = session.ask(asked).hits
    assert listed(found) == listed(direct)
    assert found.score == direct.score


def test_questions_ask_together(session, index, sketched):
    found = session.ask(Ask((PROMPT, OTHER), together=True)).hits
    assert listed(found) == listed(index.query(None, sketched, k=10, opponents=5, groups=[[0, 1]]))
    assert found[0].members == 2


def test_the_model_answers_where_nobody_did(session, index):
    asked = session.ask(Ask((Question("the number 7"),), tokens=3)).asked
    with evaluating(desk.talker()):
        written = desk.talker().generate(torch.tensor([desk.Tokenizer()("the number 7")["input_ids"]]), 3)
    assert asked.questions[0].answer == desk.Tokenizer().decode(written[0, -3:].tolist())
    direct = index.query(desk.talker(), [("the number 7", asked.questions[0].answer)], k=10, opponents=5)
    assert listed(session.ask(asked).hits) == listed(direct)


def test_a_whole_text_needs_no_answer(session, index):
    found = session.ask(Ask((Question("the number 7 squared is 49", whole=True),), k=3, opponents=0)).hits
    assert listed(found) == listed(index.query(desk.talker(), ["the number 7 squared is 49"], k=3))


def test_one_checkpoint_counts_alone(session, folder, tmp_path):
    checkpoint = 1
    found = session.ask(Ask((PROMPT,), score="cosine", checkpoint=checkpoint, k=40, opponents=0)).hits
    file = folder.with_name(f"index-{('early', 'late')[checkpoint]}.pt")
    one = build_index(tmp_path / "one", desk.talker(), desk.task(), desk.rows(), d=desk.D, dtype="float32",
                      checkpoints=[file], weights=[checkpoint + 1.0], progress=False)  # fmt: skip
    alone = one.query(desk.talker(), EXAMPLES[:1], score="cosine", k=40)
    assert [hit.row for hit in found[0]] == [hit.row for hit in alone[0]]
    torch.testing.assert_close(
        torch.tensor([hit.score for hit in found[0]]),
        torch.tensor([hit.score for hit in alone[0]]),
        rtol=1e-5,
        atol=1e-6,
    )


def test_weights_of_checkpoints_add_up(index, sketched):
    queries = sketched
    whole, early, late = (index.scores(None, queries, weights=w) for w in (None, [1.0, 0.0], [0.0, 2.0]))
    torch.testing.assert_close(whole, early + late)
    for weights in ([1.0], [1.0, 2.0, 3.0], [1.0, float("nan")]):
        with pytest.raises(InputError, match="one finite number a checkpoint"):
            index.scores(None, queries, weights=weights)


def test_a_gradient_is_formed_once_however_it_is_asked(own, monkeypatch):
    calls = []
    formed = Index.sketch
    monkeypatch.setattr(Index, "sketch", lambda *args, **more: calls.append(1) or formed(*args, **more))
    for asked in (Ask((PROMPT, OTHER)), Ask((PROMPT, OTHER), score="dot"), Ask((PROMPT, OTHER), together=True)):
        answer = own.ask(asked)
        own.sources(answer.id, "source")
        own.explain(answer.id, top=1)
    assert len(calls) == 1


def test_colours_are_those_of_the_index(session, index):
    asked = Ask((PROMPT,), checkpoint=1, k=3, opponents=2)
    coloured = session.explain(session.ask(asked).id, top=2)
    hits = index.query(desk.talker(), EXAMPLES[:1], k=3, opponents=2, weights=[0.0, 2.0])
    assert coloured.hits.queries == index.explain(desk.talker(), hits, top=2, weights=[0.0, 2.0]).queries
    assert sum(t.value for t in coloured.hits[0][0].tokens) == pytest.approx(coloured.hits[0][0].score, rel=1e-3)
    assert session.answer(coloured.id) == coloured


@pytest.mark.parametrize("score", ["cosine", "ridge", "dot"])
def test_neighbours_of_a_row_are_the_hits_of_its_own_gradient(session, index, score):
    found = session.neighbours(Neighbours(5, score=score, k=4, opponents=3)).hits[0]
    direct = index.query(None, index.stored([5]), score=score, k=40)[0]
    others = [(hit.row, hit.score) for hit in direct if hit.row != 5]
    assert [hit.rank for hit in found] == [1, 2, 3, 4]
    assert [(hit.row, hit.score) for hit in found] == [
        (row, pytest.approx(value, rel=1e-4)) for row, value in others[:4]
    ]
    assert [hit.row for hit in found.opponents] == [row for row, _ in others[:-4:-1]]


def test_a_row_is_nearest_to_its_own_question(index):
    assert index.query(desk.talker(), desk.rows()[5], score="cosine", k=1)[0][0].row == 5
    asked, held = index.sketch(desk.talker(), desk.rows()[5]), index.stored([5])
    for formed, stored in zip(asked.sketched, held.sketched, strict=True):
        torch.testing.assert_close(formed.sketches, stored.sketches)
        torch.testing.assert_close(formed.losses, stored.losses)


def test_neighbours_have_colours_too(session):
    assert session.explain(session.neighbours(Neighbours(5)).id, top=1).hits[0][0].tokens


def test_neighbours_of_a_row_that_is_not_there(session):
    for row in (-1, desk.N):
        with pytest.raises(InputError, match="from 0 to 39"):
            session.neighbours(Neighbours(row))


def test_outliers_are_the_largest_scores_for_themselves(session, index):
    own = index.self_influence("influence", damping=0.2)
    pages = [session.outliers("influence", 0.2, offset=offset, count=15) for offset in (0, 15, 30)]
    found = [(hit.row, hit.score) for page in pages for hit in page.rows]
    assert found == [(row, value) for row, _, value in own.top(desk.N)]
    assert [hit.rank for page in pages for hit in page.rows] == list(range(1, desk.N + 1))
    assert pages[0].median == pytest.approx(float(own.values.median()))
    some = session.outliers("influence", 0.2, where={"source": ["s2"]})
    assert [hit.row for hit in some.rows] == [row for row, _ in found if row % 3 == 2][:20]


def test_sources_are_sums_over_all_rows(session, index, sketched):
    answer = session.ask(Ask((PROMPT, OTHER), score="dot"))
    scores = index.scores(None, sketched, score="dot")[1].double()
    found = session.sources(answer.id, "source", 1)
    for source in found.sources:
        own = scores[int(source.value[1]) :: 3]
        assert source.rows == len(own)
        assert source.total == pytest.approx(float(own.sum()))
        assert (source.positive, source.negative) == pytest.approx(
            (float(own.clamp_min(0).sum()), float(own.clamp_max(0).sum()))
        )
    assert [abs(s.total) for s in found.sources] == sorted((abs(s.total) for s in found.sources), reverse=True)
    assert (len(found.sources), found.distinct) == (3, 3)


def test_sources_keep_to_the_conditions_and_leave_the_row_itself_out(session):
    some = session.ask(Ask((PROMPT,), where={"year": [1990]}))
    assert sum(source.rows for source in session.sources(some.id, "source").sources) == 8
    near = session.neighbours(Neighbours(5))
    assert sum(source.rows for source in session.sources(near.id, "source").sources) == desk.N - 1
    with pytest.raises(InputError, match="a column of the index"):
        session.sources(near.id, "nothing")


def test_two_answers_are_compared(session, index, sketched):
    answer = session.ask(Ask((PROMPT, OTHER), k=6))
    found = session.compare((answer.id, 0), (answer.id, 1))
    scores = index.scores(None, sketched)
    rows = [{hit.row for hit in query} for query in answer.hits]
    assert found.correlation == pytest.approx(float(torch.corrcoef(scores.double())[0, 1]))
    assert set(found.shared) == rows[0] & rows[1]
    assert (found.hits, found.rows) == ((6, 6), desk.N)
    assert session.compare((answer.id, 0), (answer.id, 0)).correlation == pytest.approx(1)
    with pytest.raises(InputError, match="question 2"):
        session.compare((answer.id, 0), (answer.id, 2))


def test_rows_by_page_words_and_conditions(session):
    assert [hit.row for hit in session.rows({}, offset=35).rows] == [35, 36, 37, 38, 39]
    assert session.rows({}, offset=99).rows == ()
    found = session.rows({"source": ["s0", "s1"], "year": [1993]})
    assert [hit.row for hit in found.rows] == [i for i in range(desk.N) if i % 5 == 3 and i % 3 < 2]
    assert found.total == len(found.rows)
    assert [hit.row for hit in session.rows({}, "NUMBER 12 ").rows] == [12]
    assert [hit.row for hit in session.rows({}, "row-7").rows] == [7]
    assert session.rows({}, "(.*").total == 0
    by_loss = session.rows({}, order="loss", count=40).rows
    assert [hit.loss for hit in by_loss] == sorted((hit.loss for hit in by_loss), reverse=True)
    for mistake in ({"offset": -1}, {"count": 0}, {"count": 1000}, {"order": "price"}):
        with pytest.raises(InputError):
            session.rows({}, **mistake)
    with pytest.raises(InputError, match="'price'"):
        session.rows({"price": [3]})


def test_what_is_open_is_told(session, folder):
    about = session.about()
    assert (about.rows, about.there, about.d, about.checkpoints) == (
        40,
        40,
        desk.D,
        ("index-early.pt", "index-late.pt"),
    )
    assert {facet.column: facet.distinct for facet in about.facets} == {"source": 3, "year": 5}
    assert [(v.value, v.rows) for v in about.facets[0].values] == [("s0", 14), ("s1", 13), ("s2", 13)]
    assert (about.prompt, about.answer, about.takes_whole) == ("Prompt", "Answer", True)
    assert about.samples[0] == Question("the number 0 squared is 0", whole=True)


def test_without_a_model_everything_but_questions_goes_on(folder, session):
    alone = desk.session(folder, model=False)
    assert (alone.about().loaded, alone.about().missing) == ("", "no such model")
    for refused in (lambda: alone.ask(Ask((PROMPT,))), lambda: alone.explain(alone.neighbours(Neighbours(3)).id)):
        with pytest.raises(InputError, match="the model of the index"):
            refused()
    assert alone.rows({}) == session.rows({})
    assert alone.outliers() == session.outliers()
    nearest = Neighbours(3)
    assert listed(alone.neighbours(nearest).hits) == listed(session.neighbours(nearest).hits)
    assert alone.sources(alone.neighbours(nearest).id, "year") == session.sources(
        session.neighbours(nearest).id, "year"
    )


def test_rows_are_read_while_the_model_is_busy(session, monkeypatch):
    talks, goes_on = threading.Event(), threading.Event()

    def generate(*args, **options):
        talks.set()
        assert goes_on.wait(60)
        return desk.Talker.generate(desk.talker(), *args, **options)

    monkeypatch.setattr(desk.talker(), "generate", generate)
    asks = threading.Thread(target=lambda: session.ask(Ask((Question("the number"),), tokens=1)))
    asks.start()
    assert talks.wait(60)
    assert session.rows({}).total == desk.N
    assert session.outliers("dot").total == desk.N
    assert len(session.neighbours(Neighbours(1)).hits[0]) == 10
    goes_on.set()
    asks.join()


def test_few_answers_are_kept(own):
    first = own.neighbours(Neighbours(0, k=1)).id
    for row in range(1, 17):
        own.neighbours(Neighbours(row, k=1))
    with pytest.raises(InputError, match="no longer kept"):
        own.answer(first)


@pytest.mark.parametrize(
    "wrong",
    [{"questions": ()}, {"score": "best"}, {"damping": -1.0}, {"k": 0}, {"k": 10**6}, {"opponents": -1},
     {"checkpoint": 2}, {"where": {"nothing": [1]}}, {"questions": (Question(""),)},
     {"questions": (Question("a"),), "tokens": 0}],
    ids=lambda wrong: "-".join(wrong),
)  # fmt: skip
def test_what_cannot_be_asked_is_refused(session, wrong):
    with pytest.raises(InputError):
        session.ask(replace(Ask((PROMPT,)), **wrong))


def test_rows_that_were_left_out_are_shown_with_the_reason(tmp_path):
    data = [*desk.rows(5), {"text": "", "source": "s9", "year": 1, "id": "bad"}]
    opened = desk.session(desk.build(tmp_path / "index", data, skip_bad=True))
    assert [("left out" in hit.metadata) for hit in opened.rows({}).rows] == [False] * 5 + [True]
    assert opened.outliers("dot").total == 5
    with pytest.raises(InputError, match="left out of the index"):
        opened.neighbours(Neighbours(5))


def test_columns_that_differ_from_shard_to_shard(tmp_path):
    values = [1, 2, "1", None, [1], {"a": 1}, 1.5, True]
    store = Store.create(tmp_path, Manifest(d=4, rows=32, shard_rows=4))
    for start, count in store.missing():
        ids = [str(row) for row in range(start, start + count)]
        held = {"what": [values[start // 4]] * count} if start else {}
        store.write(start, Rows(ids, torch.ones(count, 4), torch.zeros(count), held))
    table = RowTable(store)
    for value in values:
        kept = torch.cat([row_filter({"what": [value]}, store)(shard) for shard in store])
        assert table.keep({"what": [value]}).tolist() == kept.tolist()
    assert table.facet("what").distinct == 7


def test_values_and_words_are_those_of_the_rows(tmp_path):
    values = [1, True, "1"]
    rows = [
        {"text": row["text"], "mixed": values[i % 3], "chat": [{"role": "user", "content": f'say "x{i}"\nnow'}]}
        for i, row in enumerate(desk.rows(9))
    ]
    session = desk.session(desk.build(tmp_path / "i", rows))
    for place, value in enumerate(values):
        facet = next(
            v for v in session.table.facet("mixed").values if v.value == value and type(v.value) is type(value)
        )
        page = session.rows({"mixed": [value]})
        assert [hit.row for hit in page.rows] == list(range(place, 9, 3))
        assert facet.rows == page.total == 3
    assert [hit.row for hit in session.rows({}, 'say "x3"').rows] == [3]
    assert session.rows({}, '"\nnow').total == 9
