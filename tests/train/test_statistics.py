"""`eagle data lint` and `eagle data stats`: every key is accounted for, and numbers are those of the rows."""

import json

import numpy as np
import pytest

from eagle_model.visual.plan import NO_LIMIT
from eagle_train.config import dump_config
from eagle_train.data.lint import EMPTY, IGNORED, METADATA, REFUSED, USED, lint
from eagle_train.data.prepare import load_facts, prepare
from eagle_train.planning.visual import plan_visual, visual_spec
from eagle_train.training.model import load_run_tokenizer, model_config
from eagle_train.watching.statistics import statistics, to_html


def test_lint_accounts_for_every_key(tmp_path, row, write_jsonl, make_config):
    rows = [
        row(image="missing.png", id=1, thumb="a.png"),
        row(image=None, id=2),
        row(img="x.png"),
        row(img=None, score=0.5),
        b"{",
        b"",
        {"id": 3},
    ]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    [source] = lint(make_config({"s": {"annotation": "rows.jsonl", "ignore": ["thumb"]}}))
    assert source.rows == 6
    assert {(use.key, use.use): use.rows for use in source.keys} == {
        ("conversations", USED): 4,
        ("id", METADATA): 3,
        ("image", EMPTY): 1,
        ("image", USED): 1,
        ("img", EMPTY): 1,
        ("img", REFUSED): 1,
        ("score", METADATA): 1,
        ("thumb", IGNORED): 1,
    }
    assert {refusal.reason: refusal.rows for refusal in source.refusals} == {"unknown-key": 1, "broken-json": 1, "bad-row": 1}
    assert [refusal.example[:4] for refusal in source.refusals] == ["s:3:", "s:5:", "s:7:"]
    [first] = lint(make_config({"s": {"annotation": "rows.jsonl"}}), limit=2)
    assert (first.rows, {refusal.reason for refusal in first.refusals}) == (2, {"unknown-key"})


def test_the_verb_exits_with_the_code_of_bad_data(colour_run, tmp_path, capsys):
    import typer

    from eagle_train.cli.data import lint as verb

    (tmp_path / "run.yaml").write_text(dump_config(colour_run(rows=2)))
    verb(tmp_path / "run.yaml")
    assert "source rows: 3 rows" in (said := capsys.readouterr().out)
    assert "conversations" in said
    with open(tmp_path / "rows.jsonl", "a") as file:
        file.write('{"conversations": [], "audio": "a.wav"}\n')
    with pytest.raises(typer.Exit) as end:
        verb(tmp_path / "run.yaml")
    assert end.value.exit_code == 3
    assert "refused: bad-row: 1 row, for example rows:4" in capsys.readouterr().out
    (tmp_path / "rows.jsonl").write_text("")
    with pytest.raises(typer.Exit) as end:
        verb(tmp_path / "run.yaml")
    assert end.value.exit_code == 3
    assert "refused: source rows has no rows" in capsys.readouterr().out


def test_numbers_are_those_of_the_rows(colour_run, tmp_path, capsys):
    from eagle_train.cli.data import stats as verb

    config = colour_run(rows=6)
    lines = (tmp_path / "rows.jsonl").read_text().splitlines()
    (tmp_path / "rows.jsonl").write_text("\n".join([*lines, lines[0], '{"image": "no.png", "conversations": []}']))
    tokenizer = load_run_tokenizer(config)
    prepare(config, tokenizer)
    facts = load_facts(config, tokenizer)
    numbers = statistics(config)
    [source] = numbers.sources
    assert (source.rows, source.bad_rows, source.duplicates) == (8, 1, 1)
    assert (source.images, source.videos, source.documents) == (7, 1, 0)
    assert source.hours == pytest.approx(2.0 / 3600)  # 20 frames at 10 fps
    assert (source.text_tokens, source.label_tokens) == (facts.column("text_tokens").sum(), facts.column("label_tokens").sum())
    spec = visual_spec(config, model_config(config, tokenizer))
    for stage, length in zip(config.stages, numbers.lengths):
        wanted, planned = plan_visual(facts, NO_LIMIT, spec), plan_visual(facts, stage.max_tokens, spec)
        assert sum(length.before) == 8
        assert sum(length.after) + length.dropped == 8
        assert length.dropped == np.count_nonzero(planned.status)
        assert length.visual_tokens == {"rows": planned.tiles.sum() * spec.tokens_per_tile}
        for counts, lengths in ((length.before, wanted.tokens), (length.after, planned.tokens[planned.status == 0])):
            below = 0
            for edge, count in zip(length.edges, counts):
                below += count
                assert below == np.count_nonzero(lengths < edge)
    assert numbers.reasons[0].startswith("bad-row: 1 row,")
    page = to_html(numbers)
    assert page.count("<tr>") == 2 + sum(1 + len(length.edges) + 2 for length in numbers.lengths)  # 2: the draws of one source
    (tmp_path / "run.yaml").write_text(dump_config(config))
    verb(tmp_path / "run.yaml", html=tmp_path / "page.html", json=tmp_path / "numbers.json")
    assert json.loads((tmp_path / "numbers.json").read_text())["sources"][0]["duplicates"] == 1
    assert (tmp_path / "page.html").read_text() == page
    assert "duplicates" in capsys.readouterr().out
