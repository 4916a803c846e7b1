"""What a run found, for people: the policy as a figure, the run as one HTML page."""

from asga.report.page import write_report
from asga.report.policy import policy_figure, save_policy_figure

__all__ = ["policy_figure", "save_policy_figure", "write_report"]
