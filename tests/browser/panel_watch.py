"""What the tests read off the live panel: its step, how often it changed, in how many nodes and heights."""

STEP = """() => {
  const line = document.querySelector('.fiqa-panel .when')?.innerText ?? '';
  return Number(line.match(/step (\\d+) of/)?.[1] ?? -1);
}"""

WATCH = """() => {
  window.seen = {curves: new Set(), heights: new Set(), texts: new Set(), nodes: new Set()};
  const look = () => {
    const panel = document.querySelector('.fiqa-panel'); if (!panel) return;
    const node = panel.closest('.jp-OutputArea-child');
    seen.nodes.add(node);
    seen.heights.add(Math.round(node.getBoundingClientRect().height));
    seen.curves.add([...panel.querySelectorAll('polyline, .o')].map(e => e.outerHTML).join());
    seen.texts.add(panel.querySelector('.samples').innerText);
  };
  look();
  const page = document.querySelector('.jp-Notebook');
  new MutationObserver(look).observe(page, {childList: true, subtree: true});
}"""
SEEN = """() => ({curves: seen.curves.size, heights: [...seen.heights], texts: seen.texts.size,
  nodes: seen.nodes.size})"""


def at_step(page, step: int, seconds: int = 300) -> int:
    """Wait until the panel shows at least `step` optimizer steps done; gives what it shows."""
    page.wait_for_function(f"() => ({STEP})() >= {step}", timeout=1000 * seconds)
    return page.evaluate(STEP)
