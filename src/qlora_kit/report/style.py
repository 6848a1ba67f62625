"""How the page looks, by day and by night, on a desk and on a phone."""

from __future__ import annotations

from typing import Final

__all__ = ["STYLE"]

STYLE: Final = """
:root{color-scheme:light dark;--ink:#1c2430;--soft:#5b6675;--line:#dfe4ea;--page:#f6f7f9;
--card:#fff;--one:#2563eb;--two:#d97706;--three:#0f8a6a;--mark:#fde9a9}
@media(prefers-color-scheme:dark){:root{--ink:#e6eaf0;--soft:#9aa7b8;--line:#313b49;--page:#12161c;
--card:#1a2029;--one:#7aa7ff;--two:#f0b35a;--three:#5fd3b0;--mark:#5a4a12}}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);font:16px/1.5 system-ui,sans-serif}
main{max-width:60rem;margin:0 auto;padding:1.5rem 1rem 3rem}
h1{font-size:1.5rem;margin:.2rem 0 1rem;overflow-wrap:anywhere}
h2{font-size:1.1rem;margin:0 0 .8rem}h3{font-size:1rem;margin:1rem 0 .3rem}
section{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:1rem 1.1rem;
margin-top:1rem;overflow-wrap:anywhere}
dl{display:grid;grid-template-columns:repeat(auto-fit,minmax(8.2rem,1fr));gap:.7rem;margin:0}
dl div{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:.7rem .8rem}
dt{color:var(--soft);font-size:.85rem}dd{margin:0;font-size:1.15rem;font-weight:600}
small{display:block;color:var(--soft);font-weight:400;font-size:.8rem;overflow-wrap:anywhere}
svg{width:100%;height:auto;display:block}
svg text{fill:var(--soft);font:12px system-ui,sans-serif}.end{text-anchor:end}
.grid{stroke:var(--line)}polyline{fill:none;stroke-width:2;stroke-linejoin:round}
polyline.one,circle.one{stroke:var(--one)}polyline.two,circle.two{stroke:var(--two)}
polyline.three,circle.three{stroke:var(--three)}circle{fill:var(--card);stroke-width:2}
line.limit{stroke:var(--soft);stroke-dasharray:5 4}rect{fill:var(--one)}
.keys{color:var(--soft);font-size:.85rem;margin:.2rem 0 1rem}.keys span{margin-right:1rem}
.keys span::before{content:"";display:inline-block;width:1rem;height:3px;margin-right:.35rem;
vertical-align:middle;background:currentColor}
span.one{color:var(--one)}span.two{color:var(--two)}span.three{color:var(--three)}
mark{background:var(--mark);color:inherit;border-radius:2px}
pre{background:var(--page);border:1px solid var(--line);border-radius:8px;padding:.8rem;
white-space:pre-wrap;overflow-wrap:anywhere;font:13px/1.5 ui-monospace,monospace}
table{border-collapse:collapse;width:100%}th,td{text-align:left;vertical-align:top;
padding:.35rem .6rem .35rem 0;border-top:1px solid var(--line)}
th{white-space:nowrap;color:var(--soft);font-weight:400;width:5.5rem}td{white-space:pre-wrap}
ul{padding-left:1.2rem;margin:.3rem 0 1rem}.none{color:var(--soft)}
footer{color:var(--soft);font-size:.8rem;margin-top:1.5rem;overflow-wrap:anywhere}
@media(max-width:30rem){main{padding:1rem .7rem 2rem}svg text{font-size:20px}
dl{grid-template-columns:1fr 1fr}dd{font-size:1rem}}
"""
