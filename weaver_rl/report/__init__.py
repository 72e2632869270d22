"""The report of a run, or of several, as one self-contained HTML file. It reads run folders and asks no process."""

from weaver_rl.report.curve_svg import write_curve_svg
from weaver_rl.report.page import write_page, write_report

__all__ = ["write_curve_svg", "write_page", "write_report"]
