"""The panel's look: one style sheet over the theme's own variables, so that light and dark both read well."""

import html

ROOT_CLASS = "vm-panel"
COLOURS = ("#3b82f6", "#f59e0b", "#10b981", "#ec4899", "#8b5cf6", "#14b8a6", "#f97316", "#84cc16")
"""Of requests, in order of arrival; readable on white and on black."""
SHARED_COLOUR = "#64748b"

_TEXT = "var(--jp-ui-font-color1, inherit)"
_FAINT = "var(--jp-ui-font-color2, gray)"
_LINE = "var(--jp-border-color2, rgba(128,128,128,.35))"
SHEET = f"""<style>
.{ROOT_CLASS} {{ border: 1px solid {_LINE}; border-radius: 8px; padding: 10px 12px; max-width: 980px;
  color: {_TEXT}; font-size: 13px; overflow: visible; container: vmp / inline-size;
  width: 100%; box-sizing: border-box; }}
.{ROOT_CLASS} .widget-html-content, .{ROOT_CLASS} .jupyter-widgets-html-content {{ line-height: 1.45; color: {_TEXT}; }}
.{ROOT_CLASS} .vmp-head {{ display: flex; flex-wrap: wrap; gap: 4px 18px; align-items: baseline; }}
.{ROOT_CLASS} .vmp-head b {{ font-size: 15px; }}
.{ROOT_CLASS} .vmp-faint {{ color: {_FAINT}; }}
.{ROOT_CLASS} .vmp-num {{ font-variant-numeric: tabular-nums; white-space: nowrap; }}
.{ROOT_CLASS} .vmp-chain {{ display: flex; flex-wrap: wrap; gap: 4px 3px; margin: 2px 0 10px; }}
.{ROOT_CLASS} .vmp-chain > div {{ display: flex; gap: 3px; align-items: center; color: {_FAINT}; }}
.{ROOT_CLASS} .vmp-chain .vmp-box {{ border: 1px solid {_LINE}; border-radius: 6px; padding: 2px 7px; min-width: 52px;
  color: {_TEXT}; align-self: stretch; }}
.{ROOT_CLASS} .vmp-chain .vmp-k {{ color: {_FAINT}; font-size: 11px; }}
.{ROOT_CLASS} .vmp-chain .vmp-v {{ font-variant-numeric: tabular-nums; font-weight: 600; white-space: nowrap; }}
.{ROOT_CLASS} .vmp-chain .vmp-was {{ color: {_FAINT}; font-size: 11px; font-weight: 400; }}
.{ROOT_CLASS} .vmp-bad {{ color: var(--jp-error-color1, #d32f2f); }}
.{ROOT_CLASS} .vmp-good {{ color: var(--jp-success-color1, #388e3c); }}
.{ROOT_CLASS} .vmp-legend {{ display: flex; flex-wrap: wrap; gap: 2px 14px; margin-top: 4px; }}
.{ROOT_CLASS} .vmp-line {{ container-type: inline-size; }}
.{ROOT_CLASS} .vmp-req {{ display: grid; gap: 0 10px; align-items: baseline; grid-template-columns: var(--vmp-wide); }}
@container (max-width: 735px) {{
  .{ROOT_CLASS} .vmp-req {{ gap: 0 8px; grid-template-columns: var(--vmp-narrow); }}
  .{ROOT_CLASS} .vmp-req > :first-child {{ grid-column: 1 / -1; }}
}}
.{ROOT_CLASS} .vmp-req > * {{ overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }}
.{ROOT_CLASS} pre {{ margin: 0; padding: 8px 10px; user-select: all; white-space: pre-wrap; overflow-wrap: anywhere;
  word-break: normal;
  color: {_TEXT}; background: var(--jp-cell-editor-background, rgba(128,128,128,.1)); border: 1px solid {_LINE};
  border-radius: 6px; font-family: var(--jp-code-font-family, monospace); font-size: 12px; line-height: 1.4; }}
.{ROOT_CLASS} code {{ color: {_TEXT}; background: transparent; font-family: var(--jp-code-font-family, monospace); }}
.{ROOT_CLASS} h4 {{ margin: 12px 0 4px; font-size: 13px; }}
.{ROOT_CLASS} .lm-TabBar-tab, .{ROOT_CLASS} .p-TabBar-tab {{ flex: 0 1 110px !important; min-width: 70px; }}
.{ROOT_CLASS} .vmp-copied {{ display: inline-flex; gap: 8px; align-items: baseline; flex-wrap: wrap; }}
.{ROOT_CLASS} .vmp-copied code {{ overflow-wrap: anywhere; }}
.{ROOT_CLASS} .vmp-block {{ display: block; position: relative; }}
.{ROOT_CLASS} .vmp-block pre {{ padding-right: 70px; }}
.{ROOT_CLASS} .vmp-block .vmp-copy {{ position: absolute; top: 6px; right: 6px; }}
.{ROOT_CLASS} .vmp-copy {{ font: inherit; font-size: 11px; line-height: 1.5; padding: 0 8px; cursor: pointer;
  color: {_TEXT}; background: var(--jp-layout-color2, rgba(128,128,128,.15)); border: 1px solid {_LINE};
  border-radius: 4px; }}
.{ROOT_CLASS} .vmp-copy:hover {{ border-color: var(--jp-brand-color1, #1976d2); }}
@container vmp (max-width: 640px) {{
  .{ROOT_CLASS} .vmp-param {{ display: grid !important; grid-template-columns: minmax(0, 1fr) auto auto;
    gap: 0 4px; margin-bottom: 4px; overflow: visible; }}
  .{ROOT_CLASS} .vmp-param > :first-child {{ display: contents !important; }}
  .{ROOT_CLASS} .vmp-param .widget-label {{ width: auto !important; text-align: left !important; grid-area: 1 / 1; }}
  .{ROOT_CLASS} .vmp-param > .widget-button {{ grid-area: 1 / 2; }}
  .{ROOT_CLASS} .vmp-param > .widget-html {{ grid-area: 1 / 3; width: auto !important; }}
  .{ROOT_CLASS} .vmp-param .slider-container {{ grid-area: 2 / 1; margin: 0 8px; }}
  .{ROOT_CLASS} .vmp-param .widget-readout {{ grid-area: 2 / 2 / auto / span 2; justify-self: end; }}
  .{ROOT_CLASS} .vmp-param input {{ grid-area: 2 / 1 / auto / span 3; width: 100%; }}
}}
@container vmp (max-width: 340px) {{
  .{ROOT_CLASS} .vmp-block pre {{ padding: 30px 10px 8px; }}
  .{ROOT_CLASS} .vmp-param > .widget-html {{ grid-area: 3 / 1 / auto / span 3; }}
  .{ROOT_CLASS} .lm-TabBar-tab, .{ROOT_CLASS} .p-TabBar-tab {{ min-width: 0 !important; padding: 0 3px !important;
    font-size: 12px; }}
}}
.{ROOT_CLASS} .widget-tab > .widget-tab-contents {{ padding: 10px 4px 2px; overflow: visible; }}
</style>"""


def faint(text: str) -> str:
    """``text`` as an aside, escaped."""
    return f'<span class="vmp-faint">{html.escape(text)}</span>'


def bad(text: str) -> str:
    """``text`` as a refusal, escaped."""
    return f'<span class="vmp-bad" role="alert">{html.escape(text)}</span>'


def hiding_gone_widgets(name: str) -> str:
    """A style sheet for an output beside the element of class ``name``: hides what stands where widgets were.

    The place of a widget that is gone holds a text and no element: "Loading widget", then an error.
    """
    return (
        f"<style>.jp-OutputArea:has(.{name}) > .jp-OutputArea-child > .jp-OutputArea-output:is(.jupyter-widgets, "
        '[data-mime-type^="application/vnd.jupyter.widget"]):not(:has(> *)) { display: none; }</style>'
    )


def good(text: str) -> str:
    """``text`` as what went well, escaped."""
    return f'<span class="vmp-good" role="status">{html.escape(text)}</span>'


def swatch(colour: str) -> str:
    """A small square of ``colour``."""
    shape = "display:inline-block;width:10px;height:10px;border-radius:2px;margin-right:5px"
    return f'<span class="vmp-swatch" style="{shape};background:{colour}"></span>'
