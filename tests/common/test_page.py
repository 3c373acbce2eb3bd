import base64
import io
import re

import jinja2
import pytest
from matplotlib.image import imread

from common.figure import as_png, hide_frame, literal, new_figure, save
from common.page import render


def drawn(title="a $title$"):
    figure = new_figure(2, 1, dpi=50)
    axes = figure.subplots()
    axes.set_title(literal(title))
    hide_frame(axes)
    return figure


def test_a_picture_has_its_size_and_the_same_bytes_each_time():
    assert imread(io.BytesIO(as_png(drawn()))).shape == (50, 100, 4)
    assert as_png(drawn()) == as_png(drawn()) and b"matplotlib" not in as_png(drawn())


def test_a_dollar_is_a_dollar_and_begins_no_formula():
    assert as_png(drawn("$a^{b$")) != as_png(drawn("a"))  # as a formula it would be an error


def test_a_picture_is_saved_whole(tmp_path, monkeypatch):
    save(drawn(), tmp_path / "a.png")
    assert imread(tmp_path / "a.png").shape == (50, 100, 4)
    figure = drawn()
    monkeypatch.setattr(figure, "savefig", lambda *args, **options: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        save(figure, tmp_path / "a.png")
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"] and (tmp_path / "a.png").stat().st_size


def test_every_value_is_escaped_wherever_it_stands():
    evil = "<b>'\"&"
    body = "<p>{{ said }}</p>{{ table([said], [[said, 1]]) }}{{ picture(figure, said) }}"
    made = render(evil, body, said=evil, figure=drawn())
    assert evil not in made and "<b>" not in made
    assert made.count("&lt;b&gt;&#39;&#34;&amp;") == 6  # title, heading, text, head, cell and picture
    assert made.startswith("<!doctype html>\n") and made.endswith("</body></html>\n")


def test_pictures_lie_in_the_page_and_nothing_is_fetched():
    figure = drawn()
    made = render("Report", '{{ picture(figure, "what it shows") }}', figure=figure)
    (source,) = re.findall(r'src="data:image/png;base64,([^"]*)"', made)
    assert base64.b64decode(source) == as_png(figure)
    assert "http" not in made and 'alt="what it shows"' in made


def test_a_value_that_is_not_given_is_an_error_and_no_blank():
    with pytest.raises(jinja2.UndefinedError):
        render("Report", "{{ absent }}")
