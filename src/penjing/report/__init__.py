"""The Report as a page: HTML that needs nothing but itself, and Markdown. Both are views of the same report.json."""

from penjing.report.render import render_html, render_markdown, render_sensitivity

__all__ = ["render_html", "render_markdown", "render_sensitivity"]
