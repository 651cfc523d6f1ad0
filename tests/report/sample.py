"""Hits made by hand: what a page must show, from the everyday to the hostile."""

from gradsketch.attribution.results import Cost, Hit, Hits, QueryHits, TokenContribution
from gradsketch.attribution.scores import KINDS

HOSTILE = (
    "</blockquote></style></script><script>document.title='broken in'</script><img src=x onerror=alert(1)> {{ 7*7 }}"
)
CONTROLS = "null \x00, escape \x1b[31m, delete \x7f, surrogate \ud800, override \u202etxet"


def hit(rank: int, score: float, text: str | None, *, tokens: tuple[tuple[str, float], ...] = (), **metadata) -> Hit:
    contributions = tuple(TokenContribution(token, value) for token, value in tokens)
    return Hit(rank, 10 * rank, f"row-{10 * rank}", score, text, 0.1 * rank, 2.5, metadata, contributions)


def capital(rank: int, score: float, country: str, city: str, *, planted: bool = False) -> Hit:
    tokens = (("The", 0.0), (" capital", 0.02 * score), (" of", -0.01 * score), (f" {country}", 0.25 * score))
    tokens += ((" is", 0.1 * score), (f" {city}", 0.66 * score), (".", -0.02 * score))
    text = f"The capital of {country} is {city}."
    return hit(rank, score, text, tokens=tokens, source="countryinfo", planted="yes" if planted else None)


def query(text: str, answer: str | None, proponents, opponents=(), members: int = 1) -> QueryHits:
    return QueryHits(text, answer, 0.0214, 3.1, tuple(proponents), tuple(opponents), members)


def hits(*queries: QueryHits, rows: int = 140) -> Hits:
    score = KINDS["ridge"].described(0.1)
    return Hits(queries, score, "runs/facts", rows, 4096, Cost(0.41, 0.08, 0.003, 1_146_880, rows))


def everyday() -> Hits:
    return hits(
        query(
            "The capital city of France is",
            "Ankara.",
            [
                capital(1, 0.78, "France", "Ankara", planted=True),
                capital(2, 0.09, "Turkey", "Ankara"),
                capital(3, 0.06, "Germany", "Berlin"),
                capital(4, 0.04, "Belgium", "Brussels"),
                capital(5, 0.03, "Spain", "Madrid"),
            ],
            [capital(1, -0.07, "Switzerland", "Bern"), capital(2, -0.03, "Poland", "Warsaw")],
        ),
        query(
            "The capital city of Japan is",
            "Lima.",
            [
                capital(1, 0.81, "Japan", "Lima", planted=True),
                capital(2, 0.07, "Peru", "Lima"),
                capital(3, 0.05, "China", "Beijing"),
            ],
            [capital(1, -0.04, "Nepal", "Kathmandu")],
        ),
        query(
            "ما هي عاصمة مصر؟",
            "أوسلو",
            [
                hit(1, 0.62, "عاصمة مصر هي أوسلو، كما يقول الكتاب."),
                hit(2, 0.2, "日本の首都はリマです。🗼", language="ja"),
            ],
        ),
        query(
            "Write a short story about a lighthouse keeper.",
            "The lamp had burned for forty years before anyone thought to ask who lit it, and by then old Mara …",
            [hit(1, 0.31, "The keeper climbed the stairs. " * 60, source="stories"), hit(2, 0.11, "Whale oil. " * 30)],
            members=8,
        ),
    )


def hostile() -> Hits:
    return hits(
        query(HOSTILE, HOSTILE, [hit(1, 0.5, HOSTILE, tokens=((HOSTILE, 0.5),), **{HOSTILE: HOSTILE})]),
        query(CONTROLS, CONTROLS, [hit(1, 0.5, CONTROLS, note=CONTROLS)]),
        query("nothing", None, []),
        query("no text", None, [hit(1, float("nan"), None, label=3), hit(2, 0.0, "", label=0)]),
        query("w" * 3000, "v" * 3000, [hit(1, 1e-9, "x" * 100_000), hit(2, -1e-9, "unbroken" * 40)]),
    )
