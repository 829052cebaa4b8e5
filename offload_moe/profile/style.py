"""The page's style sheet. Line colours: Okabe and Ito's palette, distinguishable with colour blindness."""

STYLE = """
:root { color-scheme: light; }
body { margin: 0; background: #fff; color: #1f2933; font: 15px/1.5 system-ui, "Segoe UI", "DejaVu Sans", sans-serif; }
main { max-width: 800px; margin: 0 auto; padding: 24px 20px 80px; }
h1 { font-size: 24px; margin: 0 0 8px; overflow-wrap: anywhere; }
h2 { font-size: 18px; margin: 40px 0 6px; padding-top: 14px; border-top: 1px solid #dfe4ea; }
p { margin: 4px 0; max-width: 70ch; }
figure { margin: 14px 0; overflow-x: auto; }
svg { max-width: 100%; height: auto; font-size: 12px; }
svg text { fill: #1f2933; }
svg .tick { fill: #616e7c; font-size: 11px; }
svg .axis { fill: #3e4c59; }
svg .title { font-size: 13px; font-weight: 600; }
svg .middle { text-anchor: middle; }
svg .end { text-anchor: end; }
svg .grid { stroke: #e4e7eb; fill: none; }
svg .mark { stroke: #d55e00; stroke-dasharray: 4 3; fill: none; }
svg .dot { fill: #d55e00; stroke: #fff; stroke-width: 1.5; }
svg .leader { stroke: #cbd2d9; fill: none; }
svg .line { fill: none; stroke-width: 1.6; stroke-linejoin: round; }
svg .frame { stroke: #1f2933; stroke-width: 2; }
svg .dashed { stroke-dasharray: 6 4; }
svg .strong { stroke-width: 3; }
svg .c0 { stroke: #0072b2; } svg text.c0, svg circle.c0, svg rect.c0 { fill: #0072b2; stroke: none; }
svg .c1 { stroke: #e69f00; } svg text.c1 { fill: #9a6a00; } svg circle.c1, svg rect.c1 { fill: #e69f00; stroke: none; }
svg .c2 { stroke: #009e73; } svg text.c2, svg circle.c2, svg rect.c2 { fill: #009e73; stroke: none; }
svg .c3 { stroke: #cc79a7; } svg text.c3 { fill: #a84f82; } svg circle.c3, svg rect.c3 { fill: #cc79a7; stroke: none; }
svg .c4 { stroke: #56b4e9; } svg text.c4 { fill: #2b7fb0; } svg circle.c4, svg rect.c4 { fill: #56b4e9; stroke: none; }
svg .c5 { stroke: #d55e00; } svg text.c5, svg circle.c5, svg rect.c5 { fill: #d55e00; stroke: none; }
svg .c6 { stroke: #7b8794; } svg text.c6 { fill: #616e7c; } svg circle.c6, svg rect.c6 { fill: #7b8794; stroke: none; }
svg text.name { stroke: none; }
svg .heat-none { fill: #f2c6c2; }
svg .heat-0 { fill: #eef3f8; } svg .heat-1 { fill: #dbe7f2; } svg .heat-2 { fill: #bfd6ea; }
svg .heat-3 { fill: #96bfe0; } svg .heat-4 { fill: #5c9ccc; } svg .heat-5 { fill: #2a72ae; }
svg .heat-6 { fill: #08427a; }
details { margin: 8px 0; } summary { cursor: pointer; color: #3e4c59; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; margin: 6px 0; }
th, td { padding: 2px 10px; text-align: right; border-bottom: 1px solid #eef1f4; white-space: nowrap; }
th { font-weight: 600; color: #3e4c59; } th:first-child, td:first-child { text-align: left; padding-left: 0; }
@media print { details > * { display: block; } }
"""
