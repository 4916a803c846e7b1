"""What a run found, for people: figures, the run as one HTML page, several runs on one page."""

from asga.report.compare import write_comparison
from asga.report.page import write_report
from asga.report.policy import policy_figure, save_policy_figure
from asga.report.sensitivity import save_sensitivity_figure, sensitivity_figure

__all__ = [
    "policy_figure",
    "save_policy_figure",
    "save_sensitivity_figure",
    "sensitivity_figure",
    "write_comparison",
    "write_report",
]
