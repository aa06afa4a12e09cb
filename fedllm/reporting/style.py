"""The style sheet of report.html: light and dark, from a phone to a desk.

The series have Okabe and Ito's colours, which colour-blind readers can distinguish: for each
the shade that stands out against the page's ground.
"""

STYLE = """
:root {
  color-scheme: light dark;
  --ground: #fbfaf6; --card: #ffffff; --ink: #1d1c1a; --soft: #5d5a54; --rule: #d9d5cb;
  --s1: #0072b2; --s2: #d55e00; --s3: #009e73; --s4: #cc79a7;
  --serif: Charter, "Bitstream Charter", "Iowan Old Style", Georgia, serif;
  --sans: system-ui, -apple-system, "Segoe UI", Roboto, sans-serif;
}
@media (prefers-color-scheme: dark) {
  :root {
    --ground: #16171a; --card: #1e2024; --ink: #eceae4; --soft: #a9a69e;
    --rule: #3c3e44; --s1: #56b4e9; --s2: #e69f00; --s3: #009e73; --s4: #cc79a7;
  }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body {
  margin: 0; background: var(--ground); color: var(--ink);
  font: 1rem/1.55 var(--sans); font-variant-numeric: tabular-nums;
}
main { max-width: 62rem; margin: 0 auto; padding: 1.5rem 1.1rem 4rem; }
header { border-bottom: 3px solid var(--ink); padding-bottom: 1rem; }
h1, h2, h3 { line-height: 1.2; text-wrap: balance; }
h1 {
  font: 600 clamp(1.7rem, 6vw, 2.7rem)/1.1 var(--serif); margin: .4rem 0 .5rem;
  overflow-wrap: anywhere;
}
h2 {
  font: 600 1.35rem/1.2 var(--serif); margin: 2.8rem 0 .9rem;
  border-top: 1px solid var(--rule); padding-top: .9rem;
}
h3 { font-size: 1rem; margin: 0 0 .5rem; }
p { margin: .5rem 0; max-width: 44rem; }
.eyebrow {
  display: flex; flex-wrap: wrap; justify-content: space-between; gap: .5rem;
  font-size: .85rem; color: var(--soft); margin: 0; max-width: none;
}
.state { border: 1px solid currentColor; border-radius: 1rem; padding: 0 .7rem; }
.soft, figcaption, caption { color: var(--soft); font-size: .88rem; }
.alert { border-left: .3rem solid var(--s2); padding-left: .8rem; }

.privacy { padding: 1.6rem 0 .4rem; }
.epsilon {
  font: 600 clamp(2.6rem, 12vw, 4.6rem)/1 var(--serif); margin: 0 0 .3rem;
  letter-spacing: -.02em; max-width: none;
}
.epsilon small {
  font: 400 1rem/1.3 var(--sans); letter-spacing: 0; color: var(--soft);
  display: inline-block;
}
.statement {
  font: 400 clamp(1.15rem, 3.6vw, 1.4rem)/1.5 var(--serif); max-width: 50rem;
  margin: 1.1rem 0; hyphens: auto;
}
.bands { display: grid; grid-template-columns: repeat(4, 1fr); gap: 3px; padding: 0;
  margin: 1rem 0 .3rem; list-style: none; max-width: 40rem; }
.bands li { border-top: .4rem solid var(--rule); padding-top: .3rem; color: var(--soft);
  font-size: .82rem; line-height: 1.25; }
.bands li[aria-current] { border-color: var(--ink); color: var(--ink); font-weight: 650; }

.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(8.2rem, 1fr));
  gap: 1px; margin: 1rem 0; padding: 1px; }
.tiles div { background: var(--card); padding: .7rem .8rem;
  box-shadow: 0 0 0 1px var(--rule); }
.tiles dt { font-size: .8rem; color: var(--soft); line-height: 1.3; }
.tiles dd { margin: .15rem 0 0; font-size: 1.35rem; font-weight: 600; line-height: 1.2;
  overflow-wrap: anywhere; }
.tiles dd small { display: block; font-size: .85rem; font-weight: 400; line-height: 1.35; }

.plots { display: grid; gap: 1rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 22rem), 1fr)); }
figure { margin: 0; background: var(--card); border: 1px solid var(--rule);
  padding: .9rem .9rem .6rem; min-width: 0; }
figure svg { display: block; width: 100%; height: auto; font-family: var(--sans); }
figcaption { margin-top: .4rem; }

.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; }
th, td { padding: .3rem .9rem .3rem 0; text-align: right; vertical-align: top;
  border-bottom: 1px solid var(--rule); }
th { font-weight: 600; color: var(--soft); vertical-align: bottom; }
th:first-child, td:first-child { text-align: left; }
table.words th, table.words td { text-align: left; overflow-wrap: break-word; }
td:first-child { white-space: nowrap; }
table.words td:first-child { white-space: normal; }
caption { text-align: left; padding-bottom: .4rem; }
code { font-size: .88em; overflow-wrap: anywhere; }
li { margin: .25rem 0; }

.answer { border-left: .25rem solid var(--rule); padding-left: 1rem; margin: 1.4rem 0; }
.answer dt { font-size: .8rem; color: var(--soft); margin-top: .6rem; }
.answer dd { margin: 0; overflow-wrap: anywhere; }
.answer .tuned { border-left: .25rem solid var(--s1); margin-left: -1.25rem;
  padding-left: 1rem; }
.facts { margin: .6rem 0; max-width: 56rem; }
.facts div { display: grid; grid-template-columns: minmax(9rem, 1fr) minmax(0, 2fr);
  gap: .2rem 1.4rem; padding: .5rem 0; border-bottom: 1px solid var(--rule); }
.facts dt { color: var(--soft); overflow-wrap: anywhere; }
.facts dd { margin: 0; overflow-wrap: anywhere; }
.facts .source { display: block; color: var(--soft); font-size: .8rem; }
.facts .unknown { font-style: italic; }
@media (max-width: 34rem) { .facts div { grid-template-columns: minmax(0, 1fr); } }
details { margin: .6rem 0; }
summary { cursor: pointer; font-weight: 600; padding: .3rem 0; }
@media print { body { background: none; } figure, .answer { break-inside: avoid; } }
"""
