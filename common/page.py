"""A report as one HTML file that fetches nothing: pictures lie in it, and every value is escaped."""

from base64 import b64encode
from typing import Any

from common.figure import as_png

# What a body may use: `picture` of a matplotlib figure, and `table` of a row of heads and rows of cells.
PAGE = """
{%- macro picture(figure, alt) %}
<p><img alt="{{ alt }}" src="data:image/png;base64,{{ figure | png }}"></p>
{% endmacro %}
{%- macro table(head, rows) %}
<table><tr>{% for cell in head %}<th>{{ cell }}</th>{% endfor %}</tr>
{% for row in rows %}<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>{% endfor %}</table>
{% endmacro -%}
<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{{ title }}</title><style>
body { font: 15px/1.5 system-ui, sans-serif; color: #1c2733; max-width: 62rem }
body { margin: 2rem auto; padding: 0 1rem } h1 { font-size: 1.6rem } img { max-width: 100% }
h2 { font-size: 1.2rem; margin-top: 2.5rem; border-top: 1px solid #d5dce3; padding-top: 1rem }
pre, code { font: 13px/1.45 ui-monospace, monospace; background: #f4f6f8; white-space: pre-wrap }
pre { padding: .6rem .8rem; overflow-wrap: anywhere } pre.table { white-space: pre; overflow-x: auto }
table { border-collapse: collapse } .note { color: #5b6975 } details { margin: .6rem 0 }
td, th { padding: .2rem .8rem; text-align: right; border-bottom: 1px solid #d5dce3 }
td:first-child, th:first-child { text-align: left }
</style></head>
<body><h1>{{ title }}</h1>
"""


def render(title: str, body: str, **values: Any) -> str:
    """The page of a body in Jinja, which sees `values` and may use what PAGE has."""
    import jinja2

    rules: dict[str, Any] = {"trim_blocks": True, "lstrip_blocks": True, "undefined": jinja2.StrictUndefined}
    environment = jinja2.Environment(autoescape=True, keep_trailing_newline=True, **rules)
    environment.filters["png"] = lambda figure: b64encode(as_png(figure)).decode()
    return environment.from_string(f"{PAGE}{body}</body></html>\n").render(title=title, **values)
