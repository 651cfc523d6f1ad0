"""Links inside the repository hold, and one that does not is found out."""

import runpy
from pathlib import Path

import pytest

LINKS = runpy.run_path(str(Path(__file__).parents[2] / "tools/links.py"))


def test_no_link_of_the_repository_is_broken(capsys):
    assert LINKS["main"]() == 0, capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[a](other.md)", []),
        ("[a](other.md#a-heading-s-2)", []),
        ("[a](#mine)\n\n## Mine\n", []),
        ("{doc}`other` and {doc}`words <other>`", []),
        ("[a](https://example.org/nowhere)", []),
        ("`benchmarks/one.py --small`, `results/one.json`", []),
        ("```\n[a](nowhere.md)\n```\n", []),
        ("[a](nowhere.md)", ["nowhere.md: no such file"]),
        ("![a](images/none.png)", ["images/none.png: no such file"]),
        ("[a](other.md#another)", ["other.md#another: no such heading"]),
        ("{doc}`nowhere`", ["nowhere: no such file"]),
        ("`benchmarks/two.py`", ["`benchmarks/two.py`: no such file"]),
    ],
)
def test_what_a_page_points_at(tmp_path, text, said):
    (tmp_path / "docs").mkdir()
    (tmp_path / "benchmarks/results").mkdir(parents=True)
    for name in ("benchmarks/one.py", "benchmarks/results/one.json"):
        (tmp_path / name).touch()
    (tmp_path / "docs/other.md").write_text("# Other\n\n## A heading: `s`, 2\n\n```bash\n# another\n```\n")
    page = tmp_path / "docs/page.md"
    page.write_text(text)
    assert list(LINKS["broken"](page, tmp_path)) == said
