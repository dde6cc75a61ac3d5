"""The look and the behaviour of the report: its style sheet, its script, and the frame that they stand in."""

STYLE = """
:root { --ink: #24292f; --soft: #57606a; --line: #d0d7de; --blue: #0072b2; --orange: #d55e00; }
* { box-sizing: border-box; }
body { margin: 0; color: var(--ink); background: #fff; font: 15px/1.5 system-ui, sans-serif; }
main { max-width: 1240px; margin: 0 auto; padding: 24px 20px 60px; }
h1 { font-size: 24px; margin: 0 0 2px; overflow-wrap: anywhere; }
h2 { font-size: 18px; margin: 36px 0 4px; border-top: 1px solid var(--line); padding-top: 16px; }
p { margin: 4px 0 10px; color: var(--soft); }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(170px, 1fr)); gap: 12px; margin: 18px 0; }
.card { border: 1px solid var(--line); border-radius: 8px; padding: 10px 14px; }
.card b { display: block; font-size: 20px; font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }
.card span { color: var(--soft); font-size: 13px; }
.split { display: grid; grid-template-columns: minmax(0, 7fr) minmax(260px, 3fr); gap: 20px; }
.scroll { overflow: auto; max-height: 470px; border: 1px solid var(--line); border-radius: 8px; padding: 10px 14px; }
table { border-collapse: collapse; width: 100%; font-size: 13px; font-variant-numeric: tabular-nums; }
th { text-align: left; color: var(--soft); font-weight: 600; }
th, td { padding: 3px 10px 3px 0; border-bottom: 1px solid #eaeef2; vertical-align: top; overflow-wrap: anywhere; }
#genome td:first-child { width: 60%; }
tr.chosen td { background: #fff4ec; }
tr.other td { color: var(--orange); font-weight: 600; }
tr.gone td { color: #a5adb6; text-decoration: line-through; }
@media (max-width: 860px) { .split { grid-template-columns: 1fr; } }
@media print { .scroll { max-height: none; } }
"""

# A genome is shown when its point is hovered, and stays when it is clicked. Genes that cannot matter are -1.
SCRIPT = """
(function () {
  const record = JSON.parse(document.getElementById("record").textContent);
  const panel = document.getElementById("genome");
  let kept = record.shown;
  function row(cells, kind) {
    const line = document.createElement("tr");
    if (kind) line.className = kind;
    for (const text of cells) {
      const cell = document.createElement("td");
      cell.textContent = text;
      line.appendChild(cell);
    }
    return line;
  }
  function show(number) {
    const entry = record.evaluations[number];
    if (!entry || !panel) return;
    panel.textContent = "";
    const title = document.createElement("b");
    title.textContent = "evaluation " + number;
    const facts = document.createElement("table");
    for (const [name, value] of entry.facts) facts.appendChild(row([name, value]));
    const genes = document.createElement("table");
    entry.genome.forEach((index, at) => {
      const gene = record.genes[at];
      if (index < 0) genes.appendChild(row([gene.name, "cannot matter"], "gone"));
      else genes.appendChild(row([gene.name, gene.choices[index]], index === record.largest[at] ? "" : "other"));
    });
    panel.append(title, facts, genes);
  }
  for (const plot of document.querySelectorAll(".front .plotly-graph-div")) {
    const numberOf = (event) => event.points[0].customdata;
    plot.on("plotly_hover", (event) => show(numberOf(event)));
    plot.on("plotly_unhover", () => show(kept));
    plot.on("plotly_click", (event) => { kept = numberOf(event); show(kept); });
  }
  show(kept);
})();
"""

PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
<script>{plotly}</script>
</head>
<body>
<main>
{body}
</main>
<script type="application/json" id="record">{record}</script>
<script>{script}</script>
</body>
</html>
"""
