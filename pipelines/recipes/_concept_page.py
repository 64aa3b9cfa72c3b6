"""Concepts as one HTML file that needs nothing else: no script from elsewhere, no font, no network.

Whatever comes from a corpus is text, never markup: it goes through `html.escape`, and the page's policy forbids it to
load anything.
"""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from pipelines.recipes._concepts import label_mix

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c6bb1", "#7f7f7f")
"""Told apart by all kinds of eyes; the last is for all further labels."""

MOST = 2000
"""Concepts shown; more would make a page that browsers are slow with."""

STYLE = """
:root { --ink: #1d2430; --soft: #5b6675; --line: #e2e6ec; --paper: #fff; --back: #f5f6f8; --mark: #fff3c4; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e9ee; --soft: #9aa5b4; --line: #333b47; --paper: #1c222b; --back: #12161c; --mark: #4d4213; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--back); color: var(--ink); font: 15px/1.55 system-ui, sans-serif; }
header, main { max-width: 1240px; margin: 0 auto; padding: 1.5rem; }
h1 { font-size: 1.5rem; margin: 0 0 .3rem; }
h2 { font-size: 1.05rem; margin: 0; }
p.about { color: var(--soft); max-width: 75ch; margin: .2rem 0 1rem; }
dl { display: flex; flex-wrap: wrap; gap: .5rem 2rem; margin: 0 0 1rem; }
dl div { min-width: 6rem; } dt { color: var(--soft); font-size: .8rem; } dd { margin: 0; font-size: 1.2rem; }
table { border-collapse: collapse; margin: .5rem 0 1.2rem; font-size: .88rem; background: var(--paper); }
th, td { padding: .3rem .8rem; border-bottom: 1px solid var(--line); text-align: right; }
th:first-child, td:first-child { text-align: left; }
.scroll { overflow-x: auto; }
.tools { position: sticky; top: 0; z-index: 1; background: var(--back); padding: .6rem 0; display: flex; gap: .8rem;
  flex-wrap: wrap; align-items: center; border-bottom: 1px solid var(--line); }
input, select { font: inherit; color: inherit; background: var(--paper); border: 1px solid var(--line);
  border-radius: 6px; padding: .35rem .6rem; }
input { flex: 1 1 16rem; }
.legend { display: flex; flex-wrap: wrap; gap: .3rem 1rem; font-size: .85rem; color: var(--soft); }
.legend i { display: inline-block; width: .8em; height: .8em; border-radius: 2px; margin-right: .35em; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 370px), 1fr)); gap: 1rem;
  margin-top: 1rem; align-items: start; }
article { background: var(--paper); border: 1px solid var(--line); border-radius: 10px; padding: 1rem;
  scroll-margin-top: 5rem; overflow-wrap: anywhere; }
article:target { outline: 3px solid #e69f00; }
article[hidden] { display: none; }
.count { color: var(--soft); font-size: .82rem; }
.mix { display: flex; height: 9px; border-radius: 4px; overflow: hidden; margin: .5rem 0; background: var(--line); }
.words { display: flex; flex-wrap: wrap; gap: .1rem .55rem; align-items: baseline; margin: .4rem 0 .6rem; }
.words small { color: var(--soft); font-size: .7rem; margin-left: .15em; }
ul { list-style: none; margin: 0; padding: 0; font-size: .86rem; }
li { padding: .25rem 0; border-top: 1px solid var(--line); }
mark { background: var(--mark); color: inherit; font-weight: 600; padding: 0 .2em; border-radius: 3px; }
a { color: inherit; } .near { font-size: .82rem; color: var(--soft); margin: .6rem 0 0; }
"""

SCRIPT = """
const cards = [...document.querySelectorAll('article')], box = document.querySelector('.cards');
const find = document.querySelector('input'), order = document.querySelector('select');
const shown = document.querySelector('#shown');
const number = (card, key) => Number(card.dataset[key]);
const orders = {
  rows: (a, b) => number(b, 'rows') - number(a, 'rows'),
  pure: (a, b) => number(b, 'pure') - number(a, 'pure') || number(b, 'rows') - number(a, 'rows'),
  mixed: (a, b) => number(a, 'pure') - number(b, 'pure') || number(b, 'rows') - number(a, 'rows'),
  code: (a, b) => number(a, 'code') - number(b, 'code'),
};
function refresh() {
  const words = find.value.toLowerCase().split(/\\s+/).filter(Boolean);
  let count = 0;
  for (const card of cards) {
    const text = card.textContent.toLowerCase();
    card.hidden = !words.every(word => text.includes(word));
    count += !card.hidden;
  }
  shown.textContent = count + ' of ' + cards.length;
}
find.addEventListener('input', refresh);
order.addEventListener('change', () => box.append(...cards.sort(orders[order.value])));
window.addEventListener('hashchange', () => {
  const card = document.getElementById(location.hash.slice(1));
  if (card && card.hidden) { find.value = ''; refresh(); card.scrollIntoView(); }
});
refresh();
"""


def page(
    title: str, about: str, facts: Mapping[str, str], concepts: Sequence[Mapping[str, Any]], tables: Sequence[str] = ()
) -> str:
    """The whole page.

    Args:
        facts: name -> value, shown large on top.
        tables: from `table`, shown before the concepts.
    """
    labels = label_mix(concepts)
    colours = {label: COLOURS[min(n, len(COLOURS) - 1)] for n, label in enumerate(labels)}
    shown = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in facts.items())
    legend = "".join(f'<span><i style="background:{c}"></i>{escape(label)}</span>' for label, c in colours.items())
    shown_concepts = concepts[:MOST]
    named = {concept["code"]: concept["named"] for concept in shown_concepts}
    cards = "\n".join(_card(concept, colours, named) for concept in shown_concepts)
    if len(concepts) > MOST:
        about = f"{about} The {MOST:,} with the most rows are shown; all {len(concepts):,} are in the JSON beside."
    policy = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1"><title>{escape(title)}</title>
<style>{STYLE}</style></head><body>
<header><h1>{escape(title)}</h1><p class="about">{escape(about)}</p><dl>{shown}</dl>{"".join(tables)}</header>
<main><div class="tools"><input type="search" placeholder="a word, a label, a document" aria-label="filter">
<select aria-label="order"><option value="rows">most rows first</option><option value="pure">one label first</option>
<option value="mixed">mixed labels first</option><option value="code">by code</option></select>
<span class="count" id="shown"></span><div class="legend">{legend}</div></div>
<div class="cards">
{cards}
</div></main><script>{SCRIPT}</script></body></html>
"""


def table(caption: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of text."""
    head = "".join(f"<th>{escape(name)}</th>" for name in columns)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<h2>{escape(caption)}</h2><div class="scroll"><table><tr>{head}</tr>{body}</table></div>'


def _card(concept: Mapping[str, Any], colours: Mapping[str, str], named: Mapping[int, Sequence[str]]) -> str:
    code, rows, pure = concept["code"], concept["rows"], concept["labels"][0]["share"]
    mix = "".join(
        f'<span style="width:{100 * entry["share"]:.2f}%;background:{colours[entry["label"]]}"'
        f' title="{escape(entry["label"])} {entry["share"]:.0%}"></span>'
        for entry in concept["labels"]
    )
    most = max(entry["count"] for entry in concept["words"])
    words = "".join(
        f'<span style="font-size:{0.85 + 0.6 * (entry["count"] / most) ** 0.5:.2f}rem"'
        f' title="{entry["count"]:,} of {entry["of"]:,} in all">{escape(entry["word"])}'
        f"<small>{entry['count']:,}</small></span>"
        for entry in concept["words"]
    )
    contexts = "".join(
        f'<li title="{escape(c["document"])} ({escape(c["label"])})">{escape(c["left"])}'
        f" <mark>{escape(c['word'])}</mark> {escape(c['right'])}</li>"
        for c in concept["contexts"]
    )
    near = ", ".join(
        f'<a href="#code-{other["code"]}" title="cosine {other["cosine"]:.3f}">{other["code"]}'
        f" {escape(' '.join(named[other['code']][:2]))}</a>"
        for other in concept["nearest"]
        if other["code"] in named
    )
    top = concept["labels"][0]
    return (
        f'<article id="code-{code}" data-code="{code}" data-rows="{rows}" data-pure="{pure:.4f}">'
        f"<h2>{escape(', '.join(concept['named']))}</h2>"
        f'<div class="count">code {code} · {rows:,} rows ({concept["share"]:.2%}) ·'
        f" {concept['different_words']:,} different words · {escape(top['label'])} {top['share']:.0%}</div>"
        f'<div class="mix">{mix}</div><div class="words">{words}</div><ul>{contexts}</ul>'
        f'<p class="near">near: {near or "none"}</p></article>'
    )
